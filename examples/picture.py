"""The picture of `examples/compare.py`: six panels, each with what it shows for a title."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

if TYPE_CHECKING:
    from examples.compare import Points, Results

# torch's line is broad and pale, so that bnext's, which lie on it, leave it visible.
STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "#8d99a6", "linewidth": 2},
    "torch": {"color": "#edae49", "linewidth": 7, "alpha": 0.55, "solid_capstyle": "round"},
    "bnext": {"color": "#d1495b", "linewidth": 2},
    "bnext fused": {"color": "#00525f", "linewidth": 2, "linestyle": (0, (1, 1.6))},
}
LABELS = {"none": "without normalization", "torch": "torch.nn", "bnext": "bnext", "bnext fused": "bnext, fused"}
#: How one network is evaluated: no network's colours.
RUNNING, BATCH, UPDATED = "#8e44ad", "#d9822b", "#2e8b57"
#: A bar of bnext whose statistics are of two images.
FAINT = "#ecb1b8"
INK, PALE = "#22303c", "#e3e8ec"


def draw(results: Results, heading: str, path: Path) -> None:
    """Writes a PNG."""
    style: Any = {"font.size": 10.5, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    style |= {"axes.edgecolor": "#b5bfc8", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with pyplot.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.14, wspace=0.03, hspace=0.06, rect=(0, 0, 1, 0.9))
        figure, axes = pyplot.subplots(2, 3, figsize=(15.5, 9), layout=layout)
        sweep = f"test accuracy after {results.experiment.sweep_epochs} epochs"
        _losses(axes[0, 0], results)
        _accuracies(axes[0, 1], results)
        _sweep(axes[0, 2], results.rates, sweep, "Higher learning rates converge", "learning rate")
        _sweep(axes[1, 0], results.scales, sweep, "Initial weights matter less", "initial weights, times PyTorch's")
        _evaluation(axes[1, 1], results)
        _small(axes[1, 2], results)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.text(0.012, 0.955, "What batch normalization changes", fontsize=20, fontweight="bold")
        figure.text(0.012, 0.922, heading, fontsize=11.5, color="#5b6b7b")
        figure.legend(
            handles, names, loc="upper right", bbox_to_anchor=(0.99, 0.985), ncols=4, frameon=False, fontsize=12.5
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")
        pyplot.close(figure)


def _frame(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=PALE)


def _percent(axes: Axes, low: float = 0) -> None:
    axes.set_ylim(low, 103)
    axes.yaxis.set_major_formatter(ticker.PercentFormatter())


def _losses(axes: Axes, results: Results) -> None:
    for name, run in results.runs.items():
        thin = {"linewidth": STYLES[name]["linewidth"] * 0.8}
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=LABELS[name], **STYLES[name] | thin)
    axes.set_yscale("log")
    _frame(axes, "bnext's loss falls like torch.nn's", "step", "training loss")


def _accuracies(axes: Axes, results: Results) -> None:
    for name, run in results.runs.items():
        epochs = range(1, len(run.epochs) + 1)
        axes.plot(epochs, [100 * epoch.test_accuracy for epoch in run.epochs], **STYLES[name])
    axes.axhline(90, color=INK, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    _percent(axes)
    title = "Fewer epochs to 90 %" if results.faster else "Accuracy while training"
    _frame(axes, title, "epoch", "test accuracy")


def _sweep(axes: Axes, found: dict[str, Points], y: str, title: str, x: str) -> None:
    for name, points in found.items():
        values, accuracies = zip(*points, strict=True)
        axes.plot(values, [100 * a for a in accuracies], **STYLES[name], marker="o", markersize=7)
    axes.set_xscale("log")
    _percent(axes)
    _frame(axes, title, x, y)


def _evaluation(axes: Axes, results: Results) -> None:
    lines: dict[str, tuple[list[float], dict[str, Any]]] = {
        "by the running averages: eval()": (results.evaluation.running, {"color": RUNNING, "linestyle": "-"}),
        "by each batch: train()": (results.evaluation.batch, {"color": BATCH, "linestyle": "-"}),
        "by bnext.update_statistics, then eval()": (
            results.evaluation.updated,
            {"color": UPDATED, "linestyle": "--"},
        ),
    }
    for label, (accuracies, style) in lines.items():
        values = [100 * accuracy for accuracy in accuracies]
        axes.plot(range(1, len(values) + 1), values, label=label, linewidth=2, marker="o", markersize=5, **style)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    _percent(axes)
    axes.legend(loc="lower right", frameon=False)
    _frame(axes, "Running averages lag at first", "epoch", "test accuracy of one network")


def _small(axes: Axes, results: Results) -> None:
    values = [100 * accuracy for accuracy in results.small.values()]
    colors = [FAINT if re.search(r"\bof 2\b", name) else STYLES["bnext"]["color"] for name in results.small]
    hatches = ["//" if "simulated" in name else "" for name in results.small]
    bars = axes.barh(list(results.small), values, color=colors, hatch=hatches, edgecolor="white", height=0.62)
    axes.bar_label(bars, [f"{value:.1f} %" for value in values], padding=5, fontweight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 118)
    axes.xaxis.set_major_locator(ticker.MultipleLocator(25))
    axes.xaxis.set_major_formatter(ticker.PercentFormatter())
    axes.tick_params(axis="y", length=0)
    _frame(
        axes,
        "Two images are too few",
        f"test accuracy after {results.experiment.small_epochs} epochs",
        "",
    )
    axes.grid(visible=False, axis="y")
