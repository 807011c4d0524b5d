"""torch.ops.bnext: what torch expects of an operator, and what the stages compose to."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from problems import channels_last, contiguous
from torch.library import opcheck

import bnext
from bnext import reference

OPS = bnext.ops


def problem(device, layout=contiguous, dtype=torch.float32, shape=(4, 3, 5, 6)):
    x, dy, residual = (layout(torch.randn(shape, device=device).to(dtype)) for _ in range(3))
    weight, bias = torch.rand(3, device=device) + 0.5, torch.randn(3, device=device)
    return x, dy, residual, weight, bias


def buffers(device):
    zeros = torch.zeros(3, device=device)
    return zeros, torch.ones_like(zeros), torch.zeros((), dtype=torch.int64, device=device)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_opcheck_batch_norm(device, layout, training):
    x, _, residual, weight, bias = problem(device, layout)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    opcheck(OPS.batch_norm.default, (*leaves[:3], *buffers(device), residual, training, None, 1e-5, "relu"))
    opcheck(OPS.batch_norm.default, (x, None, bias, *buffers(device)[:2], None, None, training, 0.1, 1e-5))


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_opcheck_forward(device, layout):
    x, _, residual, weight, bias = problem(device, layout)
    opcheck(
        OPS.batch_norm_forward.default, (x, weight, bias, *buffers(device), residual, None, 1e-5, "relu", 0.0, True)
    )
    opcheck(OPS.batch_norm_forward.default, (x, None, None, None, None, None, None, 0.1, 1e-5))
    mean, var, _ = buffers(device)
    opcheck(OPS.batch_norm_forward_eval.default, (x, weight, bias, mean, var, residual, 1e-5, "relu", 0.0, True, True))
    opcheck(OPS.batch_norm_forward_eval.default, (x, weight, None, mean, var, None, 1e-5))


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_opcheck_stages(device, layout):
    x, dy, residual, weight, bias = problem(device, layout)
    opcheck(OPS.batch_norm_stats.default, (x,))
    _, mean, invstd, mask = OPS.batch_norm_forward(
        x, weight, bias, None, None, None, residual, 0.1, 1e-5, "relu", 0.0, True
    )
    opcheck(OPS.batch_norm_normalize.default, (x, mean, invstd, weight, bias, residual, "relu", 0.0, True))
    opcheck(OPS.batch_norm_normalize.default, (x, mean, invstd, None, None))
    opcheck(OPS.batch_norm_backward_reduce.default, (dy, x, mean, invstd, weight, bias, mask, None, "relu"))
    sums = OPS.batch_norm_backward_reduce(dy, x, mean, invstd, weight, bias, mask, None, "relu")[:2]
    opcheck(
        OPS.batch_norm_backward_input.default,
        (dy, x, mean, invstd, weight, bias, mask, None, *sums, x.numel() // 3, "relu"),
    )


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_opcheck_backward(device, layout):
    x, dy, residual, weight, bias = problem(device, layout)
    _, mean, invstd, mask = OPS.batch_norm_forward(
        x, weight, bias, None, None, None, residual, 0.1, 1e-5, "relu", 0.0, True
    )
    for training in (True, False):
        opcheck(
            OPS.batch_norm_backward.default,
            (dy, x, weight, bias, mean, invstd, mask, None, "relu", 0.0, training, [True] * 4),
        )
    only_dx = [True, False, False, False]
    opcheck(
        OPS.batch_norm_backward.default, (dy, None, weight, None, mean, invstd, None, None, "none", 0.0, False, only_dx)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_stages_compose_to_a_synchronised_batch_norm(device, layout, dtype, with_residual):
    """Two uneven parts of a batch, their statistics merged by Chan's formula and their sums added,
    give what the whole batch gives."""
    x, dy, residual, weight, bias = problem(device, layout, dtype, (7, 3, 5, 6))
    weight, bias = (t.double() if dtype == torch.float64 else t for t in (weight, bias))
    residual = residual if with_residual else None
    cut = [slice(0, 2), slice(2, 7)]
    counts = [x[part].numel() // 3 for part in cut]
    total = sum(counts)

    means, variances = zip(*(OPS.batch_norm_stats(x[part]) for part in cut), strict=True)
    mean = sum(m * (n / total) for m, n in zip(means, counts, strict=True))
    parts = zip(means, variances, counts, strict=True)
    var = sum((v + (m - mean).square()) * (n / total) for m, v, n in parts)
    invstd = (var + 1e-5).rsqrt()
    exact = reference.forward(x, weight, bias, residual=residual, activation="relu")
    torch.testing.assert_close(var.double(), exact.var, rtol=1e-5, atol=1e-6)

    ys, masks, sums = [], [], []
    for part in cut:
        r = None if residual is None else residual[part]
        y, mask = OPS.batch_norm_normalize(x[part], mean, invstd, weight, bias, r, "relu", 0.0, with_residual)
        mask = mask if with_residual else None
        ys.append(y)
        masks.append(mask)
        sums.append(OPS.batch_norm_backward_reduce(dy[part], x[part], mean, invstd, weight, bias, mask, None, "relu"))
    y = torch.cat(ys)
    tight = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(y.double(), exact.y, **tight)

    sum_dy, sum_dy_xmu, dweight, dbias = (torch.stack(s).sum(0) for s in zip(*sums, strict=True))
    gradient = reference.backward(dy * (y > 0), x, exact.mean, exact.invstd, weight)
    torch.testing.assert_close(dweight.double(), gradient.dweight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dbias.double(), gradient.dbias, rtol=1e-4, atol=1e-4)
    for part, mask in zip(cut, masks, strict=True):
        operands = dy[part], x[part], mean, invstd, weight, bias, mask, None
        dx, dresidual = OPS.batch_norm_backward_input(*operands, sum_dy, sum_dy_xmu, total, "relu")
        torch.testing.assert_close(dx.double(), gradient.dx[part], **tight)
        if with_residual:
            torch.testing.assert_close(dresidual.double(), gradient.dresidual[part], rtol=0, atol=0)
        # Where only the device knows the total:
        same, _ = OPS.batch_norm_backward_input(*operands, sum_dy / total, sum_dy_xmu / total, 1, "relu")
        torch.testing.assert_close(same, dx, **tight)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_opcheck_of_statistics_of_several_processes(device, layout):
    x, *_ = problem(device, layout)
    opcheck(OPS.batch_norm_local_stats.default, (x,))
    stats = torch.stack([OPS.batch_norm_local_stats(part) for part in x.split(2)])
    opcheck(OPS.batch_norm_merge.default, (stats, *buffers(device), None, 1e-5))
    opcheck(OPS.batch_norm_merge.default, (stats, None, None, None, 0.1, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_merge_is_the_whole_batch(device, dtype, momentum):
    """Also for means far from 0, of parts that are far from each other, and for parts without values."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(9, 3, 4, 5, device=device) + torch.tensor([0.0, 30.0, -50.0], device=device)[:, None, None]).to(
        dtype
    )
    x[:4, 0] += 20
    running = [torch.randn(3, device=device).to(dtype), torch.rand(3, device=device).to(dtype)]
    expected = reference.forward(x, None, None, *running, momentum=0.25 if momentum is None else momentum)
    counter = torch.tensor(3, device=device)
    stats = torch.stack([OPS.batch_norm_local_stats(part) for part in x.split([4, 0, 1, 4])])
    mean, var = OPS.batch_norm_stats(x[:4])
    assert torch.equal(stats[0, :3], mean) and torch.equal(stats[0, 6:], torch.cat([var, var.new_tensor([0.0, 80.0])]))
    exact = x[:4].double().cpu().numpy().astype(np.longdouble).mean((0, 2, 3))
    two_parts = stats[0, :6].double().cpu().numpy().astype(np.longdouble).reshape(2, 3).sum(0)
    rest = 4 * torch.finfo(acc).eps * var.double().sqrt().cpu().numpy()
    assert (np.abs(two_parts - exact) <= rest).all() and not stats[1].any()
    version = running[0]._version
    mean, invstd, count = OPS.batch_norm_merge(stats, *running, counter, momentum, 1e-5)
    assert mean.dtype == invstd.dtype == acc
    assert count.dtype == torch.int64 and count.shape == () and count == 180 and counter == 4
    assert running[0]._version > version
    u = 8 * torch.finfo(acc).eps
    torch.testing.assert_close(mean.double(), expected.mean, rtol=u, atol=u)
    torch.testing.assert_close(invstd.double(), expected.invstd, rtol=u, atol=0)
    u = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(running[0].double(), expected.running_mean, rtol=u, atol=u)
    torch.testing.assert_close(running[1].double(), expected.running_var, rtol=u, atol=0)


