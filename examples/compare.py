"""Trains a network without batch normalization, with torch.nn's, with bnext's, and with bnext's fused, from the same
weights over the same batches; and looks at what batch normalization changes: learning rates, initial weights,
evaluation, small batches. Prints a table and draws a picture.

    python -m examples.compare
    python -m examples.compare --model densenet --size 32 --epochs 3 --sweep-epochs 1
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import bnext
from examples.data import DATA, Data, load
from examples.networks import NETWORKS
from examples.training import OPTIMIZERS, Norm, Training, evaluate, prepare

#: The norm, and whether activations and sums are fused with it.
VARIANTS: dict[str, tuple[Norm, bool]] = {
    "none": ("none", False),
    "torch": ("torch", False),
    "bnext": ("bnext", False),
    "bnext fused": ("bnext", True),
}
#: Times the learning rate, and times the initial weights.
RATES = (0.3, 1, 3, 10, 30, 100, 300)
SCALES = (0.1, 0.3, 1, 3, 10)
#: Processes with two images each.
PROCESSES = 2

Points = list[tuple[float, float]]  # what was varied, and the accuracy that came of it


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies after each epoch."""

    running: list[float]  # by the running averages, as eval() does
    batch: list[float]  # by each batch's own statistics, as train() does
    updated: list[float]  # by the statistics of the whole training set


@dataclass(frozen=True)
class Experiment:
    """What all runs have in common; a run may differ in what it passes to `training`."""

    model: str
    data: Data
    batch_size: int
    lr: float
    optimizer: str
    seed: int
    device: str
    epochs: int
    sweep_epochs: int  # of each run that is only a point

    @property
    def small_epochs(self) -> int:
        """Of runs with small batches, which take many steps."""
        return (self.sweep_epochs + 1) // 2

    def training(
        self, norm: Norm, *, fuse: bool = False, change: Callable[[nn.Module], Any] = lambda network: None, **more: Any
    ) -> Training:
        network = prepare(self.model, self.data, norm, fuse=fuse, seed=self.seed)
        change(network)
        common = {name: getattr(self, name) for name in ("batch_size", "lr", "optimizer", "seed", "device")}
        return Training(network, self.data, **(common | more))

    def accuracy(self, norm: Norm, **more: Any) -> float:
        training = self.training(norm, **more)
        training.train(self.sweep_epochs)
        return training.epochs[-1].test_accuracy

    def run(self) -> Results:
        runs = self.curves()
        return Results(
            self,
            runs,
            {name: self.kept(*variant) for name, variant in VARIANTS.items()},
            dict(self.rates()),
            dict(self.scales()),
            self.evaluation(),
            dict(self.small()),
        )

    def curves(self) -> dict[str, Training]:
        """The variants take turns, an epoch each, so that what else the machine does slows all of them down alike."""
        runs = {name: self.training(norm, fuse=fuse) for name, (norm, fuse) in VARIANTS.items()}
        for _ in shown(range(self.epochs), "four networks, epoch by epoch"):
            for run in runs.values():
                run.epoch()
        return runs

    def kept(self, norm: Norm, fuse: bool) -> bnext.footprint.Kept:
        training = self.training(norm, fuse=fuse)
        images, _ = training.data.train.batch(torch.arange(self.batch_size, device=self.device))
        return bnext.memory(training.network, images).total

    def rates(self) -> Iterator[tuple[str, Points]]:
        for norm in ("none", "bnext"):
            factors = shown(RATES, f"learning rates, {norm}")
            yield norm, [(self.lr * factor, self.accuracy(norm, lr=self.lr * factor)) for factor in factors]

    def scales(self) -> Iterator[tuple[str, Points]]:
        for norm in ("none", "bnext"):
            scales = shown(SCALES, f"initial weights, {norm}")
            yield (
                norm,
                [(scale, self.accuracy(norm, change=lambda n, s=scale: scale_weights(n, s))) for scale in scales],
            )

    def evaluation(self) -> Evaluation:
        training = self.training("bnext")
        found = Evaluation([], [], [])
        for _ in shown(range(self.sweep_epochs), "training and evaluation"):
            found.running.append(training.epoch().test_accuracy)
            found.batch.append(evaluate(training.network, training.data.test, by_batch=True)[1])
            updated = copy.deepcopy(training.network)
            bnext.update_statistics(updated, training.data.train.batches(500), progress=False)
            found.updated.append(evaluate(updated, training.data.test)[1])
        return found

    def small(self) -> Iterator[tuple[str, float]]:
        """Batches of two."""

        def accuracy(batch_size: int, ghost: int | None = None) -> float:
            training = self.training(
                "bnext", change=lambda n: ghost_batches(n, ghost), batch_size=batch_size, lr=self.lr_of(batch_size)
            )
            training.train(self.small_epochs)
            return training.epochs[-1].test_accuracy

        joined = 2 * PROCESSES
        runs: dict[str, Callable[[], float]] = {
            f"a batch of {self.batch_size}": lambda: accuracy(self.batch_size),
            "a batch of 2": lambda: accuracy(2),
            # By ghost batches of 2, which are what each process would have.
            f"{PROCESSES} processes, each\nwith a batch of 2\n(simulated)": lambda: accuracy(joined, 2),
            f"{PROCESSES} processes, with\nSyncBatchNorm": lambda: self.in_processes(joined),
            f"{self.batch_size} in ghost\nbatches of 16": lambda: accuracy(self.batch_size, 16),
        }
        for name, run in shown(list(runs.items()), "small batches"):
            yield name, run()

    def lr_of(self, batch_size: int) -> float:
        """A smaller batch takes more steps with noisier gradients: the rate goes with the root of its size."""
        return self.lr * (batch_size / self.batch_size) ** 0.5

    def in_processes(self, batch_size: int) -> float:
        """By the training program, as one starts it from the command line."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint.pt"
            options = {
                **{"model": self.model, "data": self.data.name, "size": self.data.train.size, "root": self.data.root},
                **{"batch-size": batch_size, "lr": self.lr_of(batch_size), "optimizer": self.optimizer},
                **{"epochs": self.small_epochs, "seed": self.seed, "device": "cpu", "checkpoint": checkpoint},
            }
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
            command += ["-m", "examples.train", *(f"--{name}={v}" for name, v in options.items() if v is not None)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            return torch.load(checkpoint, weights_only=True)["epochs"][-1]["test_accuracy"]


@dataclass(frozen=True)
class Results:
    experiment: Experiment
    runs: dict[str, Training]
    kept: dict[str, bnext.footprint.Kept]  # bytes, for the backward of one batch
    rates: dict[str, Points]
    scales: dict[str, Points]
    evaluation: Evaluation
    small: dict[str, float]  # test accuracy

    @property
    def faster(self) -> bool:
        """Whether 90 % take fewer epochs with batch normalization than without."""
        without, fewer = (epochs_to(self.runs[name], 0.9) for name in ("none", "bnext"))
        return fewer is not None and (without is None or fewer < without)


@torch.no_grad()
def scale_weights(network: nn.Module, factor: float) -> None:
    """The initial weights, of all that is no batch norm."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight *= factor


