"""`python bench/model.py`: training steps of whole networks in several ways: how long they take, how much of that is
normalization, what they keep for the backward, and how many images would fit.

Times are medians of steps that the ways take in turn. Bytes are those of the allocator, and exact: of all that is
allocated during a step, what is left after the forward (`kept`) and what was there at most (`peak`). Parameters and
their gradients are not among them. `fits` is how many images a step of --gib could have besides parameters, gradients
and one optimizer state, by the peaks of two batches.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler has a line for each start and stop
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

import bnext
from bench import report
from bench.networks import NETWORKS, Dense, Inverted, Residual

BLOCKS = (Residual, Dense, Inverted)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def checkpointed(model: nn.Module) -> nn.Module:
    """Each block keeps its input alone; in the U-Net, each pair of convolutions; in LeNet, which has neither, its first
    half."""
    if isinstance(model, nn.Sequential) and not any(isinstance(child, BLOCKS) for child in model):
        half = len(model) // 2
        return nn.Sequential(Checkpointed(model[:half]), model[half:])
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BLOCKS) or (isinstance(module, nn.ModuleList) and isinstance(child, nn.Sequential)):
                setattr(module, name, Checkpointed(child))
    return model


class Way(NamedTuple):
    """How a network of torch.nn's layers is trained."""

    label: str
    prepare: Callable[[nn.Module], nn.Module]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


WAYS = {
    "torch": Way("torch.nn", lambda model: model),
    "checkpoint": Way("torch.nn, checkpoint for each block", checkpointed),
    "enable": Way("torch.nn under bnext.enable()", lambda model: model, bnext.enable),
    "convert": Way("bnext.convert", bnext.convert),
    "fuse": Way("bnext.fuse", bnext.fuse),
    "recompute": Way("bnext.fuse, bnext.recompute", lambda model: bnext.recompute(bnext.fuse(model))),
}


class Setting(NamedTuple):
    """What all ways of a table have in common."""

    network: str
    batch: int
    dtype: str = "float32"
    layout: str = "contiguous"
    compiled: bool = False


class Trainee:
    """A network trained in one way."""

    def __init__(self, setting: Setting, way: Way, device: str) -> None:
        make, self.size = NETWORKS[setting.network]
        self.setting, self.way, self.device = setting, way, device
        torch.manual_seed(0)
        model = way.prepare(make()).to(device)
        if setting.layout == "channels_last":
            model = cast(Any, model).to(memory_format=torch.channels_last)
        self.parameters = list(model.parameters())
        self.model: Callable[[Tensor], Tensor] = torch.compile(model) if setting.compiled else model

    def images(self, count: int) -> Tensor:
        x = torch.randn(count, 3, self.size, self.size, device=self.device)
        return x.to(memory_format=torch.channels_last) if self.setting.layout == "channels_last" else x

    def step(self, x: Tensor, between: Callable[[], object] = lambda: None) -> None:
        """Forward and backward; the optimizer's step would be the same for all."""
        mixed = torch.autocast(self.device, torch.bfloat16, enabled=self.setting.dtype == "bfloat16")
        with self.way.around():
            with mixed:
                loss = self.model(x).float().square().mean()
            between()
            loss.backward()
        for p in self.parameters:
            p.grad = None

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def allocated(one: Trainee, x: Tensor) -> tuple[int, int]:
    """Bytes after the forward, and at most."""
    one.step(x)  # what is allocated once
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, after = torch.cuda.memory_allocated(), []
        one.step(x, lambda: after.append(torch.cuda.memory_allocated()))
        return after[0] - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one.step(x, lambda: record_function("between").__enter__().__exit__(None, None, None))
    events: list[Any] = profiler.profiler.kineto_results.events()
    (between,) = (e.start_ns() for e in events if e.name() == "between")
    now = kept = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        if event.start_ns() < between:
            kept = now
    return kept, peak


#: Parts of the names of operators, or of kernels on a GPU, that normalize or apply an activation, forward and backward.
NORMALIZATION = ("batch_norm", "bnext::cuda", "relu", "hardtanh", "threshold", "clamp")