@pytest.mark.parametrize("far", [0, 100, 1e4])
def test_merge_of_means_far_from_0(device, far):
    """The numerics contract, of parts: to ulp of float32, as of a whole batch."""
    for seed in range(5):
        torch.manual_seed(seed)
        x = (torch.randn(20000, 16, dtype=torch.float64, device=device) + far).float()
        stats = torch.stack([OPS.batch_norm_local_stats(part) for part in x.split(10000)])
        mean, invstd, _ = OPS.batch_norm_merge(stats, None, None, None, 0.1, 1e-30)
        var, exact = torch.var_mean(x.double(), 0, correction=0)
        ulp = torch.finfo(torch.float32).eps
        assert ((mean.double() - exact).abs() <= 4 * ulp * torch.maximum(exact.abs(), var.sqrt())).all()
        assert ((invstd.double() ** -2 - var).abs() <= 8 * ulp * var).all()


def test_merge_ignores_what_ranks_without_values_say(device):
    stats = torch.tensor([[torch.nan, 0.0, torch.inf, 0, 0], [5.0, 0.0, 2.0, 0, 7]], device=device)
    mean, invstd, count = OPS.batch_norm_merge(stats, None, None, None, 0.1, 1e-5)
    assert (mean.item(), count.item()) == (5, 7)
    assert invstd.item() == (1 / torch.tensor(2 + 1e-5).sqrt()).item()


