"""Every activation, with and without a residual, against torch.nn.functional in float64: values, gradients of every
order, masks, what is kept, and the ways to name one."""

import copy
import io
import os
import pickle
import re
import subprocess
import sys
from math import isnan
from pathlib import Path
from typing import get_args

import pytest
import torch
from problems import Tolerance, assert_within, channels_last, contiguous, eps_of, in_float64, statistics
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F

import bnext
from bnext import reference
from bnext.activation import NAMES, ActivationName
from bnext.functional import batch_norm

F64 = torch.float64
SLOPE = 0.2
#: By definition of torch, not by bnext's table.
FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
PARAMS = {"leaky_relu": SLOPE}
#: Where the derivative jumps.
KINKS = {"relu": [0.0], "relu6": [0.0, 6.0], "leaky_relu": [0.0], "hardswish": [-3.0, 3.0]}
#: Activations that keep a bit an element behind a residual, and those that keep the residual.
BITS = ["relu", "relu6", "leaky_relu"]

activations = pytest.mark.parametrize("activation", FUNCTIONS)
residuals = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def named(value) -> str:
    """A test's name, without an address, which differs between the processes that share the tests out."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


layouts = pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)


def test_this_file_knows_all_of_them():
    assert set(FUNCTIONS) == set(NAMES)


def test_types_and_docs_name_all_of_them():
    """What a checker knows, and what is written where names are told."""
    assert get_args(ActivationName) == NAMES
    quoted = ", ".join(f'"{name}"' for name in NAMES[:-1]) + f' or "{NAMES[-1]}"'
    assert quoted in " ".join(bnext.functional.batch_norm.__doc__.split())
    root = Path(bnext.__file__).parent.parent
    for page in ("README.md", "docs/support.md"):
        words = re.findall(r"\w+", (root / page).read_text().lower())
        assert {name.replace("_", "") for name in NAMES} <= set(words), page


def test_the_table_in_python_is_the_list_in_core():
    """So that an activation added to one of them alone is noticed."""
    from bnext._extension import extension

    assert extension().activations == ["none", *NAMES]


# ---- against float64

#: Vectors with and without a rest; planes and rows that are longer than the buffer of the general kernels.
SHAPES = [(33, 7), (2, 3, 7, 7), (3, 16, 4, 4), (2, 2, 31, 67), (3, 5, 4), (3, 2100), (70, 3, 4, 5)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


@trainings
@residuals
@layouts
@pytest.mark.parametrize("dtypes", DTYPES, ids=named)
@activations
def test_values_and_gradients(device, activation, dtypes, layout, residual, training):
    for shape in SHAPES:
        check(device, activation, dtypes, layout, shape, residual, training)


def check(device, activation, dtypes, layout, shape, with_residual, training):
    dtype, parameter_dtype = dtypes
    f = FUNCTIONS[activation]

    def vector(low, high):
        return torch.empty(shape[1], device=device).uniform_(low, high).to(parameter_dtype)

    x = layout((torch.randn(shape, device=device) * 2 + 1).to(dtype)).requires_grad_()
    weight, bias = vector(1, 3).requires_grad_(), vector(-2, 2).requires_grad_()
    running_mean, running_var = vector(-1, 2), vector(1, 5)
    residual = layout((torch.randn(shape, device=device) * 2).to(dtype)).requires_grad_() if with_residual else None
    if training:
        mean, invstd = statistics(x)
    else:
        mean, invstd = in_float64(running_mean), (in_float64(running_var) + 1e-5).rsqrt()
    tolerance = Tolerance(x, mean, invstd, weight, parameter_dtype)
    u = tolerance.u

    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    exact = [in_float64(t).requires_grad_() for t in inputs]
    running = (None, None) if training else (in_float64(running_mean), in_float64(running_var))
    z = F.batch_norm(exact[0], *running, *exact[1:3], training=training)
    z = z + exact[3] if with_residual else z
    channels = bias.detach().view(-1, *[1] * (len(shape) - 2))
    z_off = tolerance.z(channels, *([residual] if with_residual else []))

    y = batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, activation=activation, activation_param=PARAMS.get(activation), residual=residual)  # fmt: skip
    y64 = f(z)
    assert y.dtype == dtype
    assert_within(y, y64, tolerance.activated(y64, z_off), f"y {shape}")

    # Next to a kink rounding decides which derivative is taken: no gradient arrives there.
    dy = torch.randn(shape).to(dtype)
    for kink in KINKS.get(activation, []):
        dy = dy.masked_fill((z.detach() - kink).abs() <= z_off, 0)
    dz = torch.autograd.grad(y64, z, dy.double(), retain_graph=True)[0]
    dz_off = tolerance.dz(dy, z_off)
    grads = torch.autograd.grad(y, inputs, dy.to(device))
    grads64 = torch.autograd.grad(y64, exact, dy.double())
    # Every bound is linear in |dz|, and an error of dz spreads as dz itself does.
    loud = dz.abs() + dz_off / u
    for name, grad, wanted in zip(["dx", "dweight", "dbias", "dresidual"], grads, grads64, strict=False):
        if name == "dresidual":
            bound = dz_off + tolerance.rounded(wanted, dtype) + torch.finfo(dtype).tiny
        else:
            bound = getattr(tolerance, name)(wanted, loud)
        assert_within(grad, wanted, bound, f"{name} {shape}")


#: What torch.nn.functional and bnext answer differently: infinite arguments, where bnext takes the limit.
LIMITS = {"hardswish": {-torch.inf: (0.0, 0.0)}}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=named)
@residuals
@activations
def test_special_arguments(device, activation, residual, dtype):
    """With mean 0, invstd 1 and no parameters, the argument is the input, to the bit."""
    near = [torch.nextafter(torch.tensor(k, dtype=dtype), torch.tensor(d, dtype=dtype)).item() for k in (0.0, 3.0, -3.0, 6.0) for d in (torch.inf, -torch.inf)]  # fmt: skip
    large = [s * v for s in (1, -1) for v in (1, 3, 6, 20, 88.5, 89, 104, 710, 746, 1e4, 1e30)]
    values = [0.0, -0.0, *near, *large, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30]
    z = torch.tensor(values, dtype=dtype, device=device).reshape(-1, 1)
    zero, one = torch.zeros(1, dtype=dtype, device=device), torch.ones(1, dtype=dtype, device=device)
    leaf = z.clone().requires_grad_()
    x, r = (torch.zeros_like(z), leaf) if residual else (leaf, None)
    y = batch_norm(x, zero, one, eps=0.0, activation=activation, activation_param=PARAMS.get(activation), residual=r)
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))

    exact = in_float64(z).requires_grad_()
    wanted = FUNCTIONS[activation](exact)
    (wanted_grad,) = torch.autograd.grad(wanted, exact, torch.ones_like(wanted))
    for i, v in enumerate(values):
        if v in LIMITS.get(activation, {}):
            assert (y[i].item(), grad[i].item()) == LIMITS[activation][v]
            continue
        # Of an infinite argument and of NaN the value counts; a derivative there is whatever the formula gives.
        compared = [(y, wanted)] if not torch.isfinite(z[i]) else [(y, wanted), (grad, wanted_grad)]
        for ours, theirs in compared:
            got, expected = ours[i].item(), theirs[i].to(dtype).item()
            size = max(abs(expected), min(abs(v), 1.0)) if ours is y else 1 + abs(v) * (abs(v) < 800)
            off = Tolerance.STEPS[torch.float32] * eps_of(dtype) * size + torch.finfo(dtype).tiny
            same = got == expected or (isnan(got) and isnan(expected)) or abs(got - expected) <= off
            assert same, f"{'value' if ours is y else 'derivative'} at {v!r} is {got!r}, not {expected!r}"


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_no_gradient_where_the_derivative_is_0(device, activation):
    """Not even of an infinite one, which relu6's 0 would make NaN: as in torch."""
    x = torch.full((4, 2), -5.0, device=device, requires_grad=True)
    zero, one = torch.zeros(2, device=device), torch.ones(2, device=device)
    for residual in (None, torch.zeros(4, 2, device=device)):
        y = batch_norm(x, zero, one, activation=activation, residual=residual)
        (dx,) = torch.autograd.grad(y, x, torch.full_like(y, torch.inf))
        assert torch.equal(dx, torch.zeros_like(dx))


