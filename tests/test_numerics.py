"""The numerics contract, against bnext.reference in float64 on the same rounded inputs."""

import numpy as np
import pytest
import torch
from problems import channels_last, contiguous, eps_of

import bnext
from bnext import reference

ACC = {torch.float64: torch.float64}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
#: Both layouts, each in a size that stays whole and one that is split over blocks or tasks.
SHAPES = [(4, 3, 7, 7), (8, 5, 61, 67), (300, 70), (64, 19, 5, 5)]


def ulps(actual, exact):
    """|actual - exact| in units of actual's last place at exact."""
    exact = exact.double()
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs()))) * eps_of(actual.dtype)
    return float(((actual.double() - exact).abs() / spacing).max())


@pytest.mark.sanitize
@pytest.mark.parametrize("ratio", [0, 1, 100, 1e4], ids="{:g}".format)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_nearly_correctly_rounded(device, dtype, layout, ratio):
    """|mean| / std up to 1e4, where E[x^2] - E[x]^2 would lose all of float32. The bounds do not grow
    with the number of values."""
    if ratio == 1e4 and dtype.itemsize == 2:
        pytest.skip("16-bit floats cannot hold such data")
    for shape in SHAPES:
        x = layout((torch.randn(shape, device=device, dtype=torch.float64) + ratio).to(dtype))
        mean, var = (t.cpu().numpy() for t in bnext.ops.batch_norm_stats(x))
        exact = x.double().cpu().numpy().astype(np.longdouble)  # more exact than what float64 is checked for
        axes = (0, *range(2, x.dim()))
        assert (np.abs(var - exact.var(axes)) <= 8 * np.spacing(var)).all()
        # Where summands of either sign cancel, nothing is left of them but their rounding.
        size = mean if ratio else np.abs(exact).mean(axes).astype(mean.dtype)
        assert (np.abs(mean - exact.mean(axes)) <= 4 * np.spacing(size)).all()


def uneven(where, length):
    """Data whose parts have other means than the whole: what comes before is a bad guess at what comes next."""
    values, place = torch.randn(length, dtype=torch.float64), torch.arange(length) / length
    if isinstance(where, int):  # one outlier
        values[min(where, length - 1)] = 1e6
        return values
    if where == "plateaus":
        return torch.where(place < 0.0424, 1.0, 1.3).double()
    return (
        values * 1e-3 + {"step": place > 0.5, "early": place > 1e-3, "late": place > 0.999, "trend": place}[where] * 100
    )


