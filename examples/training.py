"""Trains a network that classifies images: plain PyTorch, in which nothing knows of bnext but `prepare`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import bnext
from examples.data import Data, Images
from examples.networks import NETWORKS, without_norms
from examples.processes import DataParallel, part, processes, rank, synchronised

__all__ = ["Epoch", "Norm", "OPTIMIZERS", "Training", "evaluate", "prepare"]

Norm = Literal["bnext", "torch", "none"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr),
}


def prepare(
    model: str,
    data: Data,
    norm: Norm = "bnext",
    *,
    fuse: bool = False,
    recompute: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A new network of this name for `data`. Batch norms draw no random numbers: a seed gives all the same weights."""
    if model not in NETWORKS:
        raise ValueError(f"model should be one of {', '.join(NETWORKS)}, not {model!r}")
    make, smallest = NETWORKS[model]
    if data.train.size < smallest:
        raise ValueError(f"size should be {smallest} or more for {model}, not {data.train.size}")
    if norm != "bnext" and (fuse or recompute):
        raise ValueError(f"fuse and recompute need norm='bnext', not {norm!r}")
    torch.manual_seed(seed)
    network = make(data.channels, data.classes, data.train.size)
    if norm == "none":
        without_norms(network)
    elif norm == "bnext":
        network = bnext.fuse(network) if fuse else bnext.convert(network)
        bnext.recompute(network, recompute)
    return network


@dataclass(frozen=True)
class Epoch:
    """The losses and accuracies are means: in training over the epoch's steps, in the test after it."""

    loss: float
    accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float  # of training alone


class Training:
    """A network in training. An epoch depends on the seed and on the state alone, so that training goes on from a state
    that was saved as if nothing had happened.

    Args:
        network: from `prepare`; moved to `device`, and changed by training.
        data: what it learns, and is tested on.
        batch_size: of all processes together. What is left at the end of an epoch is not used: it could be a single
            image, which has no variance.
        lr: the learning rate, which stays as it is.
        optimizer: "sgd", with momentum 0.9, or "adam".
        device: of the network and of the data.
        seed: of the order of the images.
        amp: forward in bfloat16 where autocast says so.
        channels_last: the memory format of images and weights.
        compiled: forward and backward by torch.compile.
        title: what progress bars say in front; None shows no bars.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Data,
        *,
        batch_size: int = 64,
        lr: float = 1e-3,
        optimizer: str = "adam",
        device: torch.device | str = "cpu",
        seed: int = 0,
        amp: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
        title: str | None = None,
    ) -> None:
        self.device = torch.device(device)
        if not 2 <= batch_size <= len(data.train):
            raise ValueError(f"batch_size should be from 2 to the {len(data.train)} images, not {batch_size}")
        if batch_size % processes():
            raise ValueError(f"batch_size should be a multiple of the {processes()} processes, not {batch_size}")
        self.data = data.to(self.device)
        self.batch_size, self.seed, self.amp, self.title = batch_size, seed, amp, title
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        if processes() > 1:
            network = synchronised(network)
        self.network = network.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.forward: Callable[[Tensor], Tensor] = self.network
        if processes() > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self.forward = DataParallel(self.network, device_ids)
        if compiled:
            self.forward = torch.compile(self.forward)
        self.optimizer = OPTIMIZERS[optimizer](self.network.parameters(), lr=lr)
        self.epochs: list[Epoch] = []
        self.losses: list[float] = []  # of this process's steps, since it began

    def train(self, epochs: int, after_each: Callable[[], Any] = lambda: None) -> None:
        """Up to so many epochs in all."""
        while len(self.epochs) < epochs:
            self.epoch()
            after_each()

    def epoch(self) -> Epoch:
        """One more."""
        start = time.perf_counter()
        loss, accuracy = self._epoch()
        seconds = time.perf_counter() - start
        self.epochs.append(Epoch(loss, accuracy, *evaluate(self.network, self.data.test, self.layout), seconds))
        return self.epochs[-1]

    def _epoch(self) -> tuple[float, float]:
        self.network.train()
        generator = torch.Generator().manual_seed(self.seed * 10_000 + len(self.epochs))
        order = torch.randperm(len(self.data.train), generator=generator).to(self.device)
        steps = len(order) // self.batch_size
        losses, right = [], torch.zeros((), device=self.device)
        with self._bar(steps * self.batch_size) as bar:
            for step, batch in enumerate(order[: steps * self.batch_size].split(self.batch_size), 1):
                loss, correct = self._step(*self.data.train.batch(part(batch)))
                losses.append(loss)
                right += correct
                if bar.update(self.batch_size):  # which is seldom: reading values waits for the device
                    accuracy = right.item() * processes() / (step * self.batch_size)
                    bar.set_postfix(loss=f"{loss.item():.4f}", accuracy=f"{accuracy:.1%}", refresh=False)
        curve = torch.stack(losses)
        if processes() > 1:
            dist.all_reduce(curve)
            dist.all_reduce(right)
            curve /= processes()
        self.losses += curve.tolist()
        return curve.mean().item(), right.item() / (steps * self.batch_size)

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext():
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def _bar(self, images: int) -> tqdm:
        hidden = self.title is None or rank() > 0
        title = f"{self.title}, epoch {len(self.epochs) + 1}"
        return tqdm(total=images, desc=title, unit=" images", disable=hidden, leave=False, file=sys.stderr)

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on but the arguments, of types that `torch.load(weights_only=True)` takes."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The names of parameters are the same with and without bnext, so that each loads what the other saved."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]


@torch.no_grad()
def evaluate(
    network: nn.Module, images: Images, layout: torch.memory_format = torch.contiguous_format, *, by_batch: bool = False
) -> tuple[float, float]:
    """The mean loss and the accuracy. With `by_batch` batch norms use the statistics of each batch, as in training, but
    do not step their own: what `train()` in place of `eval()` would give."""
    before = network.training
    network.train(by_batch)
    loss = right = torch.zeros((), device=images.labels.device)
    with bnext.hold_statistics() if by_batch else contextlib.nullcontext():
        for inputs, labels in images.batches(500):
            logits = network(inputs.contiguous(memory_format=layout))
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            right = right + (logits.argmax(1) == labels).sum()
    network.train(before)
    return loss.item() / len(images), right.item() / len(images)
