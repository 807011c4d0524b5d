"""`python bench/sweep.py FILE.jsonl`: very many shapes against torch eager, to find where bnext is slow.

What is measured is appended to the file, a line for each shape and phase. Run again with the same file
and arguments, it goes on where it was stopped. The order is random, the same every time: a sweep stopped
early has seen something of everything. It ends with the cells that compare worst.

Of so many short looks some are low by chance: `--again 5` has those below `--limit` measured five times more, each in
a process of its own, and tells which are low in the median. That goes to FILE-again.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

if not __package__:  # run as a script: what is measured is this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import repeat
from bench.cases import DTYPES, EPILOGUES, LAYOUTS, PHASES
from bench.measure import Row
from bench.providers import parse_providers
from bench.report import describe, group_of
from bench.run import Case, cases, checked, devices, names_of, numbers, run
from bench.suites import NETWORKS, SHAPES, Workload, suite
from bench.timing import reuse_heap


def shapes(most: int) -> list[tuple[int, ...]]:
    """Every network's layers at several batch sizes, the shapes of the other suites, and a grid over what
    plans depend on: how many channels, how large and how aligned a plane, how many values a channel.
    None has more than `most` elements."""
    found = [workload.shape for name in NETWORKS for batch in (8, 32, 128) for workload in suite(name, batch)]
    found += itertools.chain.from_iterable(SHAPES.values())
    planes = ((1, 1), (3, 3), (7, 7), (14, 14), (15, 17), (28, 28), (56, 56), (112, 112))
    found += [(n, c, *plane) for n, c, plane in itertools.product((8, 32, 256), (3, 32, 100, 512, 2048), planes)]
    return [shape for shape in dict.fromkeys(found) if math.prod(shape) <= most]


def identity(row: Row) -> tuple:
    """The case and phase that a row is about: what is measured once."""
    return (row.shape, *group_of(row))


def selected(todo: Sequence[Case], wanted: Callable[[tuple], bool]) -> list[Case]:
    """The cases, each with those of its phases that are wanted, by their identity."""
    left = []
    for case in todo:
        blank = [Row.blank(case.problem, phase, case.device.threads, case.suite, None, 1, "") for phase in case.phases]
        phases = tuple(phase for phase, row in zip(case.phases, blank, strict=True) if wanted(identity(row)))
        if phases:
            left.append(replace(case, phases=phases))
    return left


def read(path: Path) -> list[Row]:
    """What has been measured. A line that an interruption cut off is as if it were not there."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows += [Row.from_json(row) for row in json.loads(line)]
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a") as file:
        file.write(json.dumps([asdict(row) for row in rows]) + "\n")


def worst(rows: Sequence[Row]) -> list[Row]:
    """The cells of the first provider that compare with eager, worst first."""
    cells = [row for row in rows if row.provider == rows[0].provider and "eager" in row.speedup]
    return sorted(cells, key=lambda row: row.speedup["eager"])


def below(rows: Sequence[Row], limit: float) -> list[Row]:
    return [row for row in worst(rows) if row.speedup["eager"] < limit]


def show(row: Row) -> str:
    return (
        f"{row.speedup['eager']:6.2f}x the speed of eager, {row.ratio:7.2f}x the floor  "
        f"{'x'.join(map(str, row.shape)):>18}  {describe(group_of(row))}"
    )


def again(argv: Sequence[str], number: int) -> list[Row]:
    """What is below the limit in the file, measured in so many processes: merged."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(number):
            result = Path(folder, f"{i}.jsonl")
            subprocess.run([sys.executable, Path(__file__), *argv, "--child", result], check=True)
            found.append(read(result))
    return repeat.merge(found)


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("file", type=Path)
    add("--dtype", type=names_of(tuple(DTYPES)), default="all")
    add("--epilogue", type=names_of(EPILOGUES), default="none")
    add("--phase", type=names_of(tuple(PHASES)), default="forward,eval,backward")
    add("--providers", type=checked(parse_providers), default="bnext,eager")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=checked(numbers), default="all")
    add("--most", type=int, default=1 << 26, help="elements of a shape")
    add("--cases", type=int, help="only so many, drawn at random, each in all phases")
    add("--seconds", type=float, default=0.03, help="for which each provider is sampled in each case")
    add("--worst", type=int, default=10, help="how many cells to show")
    add("--again", type=int, default=0, metavar="NUMBER", help="measure what is below --limit so many times more")
    add("--limit", type=float, default=0.97, help="of the speed of eager")
    add("--child", type=Path, help=argparse.SUPPRESS)  # where one of these times goes
    args = p.parse_args(argv)
    reuse_heap()
    workloads = {("sweep", None): [Workload(shape, 1) for shape in shapes(args.most)]}
    phases = [PHASES[name] for name in args.phase]
    where = devices(args.device, args.threads)
    todo = list(cases(workloads, args.dtype, LAYOUTS, args.epilogue, "float32", phases, where))
    random.Random(0).shuffle(todo)
    todo = todo[: args.cases]

    rows = read(args.file)
    if args.child:
        slow = {identity(row) for row in below(rows, args.limit)}
        append(args.child, list(run(selected(todo, slow.__contains__), args.providers, args.seconds)))
        return 0
    if args.file.exists() and not args.file.read_text().endswith("\n"):
        args.file.open("a").write("\n")  # after a line that was cut off
    done = {identity(row) for row in rows}
    measured = run(selected(todo, lambda cell: cell not in done), args.providers, args.seconds)
    try:
        while batch := list(itertools.islice(measured, len(args.providers))):
            append(args.file, batch)
            rows += batch
    except KeyboardInterrupt:
        print("interrupted: run again to go on", file=sys.stderr)
        args.again = 0
    cells, low = {identity(row) for row in rows}, below(rows, args.limit)
    print(f"{len(cells)} cells, {len(low)} below {args.limit}, the worst:")
    print("\n".join(map(show, worst(rows)[: args.worst])))
    if args.again and low:
        merged = again(argv, args.again)
        result = args.file.with_name(args.file.stem + "-again.jsonl")
        result.unlink(missing_ok=True)
        append(result, merged)
        low = below(merged, args.limit)
        print(f"measured {args.again} times more, {len(low)} of these are below {args.limit} in the median:")
        print("\n".join(map(show, low)))
        rows += merged
    print("\n".join(dict.fromkeys(f"{row.provider}: {row.error}" for row in rows if row.error)))
    return 1 if any(row.is_wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
