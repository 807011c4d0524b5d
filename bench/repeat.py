"""Whole runs again, each in a process of its own: memory lies elsewhere, and clocks and caches begin anew, so that the
runs' medians differ by what two runs of the same code differ by."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from bench.measure import Row, derive
from bench.report import group_of, load


def runs(argv: Sequence[str], number: int) -> tuple[list[Row], bool]:
    """The merged rows of that many runs, and whether all of them were measured."""
    found: list[list[Row]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(number):
            result = Path(folder, f"{i}.json")
            command = [sys.executable, Path(__file__).with_name("run.py"), *argv, "--child", result]
            process = subprocess.Popen(command)
            interrupted = False
            try:
                process.wait()
            except KeyboardInterrupt:  # the child got it, too, and saves what it has
                interrupted = True
                process.wait()
            if result.exists():
                content, rows = load(result)
                found.append(rows)
                interrupted |= not content["complete"]
            elif not interrupted:
                raise RuntimeError(f"run {i + 1} of {number} ended with status {process.returncode} and no result")
            if interrupted:
                return merge(found), False
    return merge(found), True


def merge(found: Iterable[Sequence[Row]]) -> list[Row]:
    """One row for each that a run has: the median of the runs' medians, between the lowest and the highest quartile. It
    fails if it failed in any run."""
    same: dict[tuple, list[Row]] = {}
    for row in (row for rows in found for row in rows):
        same.setdefault((group_of(row), row.shape, row.provider), []).append(row)
    cases: dict[tuple, list[Row]] = {}
    for (group, shape, _), rows in same.items():
        cases.setdefault((group, shape), []).append(_merged(rows))
    for rows in cases.values():
        derive(rows)
    return [row for rows in cases.values() for row in rows]


def _merged(rows: Sequence[Row]) -> Row:
    failed = next((row for row in rows if row.error), None)
    if failed:
        return failed
    copies = [row.copy_gbs for row in rows if row.copy_gbs]
    names = [name for name in rows[0].after_ms if all(name in row.after_ms for row in rows)]
    return replace(
        rows[0],
        ms=statistics.median(row.ms for row in rows),
        low_ms=min(row.low_ms for row in rows),
        high_ms=max(row.high_ms for row in rows),
        samples=sum(row.samples for row in rows),
        copy_gbs=statistics.median(copies) if copies else None,
        after_ms={name: statistics.median(row.after_ms[name] for row in rows) for name in names},
        runs_ms=[row.ms for row in rows],
    )
