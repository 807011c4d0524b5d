"""`python bench/probe.py --json FILE`: measures what the constants of plans come from, on this machine's GPU.

Compiles probe.cu for it, which takes a quarter of a minute, and runs its sections, each in a process of its own: one
that fails, or does not end, is a line that says so. The file is written anew after each section.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: what is measured is this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bnext import _toolchain

SOURCE = Path(__file__).with_name("probe.cu")


class Section(NamedTuple):
    what: str
    settles: str  # which of the plans' constants and rules
    keys: dict[str, str]  # of a row


SECTIONS = {
    "a": Section(
        "from one node of a CUDA graph to the next, of empty kernels on all multiprocessors",
        "what a launch costs that a plan saves or adds; kSmallBytes; whether cooperative launches are dearer",
        {
            "kind": "plain, cooperative, cluster, overlapping (programmatic dependent launch), or memset of 1 KB",
            "cluster": "blocks of a cluster",
            "shared_kb": "dynamic shared memory of a block",
            "us": "per node",
        },
    ),
    "b": Section(
        "how many clusters are on the device at a time, and which multiprocessors shared clusters, that is, a GPC",
        "the waves that clusters of each size take",
        {
            "cluster": "blocks of a cluster",
            "blocks_per_sm": "that shared memory leaves room for: 1 or 2",
            "clusters": "at a time",
            "part_of_slots": "their blocks, as a part of multiprocessors times blocks_per_sm",
            "gpc": "the least multiprocessor of a group",
            "sm_count": "multiprocessors that were seen in clusters with each other, directly or not",
            "sms": "their numbers",
        },
    ),
    "c": Section(
        "bandwidth of one block to a multiprocessor, by bytes in flight",
        "chunk sizes, threads of a block, stages, and whether asynchronous copies pay",
        {
            "path": "registers (LDG, STG), async (cp.async), bulk (cp.async.bulk)",
            "mode": "read, write, or copy, where only the reads are as the path says unless it is registers",
            "kb_in_flight": "on a multiprocessor, at most",
            "gbs": "read and written",
        },
    ),
    "d": Section(
        "bandwidth of tiles of columns, one after the other, two blocks to a multiprocessor",
        "kNarrowBytes and kMaxTileVecs: how wide a tile must be",
        {
            "mode": "read or write",
            "pitch": "bytes of a matrix row: channels times element size",
            "tile": "bytes of a tile's row",
            "gbs": "of what is asked for",
        },
    ),
    "e": Section(
        "what it takes blocks to exchange results through memory: arrive, the last opens, all wait for that",
        "rounds and splits of tiles, the barrier's fences and pauses, resident against two_pass",
        {
            "blocks": "that wait for each other",
            "fence": "membar (__threadfence), acq_rel, or none: no exchange, the stores alone",
            "stores_kb": "written by each block before it arrives",
            "sleep_ns": "between two looks",
            "us": "of one round, with its stores",
        },
    ),
    "g": Section(
        "inside a cluster",
        "clusters against groups; the least share for which a larger cluster pays",
        {
            "cluster": "blocks of a cluster",
            "barrier_cycles": "of arrive and wait",
            "remote_read_cycles": "of a load from the next block's shared memory that waits for the one before",
            "own_read_cycles": "the same from the block's own, through the cluster's window",
        },
    ),
    "h": Section(
        "how much of a tensor the L2 cache still has after 128 MB of others",
        "how much a two_pass plan retains",
        {
            "policy": "of the tensor's loads: normal or evict_last; calibration: what hits and misses cost",
            "stream": "policy of the others' loads: normal or evict_first",
            "mb": "of the tensor",
            "us": "of reading it again",
            "hit_rate": "from that time, 0 to 1",
            "hit_us_per_mb": "calibration",
            "miss_us_per_mb": "calibration",
            "start_us": "calibration: of next to nothing",
        },
    ),
}


def compile_probe(architecture: str, target: Path) -> None:
    """`architecture` as in sm_90. Raises RuntimeError with what the compiler said."""
    toolkit, passed_over = _toolchain.find_toolkit()
    if toolkit is None:
        raise RuntimeError("no CUDA compiler: " + "; ".join(passed_over))
    number = architecture.removeprefix("sm_")
    command: list[str | Path] = [toolkit.nvcc, "-O3", "-std=c++17", "-lineinfo", "-Werror", "all-warnings"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}", SOURCE, "-o", target]
    libraries = [f"-L{folder}" for folder in (toolkit.home / "lib64", toolkit.home / "lib") if folder.is_dir()]
    done = subprocess.run([*command, *libraries], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stderr}{done.stdout}")


def measure(program: Sequence[Path | str], letter: str, seconds: float) -> dict:
    """What a section printed, until it ended or its time was over; and what went wrong, or null."""
    start, section = time.monotonic(), SECTIONS[letter]
    process = subprocess.Popen([*program, letter], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    error = None
    try:
        output, said = process.communicate(timeout=seconds)
        if process.returncode:
            error = " ".join(said.split()) or f"ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        error = f"not over in {seconds:g} s"
    rows = []
    for line in output.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off in the middle
            error = error or f"no row: {line[:80]}"
    about = {
        "what": section.what,
        "settles": section.settles,
        "keys": section.keys | {"error": "why a launch was refused"},
    }
    return about | {"seconds": round(time.monotonic() - start, 1), "error": error, "rows": rows}


def shown(letter: str, result: dict) -> str:
    lines = [f"{letter}: {result['what']} ({result['seconds']} s)"]
    lines += ["  " + "  ".join(f"{key} {value}" for key, value in row.items()) for row in result["rows"]]
    return "\n".join([*lines, f"  FAILED: {result['error']}"] if result["error"] else lines)


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--json", type=Path, metavar="FILE", default=Path("bench/results/gpu-probe.json"))
    p.add_argument("--sections", default="".join(SECTIONS), help="letters")
    p.add_argument("--seconds", type=float, default=30, help="that a section may take")
    args = p.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        p.error(f"no section {min(unknown)!r}: there are {', '.join(SECTIONS)}")
    import torch

    from bench import report

    if not torch.cuda.is_available():
        p.error("torch sees no CUDA GPU")
    major, minor = torch.cuda.get_device_capability()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"environment": report.environment("cuda"), "sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "probe")
        try:
            compile_probe(f"sm_{major}{minor}", program)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        for letter in args.sections:
            content["sections"][letter] = result = measure([program], letter, args.seconds)
            args.json.write_text(json.dumps(content, indent=1) + "\n")
            print(shown(letter, result), flush=True)
    print(f"wrote {args.json}")
    return 1 if any(result["error"] for result in content["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