def test_merge_of_nothing_leaves_the_running_statistics(device):
    mean, var, counter = buffers(device)
    _, _, count = OPS.batch_norm_merge(torch.zeros(2, 11, device=device), mean, var, counter, 0.1, 1e-5)
    assert count == 0 and counter == 1 and not mean.any() and bool((var == 1).all())


def test_merge_counts_beyond_float32(device):
    """2^24 + 1 is no float32."""
    big = 2**24 + 1
    stats = torch.tensor([[0.0, 0, 1, 1, 1], [0.0, 0, 1, 0, 1], [3.0, 0, 0, 2.0**20, 12345]], device=device)
    _, _, count = OPS.batch_norm_merge(stats, None, None, None, 0.1, 1e-5)
    assert count.item() == big + 1 + 2**44 + 12345
    x = torch.zeros(1, 1, device=device).expand(big, 1)
    assert OPS.batch_norm_local_stats(x).tolist() == [0, 0, 0, 1, 1]


def test_merge_of_one_value(device):
    if device != "cpu":
        pytest.skip("only the device knows how many there are")
    mean, var, counter = buffers(device)
    stats = torch.stack([OPS.batch_norm_local_stats(torch.randn(n, 3)) for n in (1, 0)])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got one from all"):
        OPS.batch_norm_merge(stats, mean, var, counter, 0.1, 1e-5)
    assert counter == 0 and not mean.any()


