"""What a run leaves behind: where it ran, its rows, what they come to, and all that as JSON and text."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.measure import Row

ROOT = Path(__file__).resolve().parents[1]


def environment(device: str) -> dict[str, object]:
    """All that figures depend on. Nothing here tells whose machine it is."""
    cuda = device == "cuda"
    return {
        "device": device,
        "hardware": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "l2_bytes": torch.cuda.get_device_properties().L2_cache_size if cuda else None,
        "cores": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "bnext", "bench/*.py")
    return f"{commit} with changes" if commit and changes else commit


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def default_path(environment: dict, name: str) -> Path:
    """bench/results/<hardware>-<name>: one file for each machine and suite."""
    words = re.findall(r"[a-z0-9]+", f"{environment['hardware']}".lower())
    if environment["device"] == "cpu":
        words += [f"{environment['cores']}core"] + ["cold"] * (environment.get("caches") == "cold")
    return ROOT / "bench" / "results" / "-".join([*words, name])


GROUP = ("suite", "batch", "dtype", "layout", "epilogue", "parameters", "phase", "threads")


def group_of(row: Row) -> tuple:
    return tuple(getattr(row, name) for name in GROUP)


def grouped(rows: Iterable[Row]) -> dict[tuple, dict[str, list[Row]]]:
    """Rows by GROUP, all that differs only in shape, and by provider."""
    groups: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(group_of(row), {}).setdefault(row.provider, []).append(row)
    return groups


def summarize(rows: Iterable[Row]) -> list[dict]:
    """What each provider's rows of a group come to: geometric means over the layers of the network, their
    sum, the worst of them. All are weighted by how often a layer occurs. Where a layer failed
    there is no sum, for it would be compared with sums of more layers."""
    summary = []
    for group, providers in grouped(rows).items():
        totals = {
            name: None if any(row.error for row in members) else sum(row.count * row.ms for row in members)
            for name, members in providers.items()
        }
        for name, members in providers.items():
            ran = [row for row in members if row.error is None]
            timed = [row for row in ran if row.ratio is not None]
            worst = max(timed, key=lambda row: row.ratio, default=None)
            others = [other for other in providers if other != name]
            entry = {
                "provider": name,
                "cells": len(members),
                "failed": len(members) - len(ran),
                "total_ms": totals[name],
                "total_floor_ms": sum(row.count * row.floor_ms for row in timed) if totals[name] and timed else None,
                "geomean_ratio": _geomean((row.ratio, row.count) for row in timed),
                "worst_ratio": worst and worst.ratio,
                "worst_shape": worst and worst.shape,
                "total_speedup": {o: totals[o] / totals[name] for o in others if totals[o] and totals[name]},
                "geomean_speedup": {
                    o: mean
                    for o in others
                    if (mean := _geomean((row.speedup[o], row.count) for row in ran if o in row.speedup))
                },
            }
            summary.append(dict(zip(GROUP, group, strict=True)) | entry)
    return summary


def _geomean(weighted: Iterable[tuple[float, int]]) -> float | None:
    values = [value for value, weight in weighted for _ in range(weight)]
    return statistics.geometric_mean(values) if values else None


def save(path: Path, rows: Sequence[Row], environment: dict, command: str, complete: bool) -> None:
    """JSON with one row a line, so that two results can be read side by side."""
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in
             (("environment", environment), ("command", command), ("complete", complete))]  # fmt: skip
    for key, lines in (("summary", summarize(rows)), ("rows", [asdict(row) for row in rows])):
        parts.append(f'"{key}": [\n' + ",\n".join(json.dumps(_rounded(line)) for line in lines) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.part")  # at no time is there half a file
    written.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    written.replace(path)


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load(path: str | Path) -> tuple[dict, list[Row]]:
    try:
        content = json.loads(Path(path).read_text())
        return content, [Row.from_json(row) for row in content["rows"]]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of bench/run.py: {error}") from error


def describe(group: tuple, without: str = "") -> str:
    """A group's name for people, if need be without one of its parts."""
    values = dict(zip(GROUP, group, strict=True)) | {without: None}
    threads, epilogue = values["threads"], values["epilogue"]
    parts = [
        values["suite"],
        f"N = {values['batch']}" if values["batch"] else None,
        values["dtype"],
        values["layout"],
        f"bn+{epilogue.replace('_', '+')}" if epilogue != "none" else None,
        f"{values['dtype']} parameters" if values["parameters"] == "same" else None,
        values["phase"],
        f"{threads} thread{'s' * (threads > 1)}" if threads else None,
    ]
    return ", ".join(filter(None, parts))


# The columns of a provider in a table: heading, width, digits, value of a row.
_COLUMNS = (
    ("us", 9, 1, lambda row: row.ms and 1e3 * row.ms),
    ("GB/s", 8, 1, lambda row: row.gbs),
    ("%copy", 6, 0, lambda row: row.copy_percent),
    ("/floor", 7, 2, lambda row: row.ratio),
)
_WIDTH = sum(width for _, width, *_ in _COLUMNS)


