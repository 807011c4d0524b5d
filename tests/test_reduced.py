"""A small suite that reaches every CUDA kernel with few launches: what `make gpu` runs under
compute-sanitizer, where each launch takes seconds. Inputs are made on the CPU and copied, since the
tool watches our kernels alone and would take what torch's kernels wrote for uninitialised.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from problems import assert_exact

import bnext

pytestmark = pytest.mark.sanitize

# Shapes with the plan that they take; the CPU has none, and runs them as they are.
CASES = [
    ((4, 8, 4, 4), "automatic"),
    ((3, 5, 7, 7), "automatic"),  # planes, and pixels, that are no whole vectors
    ((33, 3), "automatic"),
    ((16, 4, 64, 64), "resident"),  # clusters
    ((4, 8, 7, 7), "resident"),  # planes that share bytes of the sign mask
    ((8, 48, 32, 32), "resident"),  # tiles in turn, of several blocks each
    ((5, 3, 63, 65), "cooperative"),
    ((16, 4, 64, 64), "two_pass"),  # several blocks a channel
    ((5, 3, 63, 65), "two_pass"),
    ((4096, 24), "two_pass"),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("fused", ["plain", "relu", "add_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planar", "interleaved"])
@pytest.mark.parametrize("shape, plan", CASES, ids=lambda v: v if isinstance(v, str) else "x".join(map(str, v)))
def test_forward_and_backward(shape, plan, channels_last, dtype, fused, device):
    if channels_last and len(shape) == 2:
        pytest.skip("(N, C) has one layout")
    if device == "cpu" and CASES.index((shape, plan)) != [s for s, _ in CASES].index(shape):
        pytest.skip("the CPU has no plans")
    forced = bnext.cuda.force_plan(plan) if device == "cuda" else contextlib.nullcontext()
    try:
        with forced:
            check(shape, channels_last, dtype, fused, device)
    except RuntimeError as error:
        if plan == "resident" and f"this shape has no plan '{plan}'" in str(error):
            pytest.skip("only in the other layout")
        raise


def check(shape, channels_last, dtype, fused, device):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def make(grad: bool = True) -> torch.Tensor:
        return torch.randn(shape).to(dtype).to(memory_format=memory_format).to(device).requires_grad_(grad)

    x, dy = make(), make(grad=False)
    residual = make() if fused == "add_relu" else None
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.rand(shape[1], dtype=of_parameters).to(device).requires_grad_() for _ in range(2))
    running = [fill(shape[1], dtype=of_parameters).to(device) for fill in (torch.zeros, torch.ones)]
    count = torch.zeros((), dtype=torch.int64).to(device)
    activation = None if fused == "plain" else "relu"
    operands = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias}
    operands = {name: t for name, t in operands.items() if t is not None}

    for training in (True, False):
        before = [t.clone() for t in running]
        y = bnext.functional.batch_norm(
            x,
            *running,
            weight,
            bias,
            training=training,
            momentum=None if training else 0.1,
            activation=activation,
            residual=residual,
            num_batches_tracked=count if training else None,
        )
        found = {"y": y, **dict(zip(operands, torch.autograd.grad(y, list(operands.values()), dy), strict=True))}
        if training:
            found |= {"running_mean": running[0], "running_var": running[1]}
        options = {"activation": activation, "residual": residual, "training": training, "momentum": 1.0}
        assert_exact(found, x, weight, bias, *before, dy=dy, **options)
    assert count.item() == 1
