"""`python bench/traffic.py`: the DRAM bytes of each kernel, counted by ncu, next to the declared bytes; and why a
kernel is no faster: how busy DRAM and multiprocessors are, what warps wait for, what the L2 cache sees.

ncu runs this file again for each case, with a single cold call between the profiler's marks. What a
kernel leaves in the L2 to be written later is not counted, and what fits in the L2 never need be: take
tensors of several times its size. A user without access to the counters gets ncu's own message.

Bytes take one pass, over caches as the kernel before left them. All else takes several: kernels are run again for each,
every time with flushed caches, so that a second kernel finds nothing of the first.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: what is measured is this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.cases import DTYPES, EPILOGUES, LAYOUTS, PHASES, Problem, declared_bytes, layouts, make_operands, make_state
from bench.providers import Provider, parse_providers
from bench.run import checked, names_of
from bench.suites import parse_shapes

BYTES = READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
# Stalls: of the warps that a scheduler holds, how many on average wait for that, for each instruction that it issues.
DETAILS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "stall_long_scoreboard": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "stall_membar": "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio",
    "stall_barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "l2_sectors": "lts__t_sectors.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
}


class Kernel(NamedTuple):
    name: str
    metrics: dict[str, float]


def parse_ncu(output: str) -> list[Kernel]:
    """The kernels of `ncu --csv --print-units base`, which has a line for each kernel and metric."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = found.setdefault(row["ID"], {"name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = row["Metric Value"].replace(",", "")
    return [Kernel(kernel.pop("name"), {name: _number(value) for name, value in kernel.items()}) for kernel in
            found.values()]  # fmt: skip


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # n/a, where a GPU does not count that
        return math.nan


def call_once(problem: Problem, phase_name: str, provider: Provider) -> None:
    """What ncu looks at: the second call of a phase, with nothing of it left in the L2."""
    phase = PHASES[phase_name]
    state, operands = make_state(problem, "cuda"), make_operands(problem, "cuda", seed=0)
    with provider.scope(), torch.set_grad_enabled(phase.records):
        module = provider.build(problem, "cuda").train(phase.training)
        state.install(module, phase.frozen)
        call = phase.call(module, operands)
        call()
        torch.empty(8 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda").zero_()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def count(problem: Problem, phase: str, provider: str, metrics: Sequence[str], caches: str) -> list[Kernel]:
    ncu = ["ncu", "--csv", "--print-units", "base", "--metrics", ",".join(metrics), "--profile-from-start", "off"]
    ncu += ["--cache-control", caches, "--clock-control", "none"]
    shape = "x".join(map(str, problem.shape))
    child = [
        sys.executable,
        __file__,
        "--once",
        "--shapes",
        shape,
        "--dtype",
        problem.dtype,
        "--layout",
        problem.layout,
    ]
    child += ["--epilogue", problem.epilogue, "--phase", phase, "--providers", provider]
    done = subprocess.run([*ncu, *child], capture_output=True, text=True)
    kernels = parse_ncu(done.stdout)
    if done.returncode or not kernels:
        said = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in said if "==ERROR==" in line] or said[-1:] or [f"ncu exited with {done.returncode}"]
        raise RuntimeError(errors[0])
    return kernels


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--shapes", type=checked(parse_shapes), default="64x64x112x112,64x256x56x56")
    add("--dtype", type=names_of(tuple(DTYPES)), default="bfloat16")
    add("--layout", type=names_of(LAYOUTS, "both"), default="both")
    add("--epilogue", type=names_of(EPILOGUES), default="none")
    add(
        "--phase",
        type=names_of([phase.name for phase in PHASES.values() if not phase.host]),
        default="forward,backward",
    )
    add("--providers", type=checked(parse_providers), default="bnext,eager")
    add("--once", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    problems = [
        Problem(workload.shape, dtype, layout, epilogue)
        for workload in args.shapes
        for dtype in args.dtype
        for epilogue in args.epilogue
        for layout in args.layout
        if layout in layouts(workload.shape)
    ]
    if args.once:
        call_once(problems[0], args.phase[0], args.providers[0])
        return 0
    if shutil.which("ncu") is None:
        print("traffic.py needs ncu, of Nsight Compute, on PATH", file=sys.stderr)
        return 2
    failed = False
    for problem in problems:
        for phase in args.phase:
            declared = declared_bytes(problem, PHASES[phase])
            shape = "x".join(map(str, problem.shape))
            print(f"\n{shape} {problem.dtype} {problem.layout} {phase}: {declared * 1e-6:.1f} MB declared")
            for provider in (provider.name for provider in args.providers):
                try:
                    kernels = count(problem, phase, provider, BYTES, "none")
                    total = sum(kernel.metrics[name] for kernel in kernels for name in BYTES)
                    print(f"  {provider}: {total * 1e-6:.1f} MB, {total / declared:.2f}x, {len(kernels)} kernels")
                    for name, metrics in kernels:
                        read, written = (1e-6 * metrics[metric] for metric in BYTES)
                        print(f"    {read:9.1f} read {written:9.1f} written  {name[:80]}", flush=True)
                    for name, metrics in count(problem, phase, provider, list(DETAILS.values()), "all"):
                        metrics[DETAILS["us"]] *= 1e-3
                        shown = " ".join(f"{key} {metrics[metric]:.1f}" for key, metric in DETAILS.items())
                        print(f"    {shown}  {name[:80]}", flush=True)
                except RuntimeError as error:
                    print(f"  {provider}: {error}")
                    failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
