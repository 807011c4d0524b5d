"""`python docs/pictures.py [FOLDER]`: draws the pictures of docs/tutorial.md into docs/pictures/, and prints the
figures that the page takes from them. Half a minute on one core; the same machine draws the same bytes."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import bnext
from bench.plot import _COLORS, _MORE

RED, GREY, DARK = _COLORS["bnext"], _COLORS["eager"], _COLORS["apex"]
PALE, YELLOW, BLUE = _COLORS["native"], _MORE[0], _MORE[1]
TINTS = {RED: "#f6d9dc", YELLOW: "#fbe9cb", BLUE: "#cce4e7", GREY: "#e6e9ed"}


# Which values share a mean: golden values A and B of tests/test_golden.py, and C.

A = np.array([[1, 3, 2, 4], [2, 2, 1, 1], [6, 2, 4, 1]])
B = np.array([[[1, 3], [2, 4]], [[2, 2], [1, 1]], [[6, 2], [4, 1]]])
C = np.array(
    [
        [[[3, 4], [1, 2]], [[3, 3], [1, 2]], [[4, 1], [4, 1]]],
        [[[2, 2], [1, 4]], [[3, 3], [1, 4]], [[2, 1], [2, 3]]],
        [[[4, 2], [4, 1]], [[1, 1], [2, 1]], [[3, 2], [2, 4]]],
    ]
)


def shapes() -> Figure:
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    left = 0.0
    for x, name, count in ((A, "(N, C)", "N"), (B, "(N, C, L)", "N·L"), (C, "(N, C, H, W)", "N·H·W")):
        left = _batch(axes, left, x, name, count) + 0.85
    for n in range(3):
        axes.text(-0.35, -ROW * n, f"n = {n}", ha="right", va="center", fontsize=11, color=DARK)
    for y, text in zip(FOOT, ("mean", "variance", "values"), strict=True):
        axes.text(-0.35, y, text, ha="right", va="center", fontsize=11, color=DARK)
    axes.set_xlim(-1.75, left - 0.8)
    axes.set_ylim(FOOT[-1] - 0.25, 1.65)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


ROW, FOOT = 1.35, (-3.65, -4.1, -4.55)


def _batch(axes: Axes, left: float, x: np.ndarray, name: str, count: str) -> float:
    """A tile for each example and channel. Returns where it ends."""
    n, channels = x.shape[:2]
    tiles = x.reshape(n, channels, -1, x.shape[-1]) if x.ndim > 2 else x[:, :, None, None]
    height, width = tiles.shape[2:]
    cell, gap = 0.56, (0.5 if x.ndim == 2 else 0.3)
    step = width * cell + gap
    right = left + channels * step - gap
    axes.text((left + right) / 2, 1.45, name, ha="center", va="center", fontsize=13, fontweight="bold", color=DARK)
    for c in range(channels):
        color, fill = (RED, TINTS[RED]) if c == 0 else (GREY, "#f3f5f7")
        for i in range(n):
            for (h, w), value in np.ndenumerate(tiles[i, c]):
                corner = (left + c * step + w * cell, -ROW * i + (height / 2 - h - 1) * cell)
                axes.add_patch(Rectangle(corner, cell, cell, facecolor=fill, edgecolor=color, linewidth=1))
                axes.text(corner[0] + cell / 2, corner[1] + cell / 2, value, ha="center", va="center_baseline",
                          fontsize=11, color=DARK)  # fmt: skip
        middle, color = left + c * step + width * cell / 2, RED if c == 0 else DARK
        for y, text in zip((0.88, *FOOT), (f"c = {c}", f"{x[:, c].mean():.2f}", f"{x[:, c].var():.2f}"), strict=False):
            axes.text(middle, y, text, ha="center", va="center", fontsize=10.5, color=color)
    axes.text((left + right) / 2, FOOT[-1], f"m = {count} = {x[:, 0].size}", ha="center", va="center", fontsize=11,
              color=DARK)  # fmt: skip
    return right


# Training with and without batch normalization.

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
SCALES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
SEEDS, EPOCHS, TRAINED_ON = (0, 1, 2), 10, 1408


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits of 8x8, standardized as a whole, in an order of ours."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, target = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    return (x - x[:TRAINED_ON].mean()) / x[:TRAINED_ON].std(), target


def network(normalized: bool, scale: float) -> nn.Sequential:
    """Six layers of 64 and a classifier. Weights are `scale` times He et al.'s (arXiv:1502.01852)."""
    layers: list[nn.Module] = []
    for _ in range(6):
        linear = nn.Linear(64, 64, bias=not normalized)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        linear.weight.data *= scale
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        layers += [linear, bnext.BatchNorm1d(64, activation="relu") if normalized else nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def train(normalized: bool, rate: float, scale: float, seed: int) -> tuple[list[float], float]:
    """The mean loss in each epoch, and the share of held-out digits that are recognised in the end."""
    torch.manual_seed(seed)
    x, target = digits()
    model = network(normalized, scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for _ in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(TRAINED_ON).split(64):
            loss = F.cross_entropy(model(x[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / TRAINED_ON)
    right = model.eval()(x[TRAINED_ON:]).argmax(1) == target[TRAINED_ON:]
    return losses, right.float().mean().item()


def training() -> Figure:
    figure, (curves, rates, scales) = pyplot.subplots(1, 3, figsize=(8, 3.5), layout="constrained")
    names = {True: "with batch norm", False: "without"}
    print(f"accuracy on {1797 - TRAINED_ON} held-out digits, the median of {len(SEEDS)} seeds")
    for normalized, color in ((False, DARK), (True, RED)):
        for rate, style in ((0.1, "--"), (1, "-")):
            losses, _ = train(normalized, rate, 1, 0)
            print(f"{names[normalized]:15}  rate {rate:<4g}  losses {' '.join(f'{loss:.2f}' for loss in losses)}")
            curves.plot(range(1, EPOCHS + 1), losses, style, color=color, linewidth=2)
        for axes, values, varied in ((rates, RATES, "rate"), (scales, SCALES, "scale")):
            runs = [
                [train(normalized, v if varied == "rate" else 0.1, v if varied == "scale" else 1, s)[1] for s in SEEDS]
                for v in values
            ]
            axes.fill_between(values, np.min(runs, 1), np.max(runs, 1), color=color, alpha=0.15, linewidth=0)
            axes.plot(values, np.median(runs, 1), "o-", color=color, linewidth=2, markersize=4.5)
            shown = "  ".join(f"{v:g}: {m:.2f}" for v, m in zip(values, np.median(runs, 1), strict=True))
            print(f"{names[normalized]:15}  by {varied:5}  {shown}")
    curves.set_yscale("log")
    curves.set_xticks((1, 4, 7, 10))
    curves.set_yticks((0.03, 0.1, 0.3, 1, 3), ("0.03", "0.1", "0.3", "1", "3"))
    curves.minorticks_off()
    curves.set_title("training loss", fontsize=11, loc="left")
    curves.set_xlabel("epoch", fontsize=11)
    for style, text in (("-", "learning rate 1"), ("--", "learning rate 0.1")):
        curves.plot([], [], style, color=GREY, linewidth=2, label=text)
    curves.legend(frameon=False, fontsize=9, loc="lower left", handlelength=1.8, borderaxespad=0)
    for axes, title, label in (
        (rates, "accuracy by learning rate", "learning rate"),
        (scales, "accuracy by initial scale", "scale of the initial weights"),
    ):
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(label, fontsize=11)
        axes.set_title(title, fontsize=11, loc="left")
        axes.minorticks_off()
    rates.set_xticks((0.01, 0.1, 1, 10), ("0.01", "0.1", "1", "10"))
    scales.set_xticks((0.01, 0.1, 1, 10), ("0.01", "0.1", "1", "10"))
    for axes in (curves, rates, scales):
        _plain(axes)
    handles = [pyplot.Line2D([], [], color=color, linewidth=2.5) for color in (RED, DARK)]
    figure.legend(handles, names.values(), loc="outside upper center", ncols=2, frameon=False, fontsize=12)
    return figure


# What is lost by subtracting two large sums.


def welford(x: np.ndarray) -> np.ndarray:
    """The biased variance of each column, one row after the other, in the type of `x`."""
    mean, squares = np.zeros_like(x[0]), np.zeros_like(x[0])
    for k, row in enumerate(x, start=1):
        d = row - mean
        mean += d / x.dtype.type(k)
        squares += d * (row - mean)
    return squares / x.dtype.type(len(x))


def one_pass(x: np.ndarray) -> np.ndarray:
    return np.square(x).mean(0) - np.square(x.mean(0))


def by_bnext(x: np.ndarray) -> np.ndarray:
    """momentum=1 leaves the batch's own statistics in the buffers."""
    layer = bnext.BatchNorm1d(x.shape[1], momentum=1.0, unbiased=False)
    layer(torch.from_numpy(x))
    assert layer.running_var is not None
    return layer.running_var.numpy()


METHODS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "E[x²] − E[x]²": (DARK, one_pass),
    "Welford, value by value": (BLUE, welford),
    "bnext": (RED, by_bnext),
}


def cancellation() -> Figure:
    figure, axes = pyplot.subplots(figsize=(8, 3.7), layout="constrained")
    ratios = np.logspace(0, 5, 21)
    deviates = np.random.default_rng(0).standard_normal((4096, 32))
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for ratio in ratios:
        x = (deviates + ratio).astype(np.float32)
        exact = x.astype(np.float64).var(0)
        for name, (_, method) in METHODS.items():
            found[name].append(float((np.abs(method(x) - exact) / exact).max()))
    print("largest relative error of the variance, by mean / deviation")
    for name, errors in found.items():
        axes.loglog(ratios, errors, "o-", color=METHODS[name][0], linewidth=2, markersize=4)
        print(f"{name:24}", "  ".join(f"1e{i}: {errors[4 * i]:.1e}" for i in range(6)))
    for name, at, offset in (
        ("E[x²] − E[x]²", 14, (-8, 5)),
        ("Welford, value by value", 14, (-4, 9)),
        ("bnext", 16, (0, 9)),
    ):
        axes.annotate(name, (ratios[at], found[name][at]), offset, textcoords="offset points", ha="right", fontsize=12,
                      color=METHODS[name][0])  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=1)
    axes.annotate(
        "no digit is right", (1, 1), (2, 4), textcoords="offset points", fontsize=10, color=_COLORS["compile"]
    )
    axes.set_xlabel("mean / deviation", fontsize=12)
    axes.set_ylabel("relative error", fontsize=12)
    axes.set_title("Variance of 4096 values in float32, the worst of 32 channels", fontsize=12, loc="left", color=DARK)
    axes.minorticks_off()
    _plain(axes)
    return figure


# How channels lie in memory, and who reads them.


def layouts() -> Figure:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    n, channels, pixels = 2, 4, 4
    colors = (RED, YELLOW, BLUE, GREY)
    planar = [(i, c) for i in range(n) for c in range(channels) for _ in range(pixels)]
    interleaved = [(i, c) for i in range(n) for _ in range(pixels) for c in range(channels)]
    for y, order, title in (
        (4.0, planar, "planar (NCHW): a vector of 16 bytes holds 4 pixels of one channel"),
        (0.0, interleaved, "interleaved (channels_last): a vector holds 4 channels of one pixel"),
    ):
        axes.text(0, y + 1.5, title, fontsize=12, color=DARK, fontweight="bold")
        for k, (_, c) in enumerate(order):
            axes.add_patch(Rectangle((k, y), 1, 0.8, facecolor=colors[c], edgecolor="white", linewidth=1))
        for k in range(0, len(order), 4):
            axes.add_patch(Rectangle((k, y), 4, 0.8, fill=False, edgecolor=DARK, linewidth=1.4))
        for i in range(n):
            axes.annotate("", (16 * i + 0.05, y + 1.0), (16 * i + 15.95, y + 1.0),
                          arrowprops={"arrowstyle": "<->", "color": DARK, "linewidth": 0.8})  # fmt: skip
            axes.text(16 * i + 8, y + 1.0, f" image {i} ", ha="center", va="center", fontsize=10, color=DARK,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0})  # fmt: skip
    for c in range(channels):
        _block(axes, 8 * c + 4, 2.5, f"block {c}: channel {c}", colors[c])
        for i in range(n):
            axes.plot((16 * i + 4 * c + 2, 8 * c + 4), (3.95, 3.1), color=colors[c], linewidth=1.6)
    for b in range(2):
        _block(axes, 16 * b + 8, -1.5, f"block {b}: pixels {4 * b} to {4 * b + 3}, all channels", DARK)
        for k in range(4):
            axes.plot((16 * b + 4 * k + 2, 16 * b + 8), (-0.05, -0.9), color=DARK, linewidth=1.2)
    axes.annotate("", (14.4, -1.2), (17.6, -1.2), arrowprops={"arrowstyle": "<->", "color": DARK, "linewidth": 1.6})
    axes.text(16, -1.08, "merge", ha="center", va="bottom", fontsize=10, color=DARK)
    axes.set_xlim(-0.1, 32.1)
    axes.set_ylim(-1.6, 6.0)
    axes.axis("off")
    return figure


def _block(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    width = 6.8 if color != DARK else 12.8
    axes.add_patch(Rectangle((x - width / 2, y), width, 0.6, facecolor=TINTS.get(color, "#eceff2"), edgecolor=color,
                             linewidth=1.4))  # fmt: skip
    axes.text(x, y + 0.3, text, ha="center", va="center", fontsize=10.5, color=DARK)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)


PICTURES: dict[str, Callable[[], Figure]] = {
    "shapes.png": shapes,
    "training.png": training,
    "cancellation.png": cancellation,
    "layouts.png": layouts,
}


def _write(figure: Figure, path: Path) -> None:
    """In 64 colours, which is a third of the bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=160)
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "pictures")
    parser.add_argument("--only", choices=PICTURES, help="one picture")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        if args.only in (None, name):
            figure = draw()
            _write(figure, args.folder / name)
            pyplot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
