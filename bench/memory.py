"""`python bench/memory.py`: what training steps of whole networks keep for the backward, their peak, and their time,
with torch.nn, torch's checkpointing, bnext, and bnext under `bnext.recompute()`.

Bytes are those of the allocator, and exact: of all that is allocated during a step, what is left after the forward and
what was there at most. Parameters, and the gradients of the step before, are not among them; `batch` says how many
images fit in --gib with those and one optimizer state. Times are medians of interleaved steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
WAYS = ("torch", "checkpoint", "bnext", "recompute")
LABELS = {
    "torch": "torch.nn",
    "checkpoint": "torch.nn, checkpoint for each block",
    "bnext": "bnext, fused",
    "recompute": "bnext, fused, recompute",
}


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


def variants(model: nn.Module) -> dict[str, nn.Module]:
    fused = bnext.fuse(copy.deepcopy(model))
    made = {
        "torch": copy.deepcopy(model),
        "checkpoint": checkpointed(copy.deepcopy(model)),
        "bnext": fused,
        "recompute": bnext.recompute(copy.deepcopy(fused)),
    }
    return {name: made[name] for name in WAYS}


def step(model: nn.Module, x: Tensor, between: Callable[[], object] = lambda: None) -> None:
    loss = model(x).float().square().mean()
    between()
    loss.backward()
    for p in model.parameters():
        p.grad = None


def allocated(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes after the forward, and at most."""
    step(model, x)  # what is allocated once
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, after = torch.cuda.memory_allocated(), []
        step(model, x, lambda: after.append(torch.cuda.memory_allocated()))
        return after[0] - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, x, lambda: record_function("between").__enter__().__exit__(None, None, None))
    events: list[Any] = profiler.profiler.kineto_results.events()
    (between,) = (e.start_ns() for e in events if e.name() == "between")
    now = kept = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        if event.start_ns() < between:
            kept = now
    return kept, peak


def seconds(models: dict[str, nn.Module], x: Tensor, steps: int) -> dict[str, list[float]]:
    """Of each step, in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for i in range(steps + 1):
        order = order[1:] + order[:1]
        for name in order:
            start = time.perf_counter()
            step(models[name], x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(name: str, batch: int, steps: int, device: str, gib: float) -> list[dict[str, Any]]:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    models = {way: model.to(device) for way, model in variants(make()).items()}
    x = torch.randn(batch, 3, size, size, device=device)
    rows = []
    for way, model in models.items():
        (kept, peak), (_, half) = allocated(model, x), allocated(model, x[: batch // 2])
        state = 3 * sum(p.nbytes for p in model.parameters())  # parameters, gradients, momentum
        each = (peak - half) / (batch - batch // 2)
        fits = int((gib * 2**30 - state - (peak - each * batch)) / (each + x[0].nbytes))
        rows.append({"network": name, "way": way, "batch": batch, "kept": kept, "peak": peak, "fits": fits})
    for row, times in zip(rows, seconds(models, x, steps).values(), strict=True):
        row["seconds"] = median(times)
        row["fastest"], row["slowest"] = min(times), max(times)
    return rows


def table(rows: list[dict[str, Any]], gib: float) -> str:
    """Markdown; ratios are those to bnext without recompute."""
    lines = [
        f"| network | batch | | kept | peak | s a step | images in {gib:g} GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (base,) = (r for r in rows if r["network"] == row["network"] and r["way"] == "bnext")
        cells = [row["network"], str(row["batch"])] if row["way"] == WAYS[0] else ["", ""]
        cells.append(LABELS[row["way"]])
        for key, text in (("kept", "{:.0f} MB"), ("peak", "{:.0f} MB"), ("seconds", "{:.3f}")):
            value = row[key] / 1e6 if key != "seconds" else row[key]
            cells.append(text.format(value) + (f" ({row[key] / base[key]:.2f})" if row is not base else ""))
        lines.append(f"| {' | '.join(cells)} | {row['fits']} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"torch": "#9aa5b1", "checkpoint": "#5b6b7b", "bnext": "#edae49", "recompute": "#d1495b"}
    rows = result["rows"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = pyplot.subplots(1, len(networks), figsize=(2.1 * len(networks), 3.6), layout="constrained")
    for axis, network in zip(axes, networks, strict=True):
        members = {row["way"]: row for row in rows if row["network"] == network}
        for i, (way, row) in enumerate(members.items()):
            axis.bar(i, row["fits"], color=colors[way], width=0.8)
            fits = f"{row['fits']}" if row["fits"] < 10_000 else f"{row['fits'] // 1000}k"
            axis.annotate(fits, (i, row["fits"]), ha="center", va="bottom", fontsize=8)
            pace = f"{row['seconds'] / members['bnext']['seconds']:.2f}"
            axis.annotate(pace, (i, 0), (0, 4), textcoords="offset points", ha="center", fontsize=7, color="white")
        axis.set_title(network, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylim(0, 1.12 * max(row["fits"] for row in members.values()))
        for side in ("top", "left", "right"):
            axis.spines[side].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[way]) for way in WAYS]
    figure.legend(handles, [LABELS[way] for way in WAYS], loc="outside lower center", ncols=len(WAYS), frameon=False)
    title = (
        f"Images in a batch that fits {result['environment']['gib']:g} GiB, float32, with gradients and one optimizer "
        "state; in white: time of a step over that of bnext, fused"
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma-separated")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (LeNet takes 32 times as many)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps each")
    parser.add_argument("--gib", type=float, default=16, help="memory for `batch`")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    networks = args.networks.split(",")
    unknown = [name for name in networks if name not in NETWORKS]
    if unknown:
        parser.error(f"--networks should be of {', '.join(NETWORKS)}, not {', '.join(unknown)}")
    if args.batch < 2:
        parser.error(f"--batch should be at least 2, not {args.batch}")
    torch.set_num_threads(args.threads)
    rows = []
    for name in networks:
        print(f"{name} ...", file=sys.stderr, flush=True)
        batch = args.batch * (32 if name == "lenet" else 1)
        rows += measure(name, batch, args.steps, args.device, args.gib)
    environment = {**report.environment(args.device), "threads": args.threads, "gib": args.gib}
    result = {"command": " ".join(["python bench/memory.py", *sys.argv[1:]]), "environment": environment, "rows": rows}
    print(table(rows, args.gib))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        draw(result, args.plot)


if __name__ == "__main__":
    main()