def ghost_batches(network: nn.Module, size: int | None) -> None:
    for layer in network.modules():
        if isinstance(layer, bnext.nn._BatchNorm):
            layer.ghost_batch_size = size


def shown(items: Sequence[Any], title: str) -> tqdm:
    return tqdm(items, desc=title, leave=False, file=sys.stderr)


def difference(runs: dict[str, Training], name: str, steps: int = 50) -> float:
    """The largest between the losses of a variant and those of torch.nn's, relative to these, in the first steps."""
    pairs = zip(runs[name].losses[:steps], runs["torch"].losses[:steps], strict=True)
    return max(abs(ours - theirs) / theirs for ours, theirs in pairs)


def epochs_to(run: Training, accuracy: float) -> int | None:
    return next((i for i, epoch in enumerate(run.epochs, 1) if epoch.test_accuracy >= accuracy), None)


def table(results: Results) -> str:
    lines = [
        f"{'':11}  {'test accuracy':>13}  {'90 % after':>10}  {'s/epoch':>8}  {'speed-up':>8}  "
        f"{'kept for backward':>17}  {'recomputing':>11}"
    ]
    seconds = {name: statistics.median(e.seconds for e in run.epochs) for name, run in results.runs.items()}
    for name, run in results.runs.items():
        reached = epochs_to(run, 0.9)
        kept = results.kept[name]
        recomputing = f"{kept.after / 1e6:.2f} MB" if VARIANTS[name][0] == "bnext" else "-"
        lines.append(
            f"{name:11}  {run.epochs[-1].test_accuracy:13.1%}  {f'{reached} epochs' if reached else 'never':>10}  "
            f"{seconds[name]:8.3f}  {seconds['torch'] / seconds[name]:7.2f}x  "
            f"{kept.before / 1e6:14.2f} MB  {recomputing:>11}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NETWORKS, default="lenet")
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--size", type=int, help="height and width of the inputs; default: 28 for lenet, 32 for others")
    parser.add_argument("--root", help="the folder of torchvision's data sets")
    parser.add_argument("--epochs", type=int, default=20, help="of the four curves")
    parser.add_argument("--sweep-epochs", type=int, default=6, help="of each run that is a point of the picture")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="default: build/compare-MODEL.png")
    options = parser.parse_args(arguments)
    from examples import picture  # matplotlib only now, so that a wrong option is said at once

    if options.model == "lenet":
        torch.set_num_threads(1)  # its layers are so small that waiting for a second thread takes longer
    size = options.size or (28 if options.model == "lenet" else 32)
    data = load(options.data, size, options.root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = {name: getattr(options, name) for name in ("model", "batch_size", "lr", "optimizer", "seed")}
    experiment = Experiment(
        data=data, device=device, epochs=options.epochs, sweep_epochs=options.sweep_epochs, **common
    )
    heading = (
        f"{options.model} on {data.name} ({len(data.train)} images of {size}), batches of {options.batch_size}, "
        f"{options.optimizer} at {options.lr:g}, {device}, torch {torch.__version__}"
    )
    print(heading)
    results = experiment.run()
    print(f"\n{table(results)}\n")
    for name in ("bnext", "bnext fused"):
        print(
            f"{name}: in the first 50 steps, losses differ from torch's by {difference(results.runs, name):.1e} at most"
        )
    path = options.picture or Path(f"build/compare-{options.model}.png")
    picture.draw(results, heading, path)
    print(f"picture: {path}")
    return results


if __name__ == "__main__":
    main()
