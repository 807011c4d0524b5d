"""Gradients of every order, and what is kept for them."""

import pytest
import torch
from problems import channels_last, contiguous
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import bnext
from bnext.functional import batch_norm

F64 = torch.float64


def arguments(device, affine, residual, layout=contiguous, shape=(3, 2, 2, 3)):
    x = layout(torch.randn(shape, dtype=F64, device=device)).requires_grad_()
    weight = (torch.rand(2, dtype=F64, device=device) + 0.5).requires_grad_() if "weight" in affine else None
    bias = torch.randn(2, dtype=F64, device=device).requires_grad_() if "bias" in affine else None
    r = torch.randn(shape, dtype=F64, device=device).requires_grad_() if residual else None
    return x, weight, bias, r


def function(training, activation, device):
    mean, var = torch.randn(2, dtype=F64, device=device), torch.rand(2, dtype=F64, device=device) + 0.5

    def f(x, weight, bias, residual):
        return batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, activation=activation, residual=residual
        )

    return f


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(device, training, affine, activation, residual):
    f = function(training, activation, device)
    args = arguments(device, affine, residual)
    assert gradcheck(f, args)
    assert gradgradcheck(f, args)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(4, 2, 2, 3), (6, 2), (3, 2, 4), (2, 2, 1, 2, 3)])
def test_second_derivatives_in_other_layouts(device, shape, activation):
    f = function(True, activation, device)
    args = arguments(device, "weight and bias", True, channels_last, shape)
    assert gradcheck(f, args)
    assert gradgradcheck(f, args)


@pytest.mark.parametrize("training", [True, False])
def test_third_derivatives(device, training):
    """The gradient of a gradient penalty's gradient: mean and invstd depend on x there too."""
    f = function(training, None, device)
    x, weight, bias, _ = arguments(device, "weight and bias", False)

    def penalty_gradient(x, weight):
        (dx,) = torch.autograd.grad(f(x, weight, bias, None).pow(3).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x, create_graph=True)
        return ddx

    assert gradcheck(penalty_gradient, (x, weight))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_any_subset_of_gradients(device, training, activation):
    """Each argument alone, and frozen parameters: the same numbers as all together."""
    f = function(training, activation, device)
    args = arguments(device, "weight and bias", True)
    y = f(*args)
    dy = torch.randn_like(y)
    everything = torch.autograd.grad(y, args, dy)
    for wanted in range(1, 16):
        some = [a.detach().requires_grad_(bool(wanted >> i & 1)) for i, a in enumerate(args)]
        inputs = [a for a in some if a.requires_grad]
        for create_graph in (False, True):
            grads = iter(torch.autograd.grad(f(*some), inputs, dy, create_graph=create_graph))
            for a, expected in zip(some, everything, strict=True):
                if a.requires_grad:
                    torch.testing.assert_close(next(grads), expected)


def saved_bytes(f, *owned):
    """What autograd keeps between forward and backward, besides tensors the caller holds anyway."""
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    for t in owned:
        kept.pop(t.data_ptr(), None)
    return sum(kept.values()), y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_only_what_the_backward_needs_is_saved(device, training, dtype):
    c, numel = 8, 4 * 8 * 9 * 9
    x = torch.randn(4, c, 9, 9, device=device).to(dtype).requires_grad_()
    residual = torch.randn_like(x)
    statistics = 2 * 4 * c
    mask = numel // 8
    for activation, r, extra in ((None, None, 0), ("relu", None, 0), (None, residual, 0), ("relu", residual, mask)):
        m = bnext.BatchNorm2d(c, activation=activation, device=device).train(training)
        saved, y = saved_bytes(lambda m=m, r=r: m(x, r), x, *m.parameters())
        assert saved == statistics + extra
        assert y.grad_fn is not None


def test_frozen_evaluation_saves_no_activation(device):
    """With constant statistics and parameters, dx is dy times a constant."""
    m = bnext.BatchNorm2d(3, device=device).eval().requires_grad_(False)
    conv_output = torch.randn(2, 3, 4, 4, device=device, requires_grad=True) * 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = m(conv_output)
    assert all(len(shape) == 1 for shape in kept)
    (dx,) = torch.autograd.grad(y, conv_output, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.full_like(dx, (1 + m.eps) ** -0.5))


def test_nothing_is_saved_without_gradients(device):
    m = bnext.BatchNorm2d(3, activation="relu", device=device)
    x = torch.randn(2, 3, 4, 4, device=device)
    with torch.no_grad():
        assert m(x, x).grad_fn is None
    with torch.inference_mode():
        assert m(x, x).is_inference()


def test_two_forwards_before_the_backward(device):
    """As under DDP, which also rewrites buffers in place before each forward: they are not what the
    backward reads."""
    m = bnext.BatchNorm2d(3, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    expected = torch.autograd.grad(m(x).pow(3).sum() + m(x + 1).pow(3).sum(), list(m.parameters()))
    for mode in (m.train(), m.eval()):
        first = mode(x)
        for b in m.buffers():
            b.mul_(2)
        loss = first.pow(3).sum() + mode(x + 1).pow(3).sum()
        grads = torch.autograd.grad(loss, list(m.parameters()))
        if mode.training:
            torch.testing.assert_close(grads, expected)


def test_evaluation_differentiates_at_the_statistics_it_saw(device):
    m = bnext.BatchNorm2d(3, device=device).eval()
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    y = m(x)
    m.running_var.fill_(100)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(dx, (1 + m.eps) ** -0.5))