@residuals
@activations
def test_nan_stays_in_its_channel(device, activation, residual):
    x = torch.randn(5, 3, 4, 5, device=device)
    x[2, 1, 3, 1] = torch.nan
    clean = x.nan_to_num(0.0)
    r = torch.randn_like(x) if residual else None
    for layout in (contiguous, channels_last):
        results = []
        for t in (x, clean):
            leaf = layout(t).requires_grad_()
            y = batch_norm(leaf, None, None, training=True, activation=activation, residual=r)
            results.append((y, torch.autograd.grad(y, leaf, torch.ones_like(y))[0]))
        for broken, whole in zip(*results, strict=True):
            assert broken[:, 1].isnan().all()
            assert torch.equal(broken[:, ::2], whole[:, ::2])


# ---- what is kept


@layouts
@pytest.mark.parametrize("activation", BITS)
def test_mask_says_where_the_derivative_is_1(device, activation, layout):
    x = layout(torch.randn(3, 5, 3, 3, device=device) * 4)
    residual = torch.randn_like(x) * 4
    mean, invstd = torch.zeros(5, device=device), torch.ones(5, device=device)
    arguments = (x, mean, invstd, None, None, residual, activation, PARAMS.get(activation, 0.0))
    _, mask = bnext.ops.batch_norm_normalize(*arguments, True)
    z = (x + residual).requires_grad_()
    (slope,) = torch.autograd.grad(FUNCTIONS[activation](z), z, torch.ones_like(z))
    in_memory = (slope == 1 if layout is contiguous else (slope == 1).movedim(1, -1)).flatten()
    bits = mask.unsqueeze(1).bitwise_right_shift(torch.arange(8, device=device)).bitwise_and(1).flatten().bool()
    assert 0 < in_memory.sum() < in_memory.numel()
    assert torch.equal(bits[: x.numel()], in_memory) and not bits[x.numel() :].any()


