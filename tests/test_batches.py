"""Statistics of less than a batch, and by another convention: padded batches, Keras'."""

import pickle

import pytest
import torch
from torch.autograd import forward_ad as fwAD

import bnext
from bnext import reference

# ---- padded batches


@pytest.mark.parametrize("lengths", [[5, 2, 3], [5, 5, 5], [0, 4, 1]], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_padding_is_no_part_of_the_batch(device, lengths, activation):
    """The same as a batch without it, and no trace of what it holds."""
    x, r = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device)
    sizes = torch.tensor(lengths, device=device)
    valid = torch.arange(5, device=device) < sizes[:, None]
    layer = bnext.BatchNorm1d(4, activation=activation, dtype=torch.float64, device=device)
    twin = bnext.BatchNorm1d(4, activation=activation, dtype=torch.float64, device=device)
    for t in (x, r):
        t.transpose(1, 2)[~valid] = float("nan")
    inputs = [t.requires_grad_() for t in (x, r)]
    packed = [t.detach().transpose(1, 2)[valid].requires_grad_() for t in (x, r)]
    expected = twin(*packed)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    for mask in (sizes, valid):
        layer.reset_running_stats()
        y = bnext.masked(layer, inputs[0], mask, inputs[1])
        assert y.shape == x.shape and torch.equal(y.transpose(1, 2)[valid], expected)
        assert (y.transpose(1, 2)[~valid] == 0).all()
        assert torch.equal(layer.running_mean, twin.running_mean) and torch.equal(layer.running_var, twin.running_var)
        padded = torch.zeros_like(y).transpose(1, 2)
        padded[valid] = dy
        grads = torch.autograd.grad(y, [*inputs, layer.weight], padded.transpose(1, 2))
        for grad, t in zip(grads, packed, strict=False):
            assert torch.equal(grad.transpose(1, 2)[valid], t.grad) and (grad.transpose(1, 2)[~valid] == 0).all()
        assert torch.equal(grads[2], twin.weight.grad)