def table(rows: Sequence[Row]) -> str:
    """Each group as a table of shapes x providers, with its sum and geometric means below, and what failed."""
    lines = []
    for group, providers in grouped(rows).items():
        first, *others = providers
        lines += ["", describe(group)]
        lines.append(_line("", "", [name.rjust(_WIDTH) for name in providers], [f"{first} over" for _ in others]))
        lines.append(_line("shape", "count", ["".join(c[0].rjust(c[1]) for c in _COLUMNS)] * len(providers), others))
        for cells in zip(*providers.values(), strict=True):
            blocks = [_block([value(cell) for *_, value in _COLUMNS]) for cell in cells]
            speedups = [_times(cells[0].speedup.get(name)) for name in others]
            lines.append(_line("x".join(map(str, cells[0].shape)), cells[0].count, blocks, speedups))
        if len(providers[first]) > 1:
            entries = summarize(row for members in providers.values() for row in members)
            blocks = [_block([e["total_ms"] and 1e3 * e["total_ms"], None, None, e["geomean_ratio"]]) for e in entries]
            speedups = [_times(entries[0]["geomean_speedup"].get(name)) for name in others]
            lines.append(_line("sum, geom. mean", sum(row.count for row in providers[first]), blocks, speedups))
            blocks = [_worst(entry) for entry in entries]
            slowest = [min((r.speedup[n] for r in providers[first] if n in r.speedup), default=None) for n in others]
            lines.append(_line("worst", "", blocks, [_times(speedup) for speedup in slowest]))
    return "\n".join(lines).strip("\n")


def overview(rows: Sequence[Row]) -> str:
    """What a run comes to: a line for each group and provider, how far results scatter, and what failed."""
    heading = f"{'':>15} {'':>16} {'sum':>10} {'/floor':>7} {'worst /floor':>24}   first provider over this one"
    lines = ["summary: sums and geometric means over layers", heading]
    for group, providers in grouped(rows).items():
        first = next(iter(providers))
        lines.append(describe(group))
        for entry in summarize(row for members in providers.values() for row in members):
            name, worst = entry["provider"], entry["worst_shape"]
            total = f"{1e3 * entry['total_ms']:.1f} us" if entry["total_ms"] else "-"
            ratio = f"{entry['geomean_ratio']:.2f}" if entry["geomean_ratio"] else "-"
            shape = f"{'x'.join(map(str, worst))} {entry['worst_ratio']:.2f}" if worst else "-"
            over = sorted((r.speedup[name], r.shape) for r in providers[first] if name in r.speedup)
            text = f"{'':>4}{name:<28} {total:>10} {ratio:>7} {shape:>24}"
            if over:
                (least, at), mean = over[0], _geomean((r.speedup[name], r.count) for r in providers[first] if name in
                                                      r.speedup)  # fmt: skip
                text += f"   {mean:.2f}x, least {least:.2f}x at {'x'.join(map(str, at))}"
            failed = f"   {entry['failed']} of {entry['cells']} failed" if entry["failed"] else ""
            lines.append(text + failed)
    lines += ["", *scatter(rows)]
    lines += dict.fromkeys(f"{row.provider}: {row.error}" for row in rows if row.error)
    return "\n".join(lines)


def spread_of_runs(row: Row) -> float | None:
    """How much slower the slowest of several whole runs was than the fastest, as a part of it."""
    return max(row.runs_ms) / min(row.runs_ms) - 1 if len(row.runs_ms) > 1 else None


def scatter(rows: Sequence[Row]) -> list[str]:
    """How far apart the figures lie that a row's median stands for."""
    ran = [row for row in rows if row.ms]
    after = [list(row.after_ms.values()) for row in ran if len(row.after_ms) > 1]
    kinds = {
        "between the quartiles of a row's samples lie": [(row.high_ms - row.low_ms) / row.ms for row in ran],
        "between a row's medians after this and after that provider": [max(some) / min(some) - 1 for some in after],
        "between a row's medians of several runs": [s for row in ran if (s := spread_of_runs(row)) is not None],
    }
    return [
        f"{what} {100 * statistics.median(spreads):.1f} %, at most {100 * max(spreads):.1f} %"
        for what, spreads in kinds.items()
        if spreads
    ]


def _line(shape: str, count: object, blocks: Sequence[str], speedups: Sequence[str]) -> str:
    return (
        f"{shape:>18} {count:>5}" + "".join(f" |{block}" for block in blocks) + "".join(f" |{s:>11}" for s in speedups)
    )


def _block(values: Sequence[float | None]) -> str:
    return "".join(
        f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"
        for value, (_, width, digits, _) in zip(values, _COLUMNS, strict=True)
    )


def _worst(entry: dict) -> str:
    ratio, shape = entry["worst_ratio"], entry["worst_shape"]
    return (
        _block([None, None, None, ratio]) if ratio is None else f"{'x'.join(map(str, shape))}{ratio:7.2f}".rjust(_WIDTH)
    )


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
