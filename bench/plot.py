"""`python bench/plot.py RESULT.json PICTURE.png`: a run at a glance, how near each provider comes to the copy rate, and
how much faster it is than torch. With --headline one panel: how much faster bnext is, by dtype, layout and epilogue."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker
from matplotlib.axes import Axes

from bench.measure import Row
from bench.report import describe, grouped, load, summarize
from bench.run import checked

BASELINE = "eager"
# bnext stands out; the others are told apart by lightness, so that grey print and any eye can read them.
_COLORS = {"bnext": "#d1495b", "eager": "#9aa5b1", "native": "#c8d0d8", "compile": "#5b6b7b", "apex": "#37424d"}
_MORE = ("#edae49", "#00798c", "#66a182", "#2e4057")


def draw(rows: Sequence[Row], environment: dict, path: Path) -> None:
    """A PNG with a line of panels for each dtype, layout, epilogue and number of threads. Bars are whole
    suites, whiskers their best and worst layers."""
    panels: dict[str, list[Row]] = {}
    for group, providers in grouped(rows).items():
        title = describe(group, without="phase")
        panels.setdefault(title, []).extend(row for members in providers.values() for row in members)
    names = list(dict.fromkeys(row.provider for row in rows))
    more = iter(_MORE * len(names))
    colors = {name: _COLORS.get(name) or next(more) for name in names}

    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(13, 1.1 + 2.9 * len(panels)), squeeze=False, layout="constrained"
    )
    for (left, right), (title, members) in zip(axes, panels.items(), strict=True):
        _bars(left, [row for row in members if row.bytes], names, colors, _roofline)
        left.set_title(title, loc="left", fontsize=10, fontweight="bold")
        left.set_ylabel("% of the copy rate")
        left.axhline(100, color="black", linewidth=1)
        left.set_ylim(0, max(108, left.get_ylim()[1]))
        right.set_yscale("log", base=2)
        _bars(right, members, [name for name in names if name != BASELINE], colors, _speedup, bottom=1)
        right.set_ylabel(f"times as fast as {BASELINE}")
        right.axhline(1, color="black", linewidth=1)
        low, high = right.get_ylim()
        right.set_ylim(min(0.5, low / 1.1), max(2, high * 1.2))
        right.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    about = [environment["hardware"], f"torch {environment['torch']}", environment["date"][:10]]
    if environment["device"] == "cpu" and environment.get("caches") == "cold":
        about.append("caches emptied before each call")
    figure.suptitle(", ".join(about), x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _roofline(entry: dict, rows: list[Row]) -> tuple[float | None, list[float]]:
    total = entry["total_ms"] and 100 * entry["total_floor_ms"] / entry["total_ms"]
    return total, [row.copy_percent for row in rows if row.copy_percent]


def _speedup(entry: dict, rows: list[Row]) -> tuple[float | None, list[float]]:
    return entry["total_speedup"].get(BASELINE), [row.speedup[BASELINE] for row in rows if BASELINE in row.speedup]


def _bars(
    axes: Axes, rows: list[Row], names: list[str], colors: dict[str, str], value: Callable, bottom: float = 0
) -> None:
    phases = list(dict.fromkeys(row.phase for row in rows))
    width = 0.8 / max(1, len(names))
    for entry in summarize(rows):
        name, phase = entry["provider"], entry["phase"]
        if name not in names:
            continue
        x = phases.index(phase) + (names.index(name) - (len(names) - 1) / 2) * width
        height, cells = value(entry, [row for row in rows if (row.provider, row.phase) == (name, phase)])
        if height is None:
            axes.annotate("no figure", (x, bottom), (0, 3), textcoords="offset points", ha="center", va="bottom",
                          rotation=90, fontsize=7, color=colors[name])  # fmt: skip
            continue
        axes.bar(x, height - bottom, width * 0.94, bottom=bottom, color=colors[name])
        if len(cells) > 1:
            axes.vlines(x, min(cells), max(cells), color="black", linewidth=0.8, alpha=0.6)
        text, up = f"{height:.0f}" if height >= 10 else f"{height:.2g}", height >= bottom
        axes.annotate(text, (x, height), (2, 1 if up else -1), textcoords="offset points", ha="left",
                      va="bottom" if up else "top", fontsize=7)  # fmt: skip
    axes.set_xticks(range(len(phases)), phases)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


#: What is fused, as a front page says it.
_HEADLINES = {"none": ("BN", "#e8a0a8"), "relu": ("BN + ReLU", "#d1495b"), "add_relu": ("BN + add + ReLU", "#8f2c3b")}


def headline(rows: Sequence[Row], environment: dict, path: Path) -> None:
    """Sums over a network's layers, forward and backward in training: how many times as fast as eager bnext is, in
    float32 and bfloat16, both layouts, by what is fused. On a CPU with all threads that were measured."""
    threads = max((row.threads or 0 for row in rows), default=0) or None
    training = [row for row in rows if row.threads == threads and row.phase in ("forward", "backward")]
    ms: dict[tuple[str, str, str], dict[str, list[float | None]]] = {}
    for entry in summarize(training):
        if entry["dtype"] in ("float32", "bfloat16") and entry["epilogue"] in _HEADLINES:
            of_bar = ms.setdefault((entry["dtype"], entry["layout"], entry["epilogue"]), {})
            of_bar.setdefault(entry["provider"], []).append(entry["total_ms"])
    bars = {
        bar: sum(times[BASELINE]) / sum(times["bnext"])
        for bar, times in ms.items()
        if all(len(times.get(name, [])) == 2 and all(times[name]) for name in ("bnext", BASELINE))
    }
    groups = list(dict.fromkeys(bar[:2] for bar in bars))
    if not groups:
        raise ValueError(f"no float32 or bfloat16 rows of bnext and {BASELINE}, forward and backward")
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    fused = [name for name in _HEADLINES if any(bar[2] == name for bar in bars)]
    width = 0.76 / len(fused)
    for i, name in enumerate(fused):
        there = [x for x, group in enumerate(groups) if (*group, name) in bars]
        label, color = _HEADLINES[name]
        drawn = axes.bar(
            [x + (i - (len(fused) - 1) / 2) * width for x in there],
            [bars[(*groups[x], name)] for x in there],
            0.95 * width,
            color=color,
            label=label,
        )
        axes.bar_label(drawn, fmt="%.1f", fontsize=13, padding=2)
    axes.axhline(1, color="black", linewidth=1.2)
    axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups], fontsize=13)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel(f"times as fast as torch {BASELINE}", fontsize=13)
    axes.set_ylim(0, 1.2 * max(*bars.values(), 1))
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    suite, batch = training[0].suite, training[0].batch
    what = [f"{suite}, N = {batch}" if batch else suite, "forward + backward", environment["hardware"]]
    what += [f"{threads} threads"] if threads else []
    axes.set_title(", ".join([*what, f"torch {environment['torch'].split('+')[0]}"]), loc="left", fontsize=13)
    axes.legend(frameon=False, fontsize=13, loc="upper right", ncols=len(fused))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=checked(load), help="what bench/run.py --json wrote")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--headline", action="store_true", help="one panel, to be read at a width of 800 pixels")
    args = parser.parse_args(argv)
    content, rows = args.result
    try:
        (headline if args.headline else draw)(rows, content["environment"], args.picture)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