@activations
def test_mask_is_empty_where_no_bit_is_kept(device, activation):
    x, ones = torch.randn(4, 3, device=device), torch.ones(3, device=device)
    param = PARAMS.get(activation, 0.0)
    _, mask = bnext.ops.batch_norm_normalize(x, ones, ones, None, None, x, activation, param, True)
    assert mask.numel() == (2 if activation in BITS else 0)


@layouts
@trainings
@pytest.mark.parametrize("activation", BITS)
def test_a_mask_and_the_residual_say_the_same(device, activation, training, layout):
    """The operators take either, so that who composes stages may keep what is at hand."""
    x, dy, residual = (layout(torch.randn(6, 3, 5, 7, device=device) * 4) for _ in range(3))
    weight, bias = torch.rand(3, device=device) + 0.5, torch.randn(3, device=device)
    mean, invstd = (t.flatten().float().to(device) for t in statistics(x))
    param = PARAMS.get(activation, 0.0)
    _, mask = bnext.ops.batch_norm_normalize(x, mean, invstd, weight, bias, residual, activation, param, True)
    by_mask, by_residual = (
        bnext.ops.batch_norm_backward(dy, x, weight, bias, mean, invstd, *kept, activation, param, training, [True] * 4)
        for kept in ((mask, None), (None, residual))
    )
    for a, b in zip(by_mask, by_residual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
    assert torch.equal(by_mask[3], by_residual[3])


@trainings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
@activations
def test_only_what_the_backward_needs_is_saved(device, activation, dtype, training):
    c, numel = 8, 4 * 8 * 9 * 9
    x = torch.randn(4, c, 9, 9, device=device).to(dtype).requires_grad_()
    residual = torch.randn_like(x)
    behind_a_residual = numel // 8 if activation in BITS else numel * dtype.itemsize
    for r, extra in ((None, 0), (residual, behind_a_residual)):
        m = bnext.BatchNorm2d(c, activation=activation, device=device).train(training)
        kept = {}

        def pack(t, kept=kept):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            m(x, r)
        for t in (x, *m.parameters()):
            kept.pop(t.data_ptr(), None)
        assert sum(kept.values()) == 2 * 4 * c + extra
        assert (residual.data_ptr() in kept) == (r is not None and activation not in BITS)


# ---- gradients of every order


def arguments(device, residual, layout=contiguous, shape=(3, 2, 2, 3)):
    x = layout(torch.randn(shape, dtype=F64, device=device)).requires_grad_()
    weight = (torch.rand(2, dtype=F64, device=device) + 0.5).requires_grad_()
    bias = torch.randn(2, dtype=F64, device=device).requires_grad_()
    return x, weight, bias, torch.randn(shape, dtype=F64, device=device).requires_grad_() if residual else None


def function(training, activation, device):
    mean, var = torch.randn(2, dtype=F64, device=device), torch.rand(2, dtype=F64, device=device) + 0.5

    def f(x, weight, bias, residual):
        return batch_norm(x, mean.clone(), var.clone(), weight, bias, training, activation=activation, activation_param=PARAMS.get(activation), residual=residual)  # fmt: skip

    return f


@trainings
@residuals
@activations
def test_first_and_second_derivatives(device, activation, residual, training):
    f = function(training, activation, device)
    args = arguments(device, residual)
    assert gradcheck(f, args)
    assert gradgradcheck(f, args)


@trainings
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_second_derivatives_without_parameters(device, activation, missing, training):
    f = function(training, activation, device)
    x, weight, bias, residual = arguments(device, True, channels_last)
    args = x, None if missing != "bias" else weight, None if missing != "weight" else bias, residual
    assert gradcheck(f, args)
    assert gradgradcheck(f, args)


@trainings
@pytest.mark.parametrize("activation", ["silu", "sigmoid", "tanh"])
def test_third_derivatives(device, activation, training):
    f = function(training, activation, device)
    args = arguments(device, True)

    def penalty_gradient(x, weight, bias, residual):
        (dx,) = torch.autograd.grad(f(x, weight, bias, residual).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), residual, create_graph=True)[0]

    assert gradcheck(penalty_gradient, args)