def test_merge_errors(device):
    stats = torch.zeros(2, 11, device=device)
    mean, var, counter = buffers(device)
    for words, kind, arguments in [
        (r"stats should be of shape \(ranks, 3 \* channels \+ 2\), not \[2, 10\]", RuntimeError, (stats[:, 1:], None, None, None, 0.1, 1e-5)),
        ("stats should be float32 or float64, not float16", RuntimeError, (stats.half(), None, None, None, 0.1, 1e-5)),
        ("running_mean should contain 3 elements not 2", RuntimeError, (stats, mean[:2], var, counter, 0.1, 1e-5)),
        ("running_mean and running_var must either both", ValueError, (stats, mean, None, counter, 0.1, 1e-5)),
        ("running_var should be float32, float16 or bfloat16 beside stats of float32, not float64", RuntimeError, (stats, mean, var.double(), counter, 0.1, 1e-5)),
        ("running_var should have the dtype of running_mean", RuntimeError, (stats, mean, var.half(), counter, 0.1, 1e-5)),
        ("num_batches_tracked should be int64", RuntimeError, (stats, mean, var, counter.int(), 0.1, 1e-5)),
        ("momentum=None averages over all batches", ValueError, (stats, mean, var, None, None, 1e-5)),
        ("eps must be positive", ValueError, (stats, mean, var, counter, 0.1, 0.0)),
        ("eps must be positive in float32", ValueError, (stats, mean, var, counter, 0.1, 1e-46)),
    ]:  # fmt: skip
        with pytest.raises(kind, match=words):
            OPS.batch_norm_merge(*arguments)
    assert counter == 0 and not mean.any()


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_mask_is_one_bit_an_element_in_memory_order(device, layout):
    x = layout(torch.randn(3, 5, 3, 3, device=device))
    residual = torch.randn(3, 5, 3, 3, device=device)
    mean, invstd = torch.zeros(5, device=device), torch.ones(5, device=device)
    _, mask = OPS.batch_norm_normalize(x, mean, invstd, None, None, residual, "relu", 0.0, True)
    passed = (x + residual) > 0
    in_memory = (passed if layout is contiguous else passed.movedim(1, -1)).flatten()
    bits = mask.unsqueeze(1).bitwise_right_shift(torch.arange(8, device=device)).bitwise_and(1).flatten().bool()
    assert mask.numel() == (x.numel() + 7) // 8
    assert torch.equal(bits[: x.numel()], in_memory) and not bits[x.numel() :].any()


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
def test_there_is_no_mask_without_a_residual(device, activation):
    """A backward finds the activation's argument from x."""
    x, stats = torch.randn(3, 5, 3, 3, device=device), torch.ones(5, device=device)
    *_, mask = OPS.batch_norm_normalize(x, stats, stats, None, None, None, activation, 0.0, True)
    training = OPS.batch_norm_forward(x, None, None, None, None, None, None, 0.1, 1e-5, activation, 0.0, True)
    evaluation = OPS.batch_norm_forward_eval(x, None, None, stats, stats, None, 1e-5, activation, 0.0, True, True)
    assert mask.numel() == training[-1].numel() == evaluation[-1].numel() == 0


def test_meta_tensors(device):
    """Shapes without data, as in deferred initialisation."""
    m = bnext.BatchNorm2d(3, activation="relu", device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True).to(memory_format=torch.channels_last)
    y = m(x)
    assert y.is_meta and y.stride() == x.stride()
    with pytest.raises(RuntimeError, match="weight should contain 5 elements not 3"):
        m(torch.empty(2, 5, 4, 4, device="meta"))


def test_vmap_over_functional_stages(device):
    x = torch.randn(2, 4, 3, 5, device=device)
    means, _ = torch.vmap(OPS.batch_norm_stats)(x)
    torch.testing.assert_close(means, x.mean((1, 3)))


def test_gpu_tensor_in_a_cpu_build_says_how_to_rebuild():
    from bnext._extension import extension

    if extension().with_cuda:
        pytest.skip("this build has CUDA kernels")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        RuntimeError, match=r"bnext::batch_norm_stats: got a CUDA tensor.*pip install --no-build-isolation"
    ):
        OPS.batch_norm_stats.default.redispatch(cuda, torch.randn(2, 3))


# ---- the first call


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_first_call_is_compiled(dynamic):
    """The Python dispatcher, which torch.compile asks, may have met the operator before the extension had registered
    kernels, and remembers what it has met."""
    code = f"""
import torch, bnext
f = torch.compile(lambda x: torch.ops.bnext.batch_norm_stats(x), backend="aot_eager", fullgraph=True, dynamic={dynamic})
x = torch.randn(4, 3, 5)
torch.testing.assert_close(f(x)[0], x.mean((0, 2)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
