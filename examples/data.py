"""Data sets of images, in memory: scikit-learn's digits, which are installed with it; torchvision's; or none at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DATA", "Data", "Images", "load"]

#: The names of `--data`, each with the height and width of its images.
DATA = {"digits": 8, "fashion-mnist": 28, "cifar10": 32, "fake": 32}


@dataclass(frozen=True)
class Images:
    """Images and their classes, which become inputs of a network batch by batch: so a data set takes a byte a value."""

    pixels: Tensor  # (N, C, H, W), uint8
    labels: Tensor  # (N,), int64
    size: int  # height and width of the inputs

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device), self.size)

    def batch(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """(len(which), C, size, size) in [0, 1], and the labels."""
        inputs = self.pixels[which].float() / 255
        if inputs.shape[-1] != self.size:
            inputs = F.interpolate(inputs, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return inputs, self.labels[which]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them, in order."""
        for which in torch.arange(len(self), device=self.labels.device).split(batch_size):
            yield self.batch(which)


@dataclass(frozen=True)
class Data:
    name: str
    train: Images
    test: Images
    root: str | None = None  # the folder that it came from
    classes: int = 10

    @property
    def channels(self) -> int:
        return self.train.pixels.shape[1]

    def to(self, device: torch.device | str) -> Data:
        return Data(self.name, self.train.to(device), self.test.to(device), self.root, self.classes)


def load(name: str, size: int | None = None, root: str | None = None, download: bool = False) -> Data:
    """The data set of this name, of `DATA`.

    Args:
        name: "digits", "fashion-mnist", "cifar10" or "fake".
        size: the height and width that images are resized to; None leaves them as they are.
        root: the folder that holds what torchvision reads: `root/FashionMNIST/raw` or `root/cifar-10-batches-py`.
        download: fetches what is missing in `root`; without it, nothing is fetched.

    Raises:
        SystemExit: torchvision or the files are not there; it says what to do.
    """
    if name not in DATA:
        raise ValueError(f"name should be one of {', '.join(DATA)}, not {name!r}")
    if name == "digits":
        parts = _digits()
    elif name == "fake":
        parts = _fake()
    else:
        parts = _of_torchvision(name, root, download)
    train, test = (Images(pixels, labels, size or DATA[name]) for pixels, labels in parts)
    return Data(name, train, test, root)


Parts = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # for training and for testing


def _digits() -> Parts:
    """1797 handwritten digits; every fifth is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (torch.tensor(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.tensor(bunch.target)
    test = torch.arange(len(labels)) % 5 == 0
    return (pixels[~test], labels[~test]), (pixels[test], labels[test])


def _fake() -> Parts:
    """A pattern for each class, under noise: to try a network out where there is no data set."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(128, (10, 3, 32, 32), generator=generator)
    labels = torch.arange(2560) % 10
    noise = torch.randint(128, (2560, 3, 32, 32), generator=generator)
    pixels = (patterns[labels] + noise).to(torch.uint8)
    return (pixels[:2048], labels[:2048]), (pixels[2048:], labels[2048:])


def _of_torchvision(name: str, root: str | None, download: bool) -> Parts:
    try:
        from torchvision import datasets
    except Exception as error:  # of another torch's torchvision, not an ImportError
        raise SystemExit(f"--data {name} needs torchvision (pip install torchvision), which fails: {error}") from error
    if root is None:
        raise SystemExit(f"--data {name} needs --root DIR, the folder of its files")
    kind = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        train, test = (_tensors(kind(root, train=train, download=download)) for train in (True, False))
    except RuntimeError as error:
        raise SystemExit(f"--root {root} should have the files of {name}: --download fetches them ({error})") from error
    return train, test


def _tensors(dataset) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) of torchvision's (N, H, W), or of its (N, H, W, C)."""
    pixels = torch.as_tensor(dataset.data)
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(dataset.targets)
