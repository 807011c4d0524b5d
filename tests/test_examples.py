"""The networks of examples/ have the shapes that their documents give, and train with bnext's layers as
with torch.nn's, and the demo runs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

import bnext
from examples import accuracy
from examples.networks import DenseBlock, DenseNet, FusedResidualBlock, LeNet, ResidualBlock, ResNet18, transition

LAYERS = pytest.mark.parametrize("layers", [nn, bnext], ids=["torch.nn", "bnext"])


@LAYERS
def test_lenet(layers):
    model = LeNet(layers)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    norms = [m for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [m.num_features for m in norms] == [6, 16, 120, 84]


def shapes_by_stage(model: nn.Sequential, x: torch.Tensor) -> list[tuple[int, ...]]:
    shapes = []
    with torch.no_grad():
        for stage in model:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    return shapes


@LAYERS
def test_resnet18(layers):
    assert shapes_by_stage(ResNet18(layers), torch.randn(1, 1, 224, 224)) == [
        (64, 112, 112), (64, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7), (10,)
    ]  # fmt: skip


@LAYERS
def test_densenet(layers):
    assert shapes_by_stage(DenseNet(layers), torch.randn(1, 1, 96, 96)) == [
        (64, 24, 24), (192, 24, 24), (96, 12, 12), (224, 12, 12), (112, 6, 6), (240, 6, 6), (120, 3, 3), (248, 3, 3), (10,)
    ]  # fmt: skip


@LAYERS
def test_blocks(layers):
    x = torch.randn(4, 3, 6, 6)
    assert ResidualBlock(layers, 3, 3)(x).shape == (4, 3, 6, 6)
    assert ResidualBlock(layers, 3, 6, stride=2)(x).shape == (4, 6, 3, 3)
    dense = DenseBlock(layers, 2, 3, 10)(torch.randn(4, 3, 8, 8))
    assert dense.shape == (4, 23, 8, 8)
    assert transition(layers, 23, 10)(dense).shape == (4, 10, 4, 4)


def train(model: nn.Module, x: torch.Tensor, steps: int = 3) -> torch.Tensor:
    labels = torch.arange(len(x), device=x.device) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    "network, size",
    [
        (lambda layers: LeNet(layers), 28),
        (lambda layers: ResNet18(layers), 32),
        (lambda layers: ResNet18(layers, FusedResidualBlock if layers is bnext else ResidualBlock), 32),
        (lambda layers: DenseNet(layers), 32),
    ],
    ids=["lenet", "resnet18", "resnet18-fused", "densenet"],
)
def test_training_is_that_of_torch_nn(network, size, device):
    """The same weights, moved over as a state dict; float64, so that rounding does not add up."""
    reference = network(nn)
    ours = network(bnext)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(4, 1, size, size, dtype=torch.float64)
    losses = []
    for model in (reference, ours):
        losses.append(train(model.to(device, torch.float64), x.to(device)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)
    for (name, expected), actual in zip(reference.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    lenet = pytest.importorskip("examples.lenet")
    picture = tmp_path / "curves.png"
    records = lenet.main(["--epochs", "3", "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(word in said for word in ("accuracy", "s/epoch", "without", "torch.nn", "bnext", str(picture)))
    assert all(len(record.loss) == 3 for record in records.values())
    # Batch normalization converges faster, and ours as torch.nn's.
    assert records["bnext"].loss[-1] < 0.8 * records["without"].loss[-1]
    assert records["bnext"].loss == pytest.approx(records["torch.nn"].loss, rel=1e-3)


def test_demo_without_torchvision_says_so(monkeypatch):
    lenet = pytest.importorskip("examples.lenet")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(SystemExit, match="--data fashion-mnist needs torchvision: pip install torchvision"):
        lenet.main(["--data", "fashion-mnist", "--root", "nowhere"])


@pytest.mark.parametrize("layout", accuracy.LAYOUTS)
def test_accuracy_is_within_the_contract(layout):
    for ratio in accuracy.RATIOS:
        mean, var = accuracy.errors(bnext, accuracy.data(ratio, layout), "cpu")
        assert mean <= 4 and var <= 8 + 1  # one more for the factor of the unbiased variance
    assert accuracy.same_bits(bnext, layout)


def test_accuracy_shows_what_torch_loses():
    """The figures that README compares with: else the comparison would be with nothing."""
    assert accuracy.errors(nn, accuracy.data(1e4, "channels_last"), "cpu")[1] > 100


def test_errors_are_counted_in_units_in_the_last_place():
    assert accuracy.ulps(torch.ones(2), np.array([1, 1 + 2.0**-20])) == 8


def test_accuracy_prints_a_row_for_each_case(monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPE", (2, 3, 4, 4))
    lines = accuracy.table().splitlines()
    rows = [line for line in lines if line.startswith(("cpu", "cuda"))]
    assert len(rows) == len(accuracy.LAYOUTS) * len(accuracy.RATIOS) * (2 if torch.cuda.is_available() else 1)
    assert lines[-1] == "bnext     contiguous: yes, channels_last: yes"
