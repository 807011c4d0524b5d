"""The networks of examples/ have the shapes that their documents give, and train with bnext's layers as with torch.nn's;
what the comparison shows is so; errors are what the tables say."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bnext
from examples import accuracy
from examples.data import Images, load
from examples.networks import DenseBlock, DenseNet, LeNet, ResidualBlock, ResNet18, transition, without_norms

# ---- networks


def identity(network: nn.Module) -> nn.Module:
    return network


KINDS = pytest.mark.parametrize("kind", [identity, bnext.convert, bnext.fuse, without_norms], ids=lambda f: f.__name__)


@KINDS
def test_lenet(kind):
    model = kind(LeNet())
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [m.num_features for m in norms] == ([] if kind is without_norms else [6, 16, 120, 84])
    assert kind(LeNet(3, 7, 32))(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def shapes_by_stage(model: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """Of what the children of the model give, without the batch dimension."""
    shapes = []
    stages = [model.get_submodule(name) for name, _ in model.named_children()]
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    return shapes


STAGES = pytest.mark.parametrize("kind", [identity, bnext.convert, without_norms], ids=lambda f: f.__name__)


@STAGES
def test_resnet18(kind):
    assert shapes_by_stage(kind(ResNet18()), torch.randn(1, 1, 224, 224)) == [
        (64, 112, 112), (64, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7), (10,)
    ]  # fmt: skip


@STAGES
def test_densenet(kind):
    assert shapes_by_stage(kind(DenseNet()), torch.randn(1, 1, 96, 96)) == [
        (64, 24, 24), (192, 24, 24), (96, 12, 12), (224, 12, 12), (112, 6, 6), (240, 6, 6), (120, 3, 3), (248, 3, 3), (10,)
    ]  # fmt: skip


@KINDS
def test_blocks(kind):
    x = torch.randn(4, 3, 6, 6)
    assert kind(ResidualBlock(3, 3))(x).shape == (4, 3, 6, 6)
    assert kind(ResidualBlock(3, 6, stride=2))(x).shape == (4, 6, 3, 3)
    dense = kind(DenseBlock(2, 3, 10))(torch.randn(4, 3, 8, 8))
    assert dense.shape == (4, 23, 8, 8)
    assert kind(transition(23, 10))(dense).shape == (4, 10, 4, 4)


def train(model: nn.Module, x: torch.Tensor, steps: int = 3) -> torch.Tensor:
    labels = torch.arange(len(x), device=x.device) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("fused", [False, True], ids=["converted", "fused"])
@pytest.mark.parametrize("network, size, norms", [(LeNet, 28, 4), (ResNet18, 32, 17), (DenseNet, 32, 21)])
def test_training_is_that_of_torch_nn(network, size, norms, fused, device):
    """The same weights, moved over as a state dict; float64, so that rounding does not add up."""
    reference = network()
    ours = bnext.fuse(network()) if fused else bnext.convert(network())
    assert sum(getattr(m, "activation", None) is not None for m in ours.modules()) == (norms if fused else 0)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(4, 1, size, size, dtype=torch.float64)
    losses = []
    for model in (reference, ours):
        losses.append(train(model.to(device, torch.float64), x.to(device)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)
    assert set(ours.state_dict()) == set(reference.state_dict())
    for name, expected in reference.state_dict().items():
        actual = ours.state_dict()[name]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


# ---- the comparison


@pytest.fixture
def compare():
    for library in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(library)
    from examples import compare

    return compare


def experiment(compare, **options):
    settings = {"model": "lenet", "data": load("digits", 28), "batch_size": 64, "lr": 1e-3, "optimizer": "adam"}
    settings |= {"seed": 0, "device": "cpu", "epochs": 3, "sweep_epochs": 1}
    return compare.Experiment(**(settings | options))


def test_curves_lie_on_those_of_torch_nn(compare):
    runs = experiment(compare).curves()
    assert all(len(run.losses) == 3 * (1437 // 64) for run in runs.values())
    for name in ("bnext", "bnext fused"):
        assert compare.difference(runs, name) < 1e-4  # of 50 steps
        assert runs[name].losses[-1] < 0.6 * runs["none"].losses[-1]
    # They are no copies of each other: this would pass with one network under all names.
    kinds = [{type(layer) for layer in run.network.modules()} for run in runs.values()]
    assert nn.BatchNorm2d not in kinds[0] and nn.BatchNorm2d in kinds[1] and bnext.BatchNorm2d in kinds[2]
    activations = [getattr(layer, "activation", None) for layer in runs["bnext fused"].network.modules()]
    assert activations.count("sigmoid") == 4


def small(load):
    """The first images of each of its data sets."""

    @functools.wraps(load)
    def loaded(*arguments):
        data = load(*arguments)
        parts = [Images(part.pixels[:96], part.labels[:96], part.size) for part in (data.train, data.test)]
        return replace(data, train=parts[0], test=parts[1])

    return loaded


def test_comparison(compare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "load", small(load))
    monkeypatch.setattr(compare, "RATES", (1, 10))
    monkeypatch.setattr(compare.Experiment, "in_processes", lambda self, batch_size: 0.5)  # a test of its own
    picture = tmp_path / "folder" / "comparison.png"
    results = compare.main(["--epochs", "2", "--sweep-epochs", "2", "--batch-size", "32", "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for word in ("test accuracy", "90 % after", "s/epoch", "speed-up", "kept for backward", str(picture)):
        assert word in said
    assert [line.split("  ")[0] for line in said.splitlines()[3:7]] == list(compare.VARIANTS)
    assert all(len(run.epochs) == 2 for run in results.runs.values())
    assert [rate for rate, _ in results.rates["none"]] == [1e-3, 1e-2]
    assert len(results.scales["bnext"]) == len(compare.SCALES) and len(results.small) == 5
    assert len(results.evaluation.running) == len(results.evaluation.updated) == 2
    kept = results.kept
    assert kept["none"].before < kept["torch"].before and kept["bnext fused"].after < kept["bnext"].after


@pytest.mark.slow
def test_a_higher_learning_rate_converges_with_normalization_alone(compare):
    high = experiment(compare, lr=1e-2, sweep_epochs=8)
    assert high.accuracy("none") < 0.2 and high.accuracy("bnext") > 0.85


@pytest.mark.slow
def test_initial_weights_matter_less(compare):
    few = experiment(compare, sweep_epochs=8)
    small, large = (functools.partial(compare.scale_weights, factor=factor) for factor in (0.1, 10))
    assert few.accuracy("bnext", change=small) > 0.85 and few.accuracy("bnext", change=large) > 0.85
    assert few.accuracy("none", change=small) < 0.2


def test_running_averages_lag_behind(compare):
    found = experiment(compare).evaluation()
    assert found.running[0] < 0.3 and found.batch[0] > 0.8 and found.updated[0] > 0.8


@pytest.mark.slow
def test_two_images_are_too_few(compare):
    """A batch of two; two processes with two each; and SyncBatchNorm, in processes."""
    found = dict(experiment(compare, sweep_epochs=4).small())
    whole, two, apart, joined, ghosts = found.values()
    assert max(two, apart) < min(whole, joined, ghosts) - 0.05


@pytest.mark.slow
def test_processes_that_fail_say_why(compare):
    with pytest.raises(RuntimeError, match="--lr=-1.*failed(.|\n)*Invalid learning rate"):
        experiment(compare, lr=-1.0).in_processes(64)


# ---- errors in ulp


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