@residuals
@activations
def test_any_subset_of_gradients(device, activation, residual):
    """Each argument alone: the same numbers as all together, with and without a graph of the backward."""
    f = function(True, activation, device)
    args = arguments(device, residual)
    present = [i for i, a in enumerate(args) if a is not None]
    y = f(*args)
    dy = torch.randn_like(y)
    everything = torch.autograd.grad(y, [args[i] for i in present], dy)
    for wanted, expected in zip(present, everything, strict=True):
        some = [None if a is None else a.detach().requires_grad_(i == wanted) for i, a in enumerate(args)]
        for create_graph in (False, True):
            (grad,) = torch.autograd.grad(f(*some), some[wanted], dy, create_graph=create_graph)
            torch.testing.assert_close(grad, expected)


# ---- as operators and in graphs


@layouts
@activations
def test_opcheck(device, activation, layout):
    x, dy, residual = (layout(torch.randn(4, 3, 5, 6, device=device)) for _ in range(3))
    weight, bias = torch.rand(3, device=device) + 0.5, torch.randn(3, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    act = (activation, PARAMS.get(activation, 0.0))
    ops = bnext.ops
    opcheck(ops.batch_norm.default, (*leaves[:3], None, None, None, residual, True, None, 1e-5, *act))
    x, weight, bias, residual = (t.detach() for t in leaves)
    forward = (x, weight, bias, None, None, None, residual, 0.1, 1e-5, *act, True)
    opcheck(ops.batch_norm_forward.default, forward)
    _, mean, invstd, mask = ops.batch_norm_forward(*forward)
    kept = (mask, None) if activation in BITS else (None, residual)
    stage = (dy, x, mean, invstd, weight, bias, *kept)
    opcheck(ops.batch_norm_backward_reduce.default, (*stage, *act))
    sums = ops.batch_norm_backward_reduce(*stage, *act)[:2]
    opcheck(ops.batch_norm_backward_input.default, (*stage, *sums, x.numel() // 3, *act))
    dx, dresidual = ops.batch_norm_backward_input(*stage, *sums, x.numel() // 3, *act)
    whole = (dy, x, weight, bias, mean, invstd, *kept, *act, True, [True] * 4)
    opcheck(ops.batch_norm_backward.default, whole)
    expected = ops.batch_norm_backward(*whole)
    torch.testing.assert_close((dx, dresidual), (expected[0], expected[3]))
    exact = reference.backward(dy, x, mean, invstd, weight, bias, activation=activation, activation_param=PARAMS.get(activation), residual=residual)  # fmt: skip
    torch.testing.assert_close(dx.double(), exact.dx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dresidual.double(), exact.dresidual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [nn.SiLU(), F.hardswish, torch.tanh, nn.LeakyReLU(0.3), "relu6"], ids=named)
def test_in_a_graph(device, activation):
    torch._dynamo.reset()
    x = torch.randn(4, 3, 5, device=device)
    m = bnext.BatchNorm1d(3, activation=activation, device=device)

    def f(x):
        return m(x, x) + batch_norm(x, None, None, training=True, activation=activation)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ys = [g(leaf) for g, leaf in zip((compiled, f), leaves, strict=True)]
    torch.testing.assert_close(*ys)
    grads = [torch.autograd.grad(y.sin().sum(), leaf)[0] for y, leaf in zip(ys, leaves, strict=True)]
    torch.testing.assert_close(*grads)


PROGRAM = """
import sys, torch, bnext
torch.manual_seed(0)
results = []
for activation in bnext.activation.NAMES:
    for shape in ((4, 3, 9, 11), (33, 19)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for residual in (False, True):
                x = torch.randn(shape).to(dtype).requires_grad_()
                r = torch.randn(shape).to(dtype).requires_grad_() if residual else None
                y = bnext.functional.batch_norm(x, None, None, training=True, activation=activation, residual=r)
                results += [y.detach(), *torch.autograd.grad(y.square().sum(), [x] + [r] * residual)]
torch.save(results, sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path):
    """Portable code has no fused multiply-add, and differs by roundings."""
    results = []
    best = {name: value for name, value in os.environ.items() if name != "BNEXT_CPU"}
    for name, environ in (("best", best), ("portable", {**best, "BNEXT_CPU": "portable"})):
        subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / name)], env=environ, check=True)
        results.append(torch.load(tmp_path / name))
    for a, b in zip(*results, strict=True):
        unit = eps_of(a.dtype)
        torch.testing.assert_close(a, b, rtol=8 * unit, atol=100 * unit if a.dtype == torch.bfloat16 else 1000 * unit)


# ---- naming one


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        *[(name, name) for name in FUNCTIONS],
        *[(c, n) for c, n in ((nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.LeakyReLU, "leaky_relu"), (nn.SiLU, "silu"))],
        *[(c, n) for c, n in ((nn.Hardswish, "hardswish"), (nn.Sigmoid, "sigmoid"), (nn.Tanh, "tanh"))],
        *[(f, f.__name__) for f in (F.relu, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.sigmoid, F.tanh)],
        *[(f, f.__name__) for f in (torch.relu, torch.sigmoid, torch.tanh, torch.Tensor.relu)],
        (nn.ReLU(inplace=True), "relu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.ReLU6(), "relu6"),
        (nn.Tanh(), "tanh"),
        (None, None),
        (nn.Identity, None),
        (nn.Identity(), None),
    ],
    ids=named,
)
def test_every_way_to_name_one(activation, name):
    m = bnext.BatchNorm2d(3, activation=activation)
    assert m.activation == name and m.activation_param == (0.01 if name == "leaky_relu" else None)
    assert list(m.children()) == []
    x = torch.randn(2, 3, 4, 4)
    expected = batch_norm(x, None, None, m.weight, m.bias, True, activation=name)
    assert torch.equal(m(x), expected)
    assert torch.equal(batch_norm(x, None, None, training=True, activation=activation), expected)
    other = bnext.BatchNorm2d(3, activation="leaky_relu", activation_param=0.5)
    other.activation = activation
    assert (other.activation, other.activation_param, list(other.children())) == (name, m.activation_param, [])
    assert torch.equal(other(x), expected)


class Mine(nn.ReLU):
    pass


def changed(module, **attributes):
    vars(module).update(attributes)
    return module


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


LISTED = r"activation should be None, 'relu', 'relu6', 'leaky_relu', 'silu', .*nn.Tanh.*, not "


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("swish", LISTED + "'swish'"),
        ("none", LISTED + "'none'"),
        ("", LISTED + "''"),
        (1, LISTED + "1"),
        ([], LISTED),
        (nn.GELU(), LISTED + r"GELU\("),
        (nn.GELU, LISTED + "<class"),
        (Mine(), LISTED + r"Mine\("),
        (F.gelu, LISTED + "<built-in"),
        (lambda z: z, LISTED + "<function"),
        (changed(nn.ReLU6(), max_val=5.0), "max_val=5.0, where only 6.0 is fused"),
        (changed(nn.SiLU(), qconfig="int8"), "qconfig='int8', where only None is fused"),
        (changed(nn.SiLU(), forward=torch.abs), r"activation SiLU\(\) has a forward of its own"),
        (hooked(nn.SiLU()), r"activation SiLU\(\) has hooks"),
    ],
    ids=named,
)
def test_what_is_refused(activation, message):
    with pytest.raises(ValueError, match=message):
        bnext.BatchNorm2d(3, activation=activation)
    with pytest.raises(ValueError, match=message):
        batch_norm(torch.randn(4, 3), None, None, training=True, activation=activation)
    m = bnext.BatchNorm2d(3, activation="relu")
    with pytest.raises(ValueError, match=message):
        m.activation = activation
    assert m.activation == "relu"


@pytest.mark.parametrize(
    "activation",
    [changed(nn.ReLU6(), max_val=5.0), changed(nn.SiLU(), forward=torch.abs), hooked(nn.SiLU())],
    ids=named,
)
def test_what_is_refused_in_a_graph(activation):
    torch._dynamo.reset()

    def f(x):
        return batch_norm(x, None, None, training=True, activation=activation)

    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException)):
        torch.compile(f, fullgraph=True, backend="eager")(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("activation", "param", "error", "message"),
    [
        ("silu", 0.1, ValueError, "activation_param should be None for 'silu', which has no parameter, not 0.1"),
        (None, 0.1, ValueError, "activation_param should be None for None"),
        ("leaky_relu", "0.1", TypeError, "activation_param should be a number, not '0.1'"),
        (nn.LeakyReLU(0.2), 0.1, ValueError, "activation_param should be None or 0.2 for LeakyReLU"),
    ],
    ids=named,
)
def test_parameters_that_are_refused(activation, param, error, message):
    with pytest.raises(error, match=message):
        bnext.BatchNorm2d(3, activation=activation, activation_param=param)


def test_operators_refuse_what_does_not_belong(device):
    x, ones = torch.randn(8, 3, device=device), torch.ones(3, device=device)
    mask = torch.zeros(3, dtype=torch.uint8, device=device)
    ops = bnext.ops
    with pytest.raises(ValueError, match="activation should be 'none', 'relu', .* or 'tanh', not 'gelu'"):
        ops.batch_norm_normalize(x, ones, ones, None, None, None, "gelu")
    with pytest.raises(ValueError, match="activation_param should be 0 for 'silu', which has no parameter, not 0.5"):
        ops.batch_norm_normalize(x, ones, ones, None, None, None, "silu", 0.5)
    with pytest.raises(RuntimeError, match="mask is for an activation that keeps a bit an element, not 'silu'"):
        ops.batch_norm_backward_reduce(x, x, ones, ones, None, None, mask, None, "silu")
    with pytest.raises(RuntimeError, match="mask and residual say the same"):
        ops.batch_norm_backward_reduce(x, x, ones, ones, None, None, mask, x, "relu")
    with pytest.raises(RuntimeError, match="residual is not needed here without an activation"):
        ops.batch_norm_backward_reduce(x, x, ones, ones, None, None, None, x, "none")
    with pytest.raises(RuntimeError, match="residual should have the shape of input"):
        ops.batch_norm_backward_reduce(x, x, ones, ones, None, None, None, x[:2], "silu")
    with pytest.raises(RuntimeError, match="mask or residual is needed for the gradient of residual"):
        ops.batch_norm_backward(x, x, None, None, ones, ones, None, None, "silu", 0.0, True, [True] * 4)


@activations
def test_a_layer_keeps_its_activation(activation):
    m = bnext.BatchNorm2d(3, activation=activation, activation_param=PARAMS.get(activation))
    shown = f"activation={activation!r}" + (f", activation_param={SLOPE}" if activation in PARAMS else "")
    assert repr(m) == repr(nn.BatchNorm2d(3))[:-1] + f", {shown})"
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    plain, restored = nn.BatchNorm2d(3), copy.deepcopy(m)
    plain.load_state_dict(m.state_dict())
    restored.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 4)
    expected = FUNCTIONS[activation](plain(x) + x)
    copies = [copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False), restored]
    for c in copies:
        assert repr(c) == repr(m)
        torch.testing.assert_close(c(x, x), expected)