def share(one: Trainee, x: Tensor) -> float | None:
    """Of the time of operators, the part of normalization and activations; None where a compiler has joined them."""
    if one.setting.compiled:
        return None
    activities = [ProfilerActivity.CUDA if x.is_cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        one.step(x)
        one.synchronize()
    attribute = "self_device_time_total" if x.is_cuda else "self_cpu_time_total"
    rows = [(event.key, getattr(event, attribute)) for event in profiler.key_averages()]
    total = sum(time for _, time in rows)
    return sum(time for name, time in rows if any(part in name for part in NORMALIZATION)) / total


def seconds(trainees: Sequence[Trainee], batch: int, steps: int) -> list[list[float]]:
    """Of each step of each, in turn; one after the other goes first."""
    times: list[list[float]] = [[] for _ in trainees]
    x = trainees[0].images(batch)
    order = list(range(len(trainees)))
    for number in range(steps + 1):
        order = order[1:] + order[:1]
        for i in order:
            trainees[i].synchronize()
            start = time.perf_counter()
            trainees[i].step(x)
            trainees[i].synchronize()
            if number:
                times[i].append(time.perf_counter() - start)
    return times


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(setting: Setting, ways: Sequence[str], steps: int, device: str, gib: float) -> list[dict[str, Any]]:
    """A row for each way."""
    trainees = [Trainee(setting, WAYS[way], device) for way in ways]
    rows = []
    for way, one in zip(ways, trainees, strict=True):
        batch = setting.batch
        x = one.images(batch)
        (kept, peak), (_, half) = allocated(one, x), allocated(one, x[: batch // 2].clone())
        state = 3 * sum(p.nbytes for p in one.parameters)  # parameters, gradients, momentum
        each = (peak - half) / (batch - batch // 2)
        fits = int((gib * 2**30 - state - (peak - each * batch)) / (each + x[0].nbytes))
        rows.append(setting._asdict() | {"way": way, "kept": kept, "peak": peak, "fits": fits, "share": share(one, x)})
    for row, times in zip(rows, seconds(trainees, setting.batch, steps), strict=True):
        row["seconds"], row["fastest"], row["slowest"] = median(times), min(times), max(times)
    return rows


def tables(rows: Sequence[dict[str, Any]], gib: float) -> str:
    """Markdown, one for each setting; in brackets over the first way, times as fast."""
    groups: dict[Setting, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(Setting(*(row[field] for field in Setting._fields)), []).append(row)
    parts = []
    for s, members in groups.items():
        base = members[0]
        lines = [
            f"{s.network}, batch {s.batch}, {s.dtype}, {s.layout}{', compiled' if s.compiled else ''}",
            "",
            f"| | images/s | share of normalization | kept | peak | images in {gib:g} GiB |",
            "|---|---|---|---|---|---|",
        ]
        for row in members:
            speed = f"{s.batch / row['seconds']:.1f} ({base['seconds'] / row['seconds']:.2f}x)"
            part = "-" if row["share"] is None else f"{100 * row['share']:.0f} %"
            sizes = [f"{row[key] / 1e6:.0f} MB ({row[key] / base[key]:.2f})" for key in ("kept", "peak")]
            lines.append(f"| {' | '.join([WAYS[row['way']].label, speed, part, *sizes, str(row['fits'])])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


COLORS = {
    "torch": "#9aa5b1",
    "checkpoint": "#5b6b7b",
    "enable": "#66a182",
    "convert": "#00798c",
    "fuse": "#edae49",
    "recompute": "#d1495b",
}


def draw_one(rows: Sequence[dict[str, Any]], about: str, gib: float, path: Path) -> None:
    """Of one network: on the left, images a second; on the right, how many images fit."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 0.42 * len(rows) + 1.2), sharey=True, layout="constrained")
    speeds = [row["batch"] / row["seconds"] for row in rows]
    sides = (("images a second", speeds), (f"images that fit into {gib:g} GiB", [row["fits"] for row in rows]))
    for axis, (what, values) in zip(axes, sides, strict=True):
        axis.barh(range(len(rows)), values, color=[COLORS[row["way"]] for row in rows], height=0.75)
        for i, value in enumerate(values):
            times = f"   {value / values[0]:.2f}x" if i > 0 else ""
            axis.annotate(f" {value:.0f}{times}", (value, i), va="center", fontsize=9)
        axis.set_yticks(range(len(rows)), [WAYS[row["way"]].label for row in rows])
        axis.set_xticks([])
        axis.set_xlim(0, 1.45 * max(values))
        axis.tick_params(length=0)
        axis.set_title(what, fontsize=10, loc="left")
        for side in ("top", "right", "bottom", "left"):
            axis.spines[side].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(f"{rows[0]['network']}, training steps of {rows[0]['batch']} images ({about})", fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw(result: dict[str, Any], path: Path) -> None:
    """Above, how many times as fast as the first way; below, how many images fit. A column for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    environment, rows = result["environment"], result["rows"]
    threads = f", {environment['cores']} threads" if environment["device"] == "cpu" else ""
    about = f"{environment['hardware']}{threads}, {rows[0]['dtype']}, {rows[0]['layout']}"
    networks = list(dict.fromkeys(row["network"] for row in rows))
    if len(networks) == 1:
        draw_one(rows, about, environment["gib"], path)
        return
    ways = list(dict.fromkeys(row["way"] for row in rows))
    shape = (2.0 * len(networks) + 0.6, 5.2)
    figure, axes = pyplot.subplots(2, len(networks), figsize=shape, squeeze=False, layout="constrained")
    for column, network in enumerate(networks):
        members = [row for row in rows if row["network"] == network]
        speeds = [members[0]["seconds"] / row["seconds"] for row in members]
        fits = [row["fits"] for row in members]
        for axis, values in zip(axes[:, column], (speeds, fits), strict=True):
            for i, (row, value) in enumerate(zip(members, values, strict=True)):
                axis.bar(i, value, color=COLORS[row["way"]], width=0.8)
                text = f"{value:.2f}" if values is speeds else f"{value}" if value < 10_000 else f"{value // 1000}k"
                axis.annotate(text, (i, value), ha="center", va="bottom", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_ylim(0, 1.12 * max(values))
            for side in ("top", "left", "right"):
                axis.spines[side].set_visible(False)
        axes[0, column].set_title(network, fontsize=10)
    axes[0, 0].set_ylabel(f"times as fast as {WAYS[ways[0]].label}")
    axes[1, 0].set_ylabel("images that fit")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[way]) for way in ways]
    labels = [WAYS[way].label for way in ways]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(ways)), frameon=False)
    figure.suptitle(f"Training steps: {about}; images in {environment['gib']:g} GiB", fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"should be of {', '.join(allowed)}, not {name!r}")
        return found

    return parse


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=names(list(NETWORKS)), default=list(NETWORKS), help="comma-separated")
    parser.add_argument("--ways", type=names(list(WAYS)), default=list(WAYS), help="the first is the baseline")
    parser.add_argument(
        "--dtype", type=names(["float32", "bfloat16"]), default=["float32"], help="bfloat16 by autocast"
    )
    parser.add_argument("--layout", type=names(["contiguous", "channels_last"]), default=["contiguous"])
    parser.add_argument("--compile", action="store_true", help="the models, by torch.compile")
    parser.add_argument("--batch", type=int, default=8, help="images of a step; LeNet takes 32 times as many")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--gib", type=float, default=16, help="memory that images should fit")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG, for one dtype and layout")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="an earlier result, to plot")
    args = parser.parse_args(argv)
    if args.source:
        if not args.plot:
            parser.error("argument --from: should come with --plot")
        earlier = json.loads(args.source.read_text())
        print(tables(earlier["rows"], earlier["environment"]["gib"]))
        draw(earlier, args.plot)
        return
    if args.batch < 2:
        parser.error(f"argument --batch: should be at least 2, not {args.batch}")
    if args.plot and len(args.dtype) * len(args.layout) > 1:
        parser.error("argument --plot: should come with one --dtype and one --layout")
    torch.set_num_threads(args.threads)
    environment = {**report.environment(args.device), "gib": args.gib}
    result: dict[str, Any] = {"command": " ".join(["python bench/model.py", *argv]), "environment": environment}
    result["complete"] = False
    result["rows"] = rows = []
    settings = [
        Setting(network, args.batch * (32 if network == "lenet" else 1), dtype, layout, args.compile)
        for network, dtype, layout in itertools.product(args.networks, args.dtype, args.layout)
    ]
    try:
        for setting in settings:
            print(" ".join(map(str, setting)), file=sys.stderr, flush=True)
            rows += measure(setting, args.ways, args.steps, args.device, args.gib)
            result["complete"] = setting is settings[-1]
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    except KeyboardInterrupt:
        print("interrupted: here is what was measured", file=sys.stderr)
    print(tables(rows, args.gib))
    if args.plot and rows:
        draw(result, args.plot)
    if not result["complete"]:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
