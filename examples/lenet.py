"""Trains LeNet on real images three times, from the same weights and over the same batches: without
normalization, with torch.nn's batch normalization, and with bnext's. Prints a table and draws the curves.

    python -m examples.lenet
    python -m examples.lenet --data fashion-mnist --root data
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import bnext
from examples.networks import LeNet

VARIANTS: dict[str, ModuleType | None] = {"without": None, "torch.nn": nn, "bnext": bnext}


@dataclass
class Data:
    name: str
    train_images: Tensor  # (N, 1, 28, 28) in [0, 1]
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> Data:
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return Data(self.name, *(t.to(device) for t in tensors))


@dataclass
class Record:
    loss: list[float] = field(default_factory=list)  # mean over each epoch's batches
    accuracy: list[float] = field(default_factory=list)  # on the test images, after each epoch
    seconds: list[float] = field(default_factory=list)  # of training, each epoch


def digits() -> Data:
    """scikit-learn's bundled 8x8 handwritten digits, enlarged; every fifth one is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.tensor(bunch.target)
    test = torch.arange(len(labels)) % 5 == 0
    return Data("handwritten digits", images[~test], labels[~test], images[test], labels[test])


def fashion_mnist(root: str | None) -> Data:
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise SystemExit("--data fashion-mnist needs torchvision: pip install torchvision") from error
    if root is None:
        raise SystemExit("--data fashion-mnist needs --root DIR, the folder that holds the data set or is to hold it")
    sets = [FashionMNIST(root, train=train, download=True) for train in (True, False)]
    parts = [part for s in sets for part in (s.data.unsqueeze(1) / 255, s.targets)]
    return Data("Fashion-MNIST", *parts)


def train(layers: ModuleType | None, data: Data, epochs: int, batch_size: int, seed: int, title: str) -> Record:
    torch.manual_seed(seed)  # normalization layers draw nothing, so that all variants start alike
    device = data.train_images.device
    model = LeNet(layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    record = Record()
    progress = tqdm(range(epochs), desc=f"{title:9}", unit="epoch")
    for _ in progress:
        start = time.perf_counter()
        # Whole batches only: the last one could hold a single image, which has no variance.
        batches = torch.randperm(len(data.train_labels)).to(device).split(batch_size)
        losses = [step(model, optimizer, data, batch) for batch in batches if len(batch) == batch_size]
        record.loss.append(torch.stack(losses).mean().item())  # waits for the device
        record.seconds.append(time.perf_counter() - start)
        record.accuracy.append(accuracy(model, data))
        progress.set_postfix(loss=f"{record.loss[-1]:.4f}", accuracy=f"{record.accuracy[-1]:.1%}")
    return record


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, batch: Tensor) -> Tensor:
    model.train()
    loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    chunks = zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
    right = sum((model(images).argmax(dim=1) == labels).sum() for images, labels in chunks)
    return right.item() / len(data.test_labels)


def table(records: dict[str, Record]) -> str:
    lines = [f"{'LeNet with BN of':16}  {'final loss':>10}  {'accuracy':>8}  {'95 % after':>10}  {'s/epoch':>8}"]
    for name, record in records.items():
        reached = next((i for i, a in enumerate(record.accuracy, start=1) if a >= 0.95), None)
        epochs = f"{reached} epochs" if reached else "never"
        median = sorted(record.seconds)[len(record.seconds) // 2]
        lines.append(f"{name:16}  {record.loss[-1]:10.4f}  {record.accuracy[-1]:8.1%}  {epochs:>10}  {median:8.3f}")
    return "\n".join(lines)


def plot(records: dict[str, Record], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # bnext's thin dashes lie on torch.nn's broad line.
    styles = {
        "without": {"color": "tab:gray"},
        "torch.nn": {"color": "tab:orange", "linewidth": 4, "alpha": 0.6},
        "bnext": {"color": "tab:blue", "linestyle": "--"},
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, record in records.items():
        epochs = range(1, len(record.loss) + 1)
        left.plot(epochs, record.loss, label=name, **styles[name])
        right.plot(epochs, [100 * a for a in record.accuracy], label=name, **styles[name])
    figure.suptitle(title)
    left.set(title="Training loss", xlabel="epoch", ylabel="cross entropy (log scale)", yscale="log")
    right.set(title="Test accuracy", xlabel="epoch", ylabel="% correct")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(title="batch normalization")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Record]:
    parser = argparse.ArgumentParser(description="LeNet without batch normalization, with torch.nn's, and with bnext's")
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--root", help="folder of the Fashion-MNIST files; downloaded there where they are missing")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("build/lenet.png"))
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # LeNet's layers are so small that waiting for a second thread takes longer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = (digits() if options.data == "digits" else fashion_mnist(options.root)).to(device)
    sizes = f"{len(data.train_labels)} images for training, {len(data.test_labels)} for testing"
    print(f"LeNet on {data.name} ({sizes}), {device.type}, torch {torch.__version__}")
    records = {
        name: train(layers, data, options.epochs, options.batch_size, options.seed, name)
        for name, layers in VARIANTS.items()
    }
    print(f"\n{table(records)}\n")
    pairs = zip(records["bnext"].loss, records["torch.nn"].loss, strict=True)
    print(f"largest difference between the loss curves of bnext and torch.nn: {max(abs(a - b) for a, b in pairs):.1e}")
    plot(records, f"LeNet on {data.name}: the same weights and batches", options.plot)
    print(f"loss curves: {options.plot}")
    return records


if __name__ == "__main__":
    main()
