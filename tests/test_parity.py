"""The layers against torch.nn: the same module, in float64, is the exact answer; the same module
in the same dtype says what dtypes and strides results have."""

import copy

import pytest
import torch
from problems import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Tolerance,
    assert_within,
    channels_last,
    contiguous,
    expanded,
    in_float64,
    statistics,
)
from torch import nn

import bnext

KINDS = {
    2: (bnext.BatchNorm1d, nn.BatchNorm1d),
    3: (bnext.BatchNorm1d, nn.BatchNorm1d),
    4: (bnext.BatchNorm2d, nn.BatchNorm2d),
    5: (bnext.BatchNorm3d, nn.BatchNorm3d),
}
AFFINE = ["weight and bias", "weight", "bias", "none"]
#: track_running_stats, momentum
TRACKING = [(True, 0.1), (True, None), (True, 0.0), (True, 1.0), (False, 0.1)]


def pair(shape, dtype, device, affine="weight and bias", tracking=(True, 0.1), **options):
    """Ours in `dtype`, and torch.nn's in float64 and on the CPU, with the same random state."""
    ours, theirs = KINDS[len(shape)]
    track, momentum = tracking
    theirs = theirs(shape[1], momentum=momentum, track_running_stats=track, affine=affine != "none")
    ours = ours(shape[1], momentum=momentum, track_running_stats=track, affine=affine != "none", **options)
    for name in ("weight", "bias"):
        if name not in affine:
            for m in (ours, theirs):
                m.register_parameter(name, None)
    if affine == "bias":
        for m in (ours, theirs):
            m.register_parameter("bias", nn.Parameter(torch.empty(shape[1])))
    ours.to(device, dtype)
    for t in ours.parameters():
        nn.init.normal_(t, 0.5)
    if track:
        nn.init.normal_(ours.running_mean)
        nn.init.uniform_(ours.running_var, 0.5, 2)
    theirs.double().load_state_dict(ours.state_dict())
    return ours, theirs


def check(ours, theirs, x, residual=None, activation=None):
    """One step forward and back, in the mode that the modules are in."""
    theirs.load_state_dict(ours.state_dict())  # exact again: the last step rounded ours
    before = copy.deepcopy(dict(ours.named_buffers()))
    training = ours.training or ours.running_mean is None
    if training:
        mean, invstd = statistics(x)
    else:
        mean, invstd = in_float64(ours.running_mean), (in_float64(ours.running_var) + ours.eps).rsqrt()
    parameter_dtype = next((t.dtype for t in ours.state_dict().values()), x.dtype)
    tolerance = Tolerance(x, mean, invstd, ours.weight, parameter_dtype)

    x, x64 = x.detach().requires_grad_(), in_float64(x).requires_grad_()
    residuals = [] if residual is None else [residual.detach().requires_grad_()]
    residuals64 = [in_float64(r).requires_grad_() for r in residuals]
    y, before_activation = ours(x, *residuals), theirs(x64)
    for r in residuals64:
        before_activation = before_activation + r
    y64 = before_activation.clamp(min=0) if activation else before_activation
    biases = [] if ours.bias is None else [ours.bias.view(-1, *[1] * (x.dim() - 2))]
    assert y.dtype == x.dtype
    assert_within(y, y64, tolerance.y(y64, *biases, *residuals), "y")

    if training and ours.running_mean is not None:
        m = x.numel() // x.shape[1]
        exact, old = theirs.running_mean, before["running_mean"]
        assert_within(ours.running_mean, exact, tolerance.running_mean(exact, old), "running_mean")
        exact, old, batch = theirs.running_var, before["running_var"], (invstd**-2 - ours.eps) * m / (m - 1)
        assert_within(ours.running_var, exact, tolerance.running_var(exact, old, batch), "running_var")
    for name, old in before.items():
        if not ours.training:
            assert torch.equal(getattr(ours, name), old), name
    if ours.num_batches_tracked is not None:
        assert ours.num_batches_tracked == theirs.num_batches_tracked

    dy = torch.randn_like(y)
    passed = in_float64(dy * (y > 0)) if activation else in_float64(dy)
    inputs = [x, *residuals, *ours.parameters()]
    inputs64 = [x64, *residuals64, *theirs.parameters()]
    names = ["dx", *["dresidual"] * len(residuals), *[f"d{name}" for name, _ in ours.named_parameters()]]
    grads = torch.autograd.grad(y, inputs, dy)
    grads64 = torch.autograd.grad(before_activation, inputs64, passed)
    for name, t, grad, exact in zip(names, inputs, grads, grads64, strict=True):
        assert grad.dtype == t.dtype
        if name == "dresidual":
            assert torch.equal(in_float64(grad), exact), name
        else:
            assert_within(grad, exact, getattr(tolerance, name)(exact, passed), name)


@pytest.mark.parametrize("tracking", TRACKING, ids=str)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_options(device, dtypes, affine, tracking):
    dtype, parameter_dtype = dtypes
    for shape in SHAPES:
        for layout in (contiguous, channels_last):
            x = layout((torch.randn(shape, device=device) * 2 + 1).to(dtype))
            ours, theirs = pair(shape, parameter_dtype, device, affine, tracking)
            for training in (True, False):
                check(ours.train(training), theirs.train(training), x)


