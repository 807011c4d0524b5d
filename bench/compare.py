"""`python bench/compare.py A.json B.json`: what became faster or slower from A to B, beyond the spread of both."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.measure import Row
from bench.report import describe, group_of, load, spread_of_runs
from bench.run import checked


def key(row: Row) -> tuple:
    return (*group_of(row), row.shape, row.provider)


def changes(before: Iterable[Row], after: Iterable[Row], threshold: float) -> tuple[list[tuple[float, Row]], int]:
    """(time after / time before, row after) of the cells that changed, most slowed down first; and how many
    cells both runs have.

    A change counts where the middle halves of the samples do not overlap, and where it is more than the spread
    between runs of the same code: as the rows tell it, where a side was run several times, and at least `threshold`.
    """
    old = {key(row): row for row in before if row.ms}
    pairs = [(old[key(row)], row) for row in after if row.ms and key(row) in old]
    found = [
        (b.ms / a.ms, b)
        for a, b in pairs
        if (b.low_ms > a.high_ms or b.high_ms < a.low_ms)
        and max(b.ms / a.ms, a.ms / b.ms) - 1 > max(threshold, *(spread_of_runs(row) or 0 for row in (a, b)))
    ]
    return sorted(found, key=lambda change: -change[0]), len(pairs)


def drift(before: Iterable[Row], after: Iterable[Row]) -> float | None:
    """How much faster the machine itself copies in `after`: if not 1, the machine has changed as well."""
    old = {key(row): row.copy_gbs for row in before if row.copy_gbs}
    ratios = [row.copy_gbs / old[key(row)] for row in after if row.copy_gbs and key(row) in old]
    return statistics.geometric_mean(ratios) if ratios else None


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("before", type=checked(load))
    parser.add_argument("after", type=checked(load))
    parser.add_argument("--threshold", type=float, default=0.03, help="smallest change that counts")
    parser.add_argument("--provider", help="look at this one alone")
    args = parser.parse_args(argv)
    (a, before), (b, after) = args.before, args.after
    for name in ("hardware", "torch", "cuda", "driver", "caches"):
        was, now = (content["environment"].get(name, "unknown") for content in (a, b))
        if was != now and "unknown" not in (was, now):  # which older files do not say
            print(f"another {name}: {was}, then {now}")
    if args.provider:
        after = [row for row in after if row.provider == args.provider]

    found, compared = changes(before, after, args.threshold)
    for ratio, row in found:
        word = "slower" if ratio > 1 else "faster"
        times = max(ratio, 1 / ratio)
        shape = "x".join(map(str, row.shape))
        group = describe(group_of(row))
        print(f"{times:6.2f}x {word}  {row.provider:12} {shape:>18}  {group}")
    slower = sum(ratio > 1 for ratio, _ in found)
    moved = drift(before, after)
    print(f"{compared} cells: {slower} slower, {len(found) - slower} faster, {compared - len(found)} the same", end="")
    print(f"; copies run at {moved:.2f}x the rate" if moved else "")
    spreads = [s for row in (*before, *after) if row.ms and (s := spread_of_runs(row)) is not None]
    if spreads:
        typical, most = (100 * value for value in (statistics.median(spreads), max(spreads)))
        print(f"the same: within the spread between runs of the same code, {typical:.1f} %, at most {most:.1f} %")
    else:
        print("each side was run once: the spread between two runs of the same code is unknown (bench/run.py --runs 3)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