@pytest.mark.parametrize("where", [0, 1, 31, 32, 2047, 2048, 2049, 10**9, "step", "early", "late", "trend", "plateaus"])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_of_uneven_data(dtype, layout, where):
    """The CPU sums up deviations from the mean of what came before, or from the block's own where that is far. 16 units
    allow for the squares that a float32 lane adds up, 32 of them, at most half a unit each. A centre from a single
    value, as planes of 2049 have blocks of one, would take thousands of units; one that is far, 60 for plateaus."""
    units = 8 if dtype == torch.float32 else 64  # of the mean; sums of blocks are added up in float64 either way
    for shape in [(3, 2, 2049), (5, 2, 4097), (40, 2, 49), (1, 2, 20000)]:
        n, _, s = shape
        x = torch.stack([uneven(where, n * s).view(n, s) for _ in range(2)], 1)
        x = layout(x.to(dtype))
        mean, var = (t.numpy() for t in bnext.ops.batch_norm_stats(x))
        exact = x.double().numpy().astype(np.longdouble)
        size = np.abs(exact).mean((0, 2)).astype(mean.dtype)
        assert (np.abs(var - exact.var((0, 2))) <= (16 if dtype == torch.float32 else 32) * np.spacing(var)).all()
        assert (np.abs(mean - exact.mean((0, 2))) <= units * np.spacing(size)).all()


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_is_within_two_ulp(device, dtype, layout):
    """Of (x - mean) * (invstd * weight) + bias, the difference taken in the accumulation type."""
    for shape in SHAPES:
        x = layout((torch.randn(shape, device=device) * 3 + 100).to(dtype))
        acc = ACC.get(dtype, torch.float32)
        mean, var = bnext.ops.batch_norm_stats(x)
        invstd = (var + 1e-5).rsqrt()
        weight = torch.rand(shape[1], device=device, dtype=acc) + 0.5
        y, _ = bnext.ops.batch_norm_normalize(x, mean, invstd, weight, None)
        per_channel = [-1] + [1] * (len(shape) - 2)
        centred = x.to(acc) - mean.view(per_channel)
        exact = centred.double() * (invstd * weight).double().view(per_channel)
        far = exact.abs() > torch.finfo(dtype).tiny
        assert ulps(y[far], exact[far]) <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean_forward_and_backward(device, dtype):
    """mean 1e4, in both layouts: y is as exact as the rounding of the mean allows."""
    acc = ACC.get(dtype, torch.float32)
    results = []
    for layout in (contiguous, channels_last):
        torch.manual_seed(1)
        x = layout((torch.randn(8, 5, 31, 33, device=device) * 64 + 1e4).to(dtype)).requires_grad_()
        dy = torch.randn(x.shape, device=device).to(dtype)
        m = bnext.BatchNorm2d(5, device=device, dtype=acc)
        y = m(x)
        y.backward(dy)
        exact = reference.forward(x)
        gradient = reference.backward(dy, x, exact.mean, exact.invstd)
        off_by_mean = 1e4 * 2 * eps_of(acc) / 64  # of xhat
        atol = off_by_mean + 8 * eps_of(dtype)
        torch.testing.assert_close(y.double(), exact.y, rtol=eps_of(dtype), atol=atol)
        torch.testing.assert_close(x.grad.double(), gradient.dx, rtol=eps_of(dtype), atol=atol)
        results.append((y, x.grad))
    for planar, interleaved in zip(*results, strict=True):
        torch.testing.assert_close(planar, interleaved, rtol=2 * eps_of(dtype), atol=2 * off_by_mean)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4, 1e18])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_give_exactly_bias(device, dtype, value):
    for shape in [(7, 3), (3, 3, 5, 5), (2, 3, 64, 65)]:
        for layout in (contiguous, channels_last):
            x = layout(torch.full(shape, value, device=device).to(dtype))
            if x.isinf().any():
                continue
            bias = torch.randn(3, device=device).to(dtype)
            y = bnext.functional.batch_norm(x, None, None, bias=bias, training=True)
            assert torch.equal(y, bias.view(-1, *[1] * (len(shape) - 2)).expand(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_of_1e18(device, dtype):
    """Their squares, but not the sum of their squares, fit into float32."""
    for layout in (contiguous, channels_last):
        x = layout((torch.randn(16, 3, 33, 35, device=device) * 1e18).to(dtype))
        exact = reference.forward(x)
        mean, var = bnext.ops.batch_norm_stats(x)
        torch.testing.assert_close(var.double(), exact.var, rtol=1e-6, atol=0)
        y = bnext.functional.batch_norm(x, None, None, training=True)
        torch.testing.assert_close(y.double(), exact.y, rtol=2 * eps_of(dtype), atol=1e-6)


def test_small_variance_keeps_eps(device):
    x = torch.randn(64, 3, device=device) * 1e-4
    for eps in (1e-5, 1e-3, 1.0):
        y = bnext.functional.batch_norm(x, None, None, training=True, eps=eps)
        torch.testing.assert_close(y.double(), reference.forward(x, eps=eps).y, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_nan_and_infinity_stay_in_their_channel(device, layout, activation):
    for poison in (float("nan"), float("inf")):
        clean = torch.randn(4, 3, 5, 7, device=device)
        x = clean.clone()
        x[1, 1, 2, 3] = poison
        y = bnext.functional.batch_norm(layout(x), None, None, training=True, activation=activation)
        expected = bnext.functional.batch_norm(layout(clean), None, None, training=True, activation=activation)
        assert y[:, 1].isnan().all()
        assert torch.equal(y[:, ::2], expected[:, ::2])


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nan_that_rounding_would_overflow_stays_one(device, layout, dtype):
    """All ones but the sign: one more in the last place is -0."""
    bias = torch.zeros(3, device=device)
    bias.view(torch.int32)[1] = 0x7FFFFFFF
    x = layout(torch.randn(4, 3, 5, 7, device=device).to(dtype))
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    y = bnext.functional.batch_norm(x, zero, one, None, bias, eps=1e-12)
    assert y[:, 1].isnan().all() and torch.equal(y[:, ::2], x[:, ::2])


def test_relu_lets_nan_pass_and_zero_not(device):
    """As torch's: its gradient is 0 where the value is not above 0, and NaN stays NaN."""
    x = torch.tensor([[-1.0], [0.0], [1.0], [float("nan")]], device=device)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    for residual in (None, torch.zeros_like(x)):
        x.requires_grad_()
        y = bnext.functional.batch_norm(x, zero, one, activation="relu", eps=0.0, residual=residual)
        torch.testing.assert_close(y, x.relu(), equal_nan=True)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx[:3, 0].tolist() == [0, 0, 1]
