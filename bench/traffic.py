"""`python bench/traffic.py`: the DRAM bytes of each kernel, counted by ncu, next to the declared bytes.

ncu runs this file again for each case, with a single cold call between the profiler's marks. What a
kernel leaves in the L2 to be written later is not counted, and what fits in the L2 never need be: take
tensors of several times its size. A user without access to the counters gets ncu's own message.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: what is measured is this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.cases import DTYPES, EPILOGUES, PHASES, Problem, declared_bytes, layouts, make_operands, make_state
from bench.providers import parse_providers
from bench.run import checked, names_of
from bench.suites import parse_shapes

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"


class Kernel(NamedTuple):
    name: str
    read: float
    written: float


def parse_ncu(output: str) -> list[Kernel]:
    """The kernels of `ncu --csv --print-units base`, which has a line for each kernel and metric."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = found.setdefault(row["ID"], {"name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = row["Metric Value"].replace(",", "")
    return [Kernel(kernel["name"], float(kernel[READ]), float(kernel[WRITTEN])) for kernel in found.values()]


def call_once(problem: Problem, phase_name: str, provider_name: str) -> None:
    """What ncu looks at: the second call of a phase, with nothing of it left in the L2."""
    phase, (provider,) = PHASES[phase_name], parse_providers(provider_name)
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


def count(problem: Problem, phase: str, provider: str) -> list[Kernel]:
    metrics = f"{READ},{WRITTEN}"
    ncu = ["ncu", "--csv", "--print-units", "base", "--metrics", metrics, "--profile-from-start", "off"]
    ncu += ["--cache-control", "none", "--clock-control", "none"]
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
    add("--layout", type=names_of(("planar", "interleaved"), "both"), default="both")
    add("--epilogue", type=names_of(EPILOGUES), default="none")
    add("--phase", type=names_of([name for name in PHASES if name != "host"]), default="forward,backward")
    add("--providers", default="bnext,eager")
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
        call_once(problems[0], args.phase[0], args.providers)
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
            for provider in args.providers.split(","):
                try:
                    kernels = count(problem, phase, provider)
                except RuntimeError as error:
                    print(f"  {provider}: {error}")
                    failed = True
                    continue
                total = sum(kernel.read + kernel.written for kernel in kernels)
                print(f"  {provider}: {total * 1e-6:.1f} MB, {total / declared:.2f}x, {len(kernels)} kernels")
                for kernel in kernels:
                    print(
                        f"    {kernel.read * 1e-6:9.1f} read {kernel.written * 1e-6:9.1f} written  {kernel.name[:80]}"
                    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