def test_changed_input_is_noticed(device):
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True) * 1
    y = bnext.BatchNorm2d(3, device=device)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_buffers_count_as_changed_in_place(device):
    m = bnext.BatchNorm2d(3, device=device)
    versions = [b._version for b in m.buffers()]
    m(torch.randn(4, 3, 5, 5, device=device))
    assert all(b._version > v for b, v in zip(m.buffers(), versions, strict=True))


def test_backward_twice(device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    y = bnext.BatchNorm1d(3, device=device)(x)
    first = torch.autograd.grad(y.pow(2).sum(), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y.pow(2).sum(), x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.pow(2).sum(), x)


def test_gradient_in_another_layout(device):
    """dy as autograd happens to deliver it: expanded, transposed, or in the other memory format."""
    x = channels_last(torch.randn(4, 3, 5, 7, device=device)).requires_grad_()
    m = bnext.BatchNorm2d(3, activation="relu", device=device)
    y = m(x, torch.zeros_like(x).contiguous())
    dys = [torch.randn(4, 3, 5, 7, device=device), torch.ones((), device=device).expand(x.shape)]
    dys.append(torch.randn(4, 3, 7, 5, device=device).transpose(2, 3))
    for dy in dys:
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (expected,) = torch.autograd.grad(y, x, channels_last(dy), retain_graph=True)
        assert torch.equal(dx, expected) and dx.stride() == x.stride()


def test_checkpointing_recomputes(device):
    from torch.utils.checkpoint import checkpoint

    m = bnext.BatchNorm2d(3, activation="relu", device=device)
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(m(x).square().sum(), x)
    (dx,) = torch.autograd.grad(checkpoint(m, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_of_saved_tensors_may_return_other_strides(device, activation, create_graph):
    """torch asks for the same values, shape and dtype. The bits of a mask are in the order of x as it was."""
    layer = bnext.BatchNorm2d(3, activation=activation, device=device, dtype=F64)
    whole = channels_last(torch.randn(2, 3, 4, 5, dtype=F64, device=device))
    for x in (whole, whole[:1].expand(6, -1, -1, -1)):  # of which even a clone has other strides
        x, residual = x.detach().requires_grad_(), torch.randn(x.shape, dtype=F64, device=device, requires_grad=True)
        wanted = [x, residual, layer.weight]
        results = []
        for unpack in (lambda t: t, lambda t: t.contiguous()):
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
                y = layer(x, residual)
                gradients = torch.autograd.grad(y.square().sum(), wanted, create_graph=create_graph)
                if create_graph:
                    gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients), wanted)
            results.append(gradients)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_gradients_can_be_differentiated(device, training, activation, with_residual):
    """By `autograd.grad(is_grads_batched=True)`, whose vmap is another than torch.func's; as one by one."""
    f = function(training, activation, device)
    args = arguments(device, "weight and bias", with_residual)
    given = [t for t in args if t is not None]
    dy = torch.randn(2, *args[0].shape, dtype=F64, device=device, requires_grad=True)
    y = f(*args)
    options = {"create_graph": True, "materialize_grads": True}
    batched = torch.autograd.grad(y, given, dy, is_grads_batched=True, **options)
    single = [torch.stack(g) for g in zip(*(torch.autograd.grad(y, given, d, **options) for d in dy), strict=True)]
    for first in zip(batched, single, strict=True):
        torch.testing.assert_close(*first, rtol=1e-12, atol=1e-12)
    both = [
        torch.autograd.grad(sum(g.square().sum() for g in gs), [dy, *given], materialize_grads=True)
        for gs in (batched, single)
    ]
    for second in zip(*both, strict=True):
        torch.testing.assert_close(*second, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_a_gradient_penalty_behind_a_residual(activation):
    """Reaches the residual where that is kept, and not a bit of each element."""
    layer = bnext.BatchNorm2d(3, activation=activation, dtype=torch.float64)
    x, residual = (torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (dx,) = torch.autograd.grad(layer(x, residual).sum(), x, create_graph=True)
    wanted = [x, *layer.parameters(), residual]
    *found, of_residual = torch.autograd.grad(dx.square().sum(), wanted, allow_unused=True)
    assert all(g is not None for g in found)
    assert (of_residual is None) == isinstance(activation, nn.ReLU)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.SiLU()])
def test_a_gradient_penalty_reaches_all_parameters(activation, training):
    """By zeros where the activation is piecewise linear, as in torch: autograd.grad() raises where there is nothing."""
    norm, x = nn.BatchNorm2d(3, dtype=torch.float64), torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    layer = bnext.BatchNorm2d(3, activation=activation, dtype=torch.float64)
    results = []
    for model in (nn.Sequential(norm, activation).train(training), layer.train(training)):
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *model.parameters()]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