def test_lengths_out_of_range_end_at_the_nearest(device):
    x, twin = torch.randn(3, 4, 5, device=device), bnext.BatchNorm1d(4, device=device)
    layer = bnext.BatchNorm1d(4, device=device)
    y = bnext.masked(layer, x, torch.tensor([7, -2, 3], device=device))
    assert torch.equal(y, bnext.masked(twin, x, torch.tensor([5, 0, 3], device=device)))
    assert torch.equal(layer.running_var, twin.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_masks_in_compiled_graphs(training):
    """How many positions are valid is no number of a graph's: it breaks there, and torch.export refuses it."""
    torch._dynamo.reset()

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bnext.BatchNorm1d(4, activation="relu")

        def forward(self, x, mask):
            return bnext.masked(self.norm, x, mask)

    model, twin = Masked().train(training), Masked().train(training)
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(3, 4, 5)
    for lengths in ([5, 2, 3], [1, 2, 0]):
        torch.testing.assert_close(compiled(x, torch.tensor(lengths)), twin(x, torch.tensor(lengths)))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.export.export(model, (x, torch.tensor([5, 2, 3])))


def test_wrong_masks():
    layer, x = bnext.BatchNorm1d(4), torch.randn(3, 4, 5)
    for mask in (torch.ones(3, 5), torch.ones(3), torch.tensor([True] * 3), torch.ones(5, dtype=int)):
        with pytest.raises(ValueError, match="mask should be bool"):
            bnext.masked(layer, x, mask)
    with pytest.raises(ValueError, match=r"\(N, C, L\)"):
        bnext.masked(layer, x[0], torch.ones(4, dtype=int))
    with pytest.raises(ValueError, match="residual should be"):
        bnext.masked(layer, x, torch.tensor([5, 5, 5]), x[:, :, :1])
    assert layer.num_batches_tracked == 0


# ---- Keras' convention


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biased_variance_by_every_way(device, momentum, dtype):
    x = torch.randn(2, 3, 2, 1, device=device, dtype=dtype)  # n / (n - 1) is 4 / 3
    found = {}
    for way in ("kernels", "function", "torch"):
        layer = bnext.BatchNorm2d(3, momentum=momentum, unbiased=False, device=device, dtype=dtype)
        if way == "torch":
            bnext.revert(layer)
            assert not isinstance(layer, bnext.BatchNorm2d) and "unbiased=False" in repr(layer)
        if way == "function":
            with fwAD.dual_level():
                layer(fwAD.make_dual(x, torch.ones_like(x)))
        else:
            layer(x)
        found[way] = layer.running_mean, layer.running_var
        assert layer.num_batches_tracked == 1
    weight = 1.0 if momentum is None else momentum
    state = torch.zeros(3), torch.ones(3)
    exact = reference.forward(x.cpu(), None, None, *state, momentum=weight, unbiased=False)
    for statistics in found.values():
        expected = exact.running_mean, exact.running_var
        for t, e in zip(statistics, expected, strict=True):
            torch.testing.assert_close(t.cpu(), e.to(dtype))


def test_decay_is_the_convention_of_keras_and_flax():
    layer = bnext.BatchNorm1d(2, decay=0.9)
    assert layer.momentum == pytest.approx(0.1) and not layer.unbiased
    assert bnext.BatchNorm1d(2, decay=0.9, unbiased=True).unbiased  # TensorFlow's fused kernel
    assert bnext.BatchNorm1d(2).unbiased
    with pytest.raises(ValueError, match="decay should be None or from 0 to 1, not 99"):
        bnext.BatchNorm1d(2, decay=99)
    lazy = bnext.LazyBatchNorm1d(decay=0.9)
    lazy(torch.randn(4, 2))
    assert not lazy.unbiased and lazy.momentum == pytest.approx(0.1)


def test_population_statistics_are_biased_too():
    layer = bnext.BatchNorm1d(2, decay=0.9)
    x = torch.randn(3, 2)
    bnext.update_statistics(layer, [x], progress=False)
    torch.testing.assert_close(layer.running_var, x.var(0, correction=0))


def test_keras_layers_go_on_here(library, monkeypatch):
    """Equal outputs after equal updates, in training and after it."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = library("keras")
    theirs = keras.layers.BatchNormalization(axis=1, momentum=0.9, epsilon=1e-3)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, 5, 4, generator=generator) * (i + 1) + i for i in range(5)]
    theirs.build(batches[0].shape)
    theirs.gamma.assign([1.0, 2.0, -1.0])
    theirs.beta.assign([0.5, 0.0, 1.0])
    theirs(batches[0], training=True)
    ours = bnext.BatchNorm2d(3, eps=1e-3, decay=0.9)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    bnext.keras.load_weights(ours, **{name: getattr(theirs, name).numpy() for name in names})
    for x in batches[1:]:
        torch.testing.assert_close(ours(x), theirs(x, training=True), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_var, theirs.moving_variance.value, rtol=1e-5, atol=1e-6)
    ours.eval()
    torch.testing.assert_close(ours(batches[0]), theirs(batches[0], training=False), rtol=1e-5, atol=1e-5)


def test_weights_that_do_not_fit_change_nothing():
    layer = bnext.BatchNorm1d(2, weight=False)
    good = {"beta": [1, 2], "moving_mean": [3, 4], "moving_variance": [5, 6]}
    before = pickle.dumps(layer.state_dict())
    for change, message in (
        ({"gamma": [1, 1]}, "gamma is given, but weight is not"),
        ({"beta": None}, "bias is given, but beta is not"),
        ({"moving_variance": [1, -1]}, "moving_variance has values that are not finite, or negative"),
        ({"moving_variance": [1, float("nan")]}, "moving_variance has values"),
        ({"moving_variance": [1, 2, 3]}, r"moving_variance should be \[2\], not \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            bnext.keras.load_weights(layer, **(good | change))
        assert pickle.dumps(layer.state_dict()) == before
    bnext.keras.load_weights(layer, **good)
    assert layer.running_var.tolist() == [5, 6] and layer.bias.tolist() == [1, 2]
