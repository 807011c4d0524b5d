"""Run by test_enable_host.py, in a process of its own, with the library that tests/enable_cuda.cpp becomes."""

from __future__ import annotations

import ctypes
import itertools
import sys

import torch
from problems import DTYPES, LAYOUTS, Tolerance, assert_within, channels_last, contiguous, expanded, statistics

import bnext
from bnext._extension import extension

aten = torch.ops.aten
extension()
set_enabled = ctypes.CDLL(sys.argv[1]).set_enabled_on_cpu


def runs(count, call):
    before = bnext.kernels_run()
    result = call()
    assert bnext.kernels_run() - before == count, (bnext.kernels_run() - before, count)
    return result


def refused(call, text):
    try:
        call()
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"did not raise {text}")


def described(t):
    return tuple(t.shape), t.dtype


def problem(dtype, parameter_dtype, layout=contiguous, shape=(4, 3, 5, 6)):
    """Input, weight and bias with gradients, running mean and variance, the output's gradient."""
    x = layout(torch.randn(shape).to(dtype)).requires_grad_()
    w, b, mean, var = torch.rand(4, 3).add(0.5).to(parameter_dtype).unbind()
    return x, w.clone().requires_grad_(), b.clone().requires_grad_(), mean.clone(), var.clone(), torch.randn_like(x)


def check_gradients(found, y, x, w, b, mean, var, dy, training):
    set_enabled(False)
    inputs = [t.detach().double().requires_grad_() for t in (x, w, b)]
    y64 = torch.nn.functional.batch_norm(inputs[0], mean.double(), var.double(), *inputs[1:], training)
    exact = torch.autograd.grad(y64, inputs, dy.double())
    set_enabled(True)
    m, s = statistics(x) if training else (mean.double(), (var.double() + 1e-5).rsqrt())
    tolerance = Tolerance(x, m, s, w, w.dtype)
    assert_within(y, y64, tolerance.y(y64, b.view(-1, 1, 1)), "y")
    for of, got, wanted in zip((tolerance.dx, tolerance.dweight, tolerance.dbias), found, exact, strict=True):
        assert_within(got, wanted, of(wanted, dy))


def forward(name, x, w, b, mean, var, training):
    op = {"native": aten.native_batch_norm, "cudnn": aten.cudnn_batch_norm}[name]
    return op(x, w, b, mean.clone(), var.clone(), training, 0.1, 1e-5)


set_enabled(True)
cases = itertools.product(DTYPES, (contiguous, channels_last), ("native", "cudnn"), (True, False))
for (dtype, parameter_dtype), layout, name, training in cases:
    x, w, b, mean, var, dy = problem(dtype, parameter_dtype, layout)
    call = lambda: forward(name, x, w, b, mean, var, training)  # noqa: B023, E731
    if name == "cudnn" and parameter_dtype.itemsize == 2:
        refused(call, "cuDNN's forward")
        continue
    y, *saved = runs(1, call)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    # As batch_norm_cuda and cudnn_batch_norm have it: the latter saves nothing in evaluation.
    size = (3,) if training or name == "native" else (0,)
    assert [described(t) for t in saved[:2]] == [(size, acc)] * 2, (name, training)
    if name == "cudnn":
        assert described(saved[2]) == ((0, 1) if training else (0,), torch.uint8)
    assert y.stride() == x.stride()
    gradients = runs(1, lambda: torch.autograd.grad(y, [x, w, b], dy, retain_graph=True))  # noqa: B023
    check_gradients(gradients, y, x, w, b, mean, var, dy, training)

    if dtype.itemsize > 2:  # the stand-ins for torch's CUDA kernels expect 16-bit statistics, as on the CPU
        set_enabled(False)
        torchs = runs(0, lambda: torch.autograd.grad(y, [x, w, b], dy))  # noqa: B023
        set_enabled(True)
        torch.testing.assert_close(torchs, gradients, rtol=1e-3, atol=1e-4)

# y has the strides that empty_like gives it, whatever those of x.
for layout, shape in itertools.product([*LAYOUTS, expanded], [(4, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 2, 4, 3)]):
    x = layout(torch.randn(shape, dtype=torch.float64))
    y, *_ = runs(1, lambda: aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5))  # noqa: B023
    assert y.stride() == torch.empty_like(x).stride(), layout.__name__
    mean, invstd = statistics(x)
    torch.testing.assert_close(y, (x - mean) * invstd)

# cuDNN's forward, our backward: its bytes are of no use, what it saved is.
x, w, b, mean, var, dy = problem(torch.float32, torch.float32)
y, save_mean, save_invstd, reserve = forward("cudnn", x, w, b, mean, var, True)
bytes_of_cudnn = torch.empty(64, dtype=torch.uint8)
arguments = (w, mean, var, save_mean, save_invstd)
gradients = runs(1, lambda: aten.cudnn_batch_norm_backward(x, dy, *arguments, 1e-5, bytes_of_cudnn))
check_gradients(gradients, y, x, w, b, mean, var, dy, True)
consolidated = lambda reserve: aten.batch_norm_backward(dy, x, *arguments, True, 1e-5, (True,) * 3, reserve)  # noqa: E731
check_gradients(runs(1, lambda: consolidated(bytes_of_cudnn)), y, x, w, b, mean, var, dy, True)

# Disabled, each party's backward follows its forward; what has the bytes of cuDNN goes to cuDNN.
set_enabled(False)
refused(lambda: aten.cudnn_batch_norm_backward(x, dy, *arguments, 1e-5, bytes_of_cudnn), "cuDNN's backward")
refused(lambda: consolidated(bytes_of_cudnn), "torch's backward")
torch.testing.assert_close(aten.cudnn_batch_norm_backward(x, dy, *arguments, 1e-5, reserve), gradients)
torch.testing.assert_close(consolidated(reserve), gradients)
refused(lambda: forward("cudnn", x, w, b, mean, var, True), "cuDNN's forward")
set_enabled(True)

# What cudnn_batch_norm refuses, it goes on refusing.
for change in (
    {"x": x.transpose(2, 3)},
    {"x": torch.randn(1, 3, 2, 2, 2, 2)},
    {"w": torch.rand(6)[::2]},
    {"b": None},
    {"mean": torch.rand(6)[::2]},
):
    names = {"x": x, "w": w, "b": b, "mean": mean, "var": var} | change
    refused(lambda: aten.cudnn_batch_norm(*names.values(), True, 0.1, 1e-5), "cuDNN's forward")  # noqa: B023

# Torch's formula for the second order takes what was saved here.
x, w, b = [t.detach().double().requires_grad_() for t in (x[:, :, :2, :2], w, b)]
for training in (True, False):
    f = lambda *inputs: forward("cudnn", *inputs, mean.double(), var.double(), training)[0]  # noqa: B023, E731
    assert torch.autograd.gradcheck(f, (x, w, b)) and torch.autograd.gradgradcheck(f, (x, w, b))

print("done")