@pytest.mark.sanitize
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", [*LAYOUTS, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_layouts_and_fusion(device, dtypes, layout, activation, residual):
    dtype, parameter_dtype = dtypes
    for shape in SHAPES:
        if layout is expanded and len(shape) == 2:
            continue  # would leave no variance
        x = layout((torch.randn(shape, device=device) * 2 + 1).to(dtype))
        ours, theirs = pair(shape, parameter_dtype, device, activation=activation)
        for training in (True, False):
            for residual_layout in (contiguous, channels_last)[: 1 + residual]:
                r = residual_layout(torch.randn(shape, device=device).to(dtype)) if residual else None
                check(ours.train(training), theirs.train(training), x, r, activation)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, expanded], ids=lambda f: f.__name__)
def test_results_are_laid_out_as_torch_does(device, layout, training):
    for shape in SHAPES:
        x = layout(torch.randn(shape, device=device))
        ours, _ = pair(shape, torch.float32, device)
        # On the CPU: on CUDA torch's own answer depends on which library it picks.
        theirs, x_nn = KINDS[len(shape)][1](shape[1]), layout(torch.randn(shape))
        assert x.stride() == x_nn.stride()
        y, y_nn = ours.train(training)(x), theirs.train(training)(x_nn)
        assert y.stride() == y_nn.stride(), (shape, x.stride())
        pairs = ((ours, x.requires_grad_()), (theirs, x_nn.requires_grad_()))
        dx, dx_nn = (torch.autograd.grad(m(t), t, torch.ones_like(t))[0] for m, t in pairs)
        strides = [[t.stride(d) for d in range(t.dim()) if t.size(d) > 1] for t in (dx, dx_nn)]
        assert strides[0] == strides[1], (shape, x.stride())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 2, 2), (2, 3, 0, 2), (2, 3, 4, 0, 2)])
def test_no_values(device, shape, momentum):
    results = []
    for kind in KINDS[len(shape)]:
        m = kind(3, momentum=momentum, device=device)
        x = torch.randn(shape, device=device, requires_grad=True)
        y = m(x)
        y.sum().backward()
        z = m.eval()(x)
        results.append((y, z, x.grad, m.weight.grad, m.bias.grad, *m.buffers()))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_no_channels(device):
    """torch.nn raises IndexError here, though there is nothing wrong with nothing."""
    for training in (True, False):
        m = bnext.BatchNorm2d(0, device=device).train(training)
        x = torch.randn(2, 0, 4, 4, device=device, requires_grad=True)
        y = m(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape


def test_no_values_under_relu_and_residual(device):
    m = bnext.BatchNorm2d(3, activation="relu", device=device)
    x, r = (torch.randn(0, 3, 4, 4, device=device, requires_grad=True) for _ in range(2))
    m(x, r).sum().backward()
    assert x.grad.shape == r.grad.shape == x.shape
    assert torch.equal(m.weight.grad, torch.zeros(3, device=device))


@pytest.mark.parametrize("training", [True, False])
def test_functional_takes_torch_arguments(device, training):
    x = torch.randn(4, 3, 5, device=device)
    state = [torch.randn(3, device=device), torch.rand(3, device=device)]
    weight, bias = torch.randn(3, device=device), torch.randn(3, device=device)
    results = []
    for f in (bnext.functional.batch_norm, nn.functional.batch_norm):
        mean, var = (t.clone() for t in state)
        results.append((f(x, mean, var, weight, bias, training, 0.3, 1e-3), mean, var))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_strided_parameters_and_buffers(device, training):
    x, rows = torch.randn(4, 3, 5), torch.rand(4, 6)
    results = []
    # Torch's on the CPU: on CUDA it updates a copy of such buffers.
    for f, where in ((bnext.functional.batch_norm, device), (nn.functional.batch_norm, "cpu")):
        wide = rows.to(where, copy=True)
        mean, var, weight, bias = (row[::2] for row in wide)
        results.append((f(x.to(where), mean, var, weight.requires_grad_(), bias, training), wide.detach()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


def test_tracking_switched_off_later(device):
    """Assigned after construction, as transfer-learning code does: buffers stay but are not updated."""
    x = torch.randn(4, 3, 5, 5, device=device)
    for kind in KINDS[4]:
        m = kind(3, device=device)
        m.track_running_stats = False
        m(x)
        assert torch.equal(m.running_mean, torch.zeros(3, device=device)) and m.num_batches_tracked == 0
    assert torch.equal(m.eval()(x), nn.BatchNorm2d(3, device=device).eval()(x))


def test_autocast_keeps_the_dtype_of_the_input(device):
    dtype = torch.bfloat16
    m, theirs = bnext.BatchNorm2d(3, device=device), nn.BatchNorm2d(3, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    with torch.autocast(device, dtype):
        for t in (x, x.to(dtype)):
            assert m(t).dtype == theirs(t).dtype == t.dtype
