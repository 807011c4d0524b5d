"""PyTorch's own samples of batch norm, as its ModuleInfo and OpInfo suites have them, against bnext."""

import copy

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map_only

import bnext
from bnext.functional import batch_norm

modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)

MODULES = [i for i in modules.module_db if "BatchNorm" in i.name and "Sync" not in i.name]
OPERATOR = next(op for op in invocations.op_db if op.name == "nn.functional.batch_norm")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_modules(device, info, training):
    tried = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for sample in info.module_inputs_func(info, device, dtype, requires_grad=True, training=training):
            arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
            ours = getattr(bnext, info.module_cls.__name__)(*arguments, device=device, dtype=dtype, **options)
            theirs = info.module_cls(*arguments, device=device, dtype=torch.float64, **options)
            (x,) = sample.forward_input.args
            x64 = x.detach().double().requires_grad_()
            ours.train(training), theirs.train(training)
            y, exact = ours(x), theirs(x64)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(y.double(), exact, rtol=8 * eps, atol=32 * eps)
            assert y.dtype == dtype and type(ours).__name__ == type(theirs).__name__
            dy = torch.randn_like(y)
            (dx,), (dx64,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact, x64, dy.double())
            scale = float(dx64.norm()) + 1  # cancels where a channel has few values
            torch.testing.assert_close(dx.double(), dx64, rtol=64 * eps, atol=64 * eps * scale)
            if dtype == torch.float64:
                f = copy.deepcopy(ours).requires_grad_(False)
                if x.numel():
                    torch.autograd.gradcheck(f, (x,), check_forward_ad=True, fast_mode=True)
                    torch.autograd.gradgradcheck(f, (x,), fast_mode=True)
            copied = copy.deepcopy(ours)
            assert all(
                torch.equal(a, b) for a, b in zip(copied.state_dict().values(), ours.state_dict().values(), strict=True)
            )
            tried += 1
    assert tried > 3


def leaves_like(arguments, dtype):
    def leaf(t):
        return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

    return tree_map_only(torch.Tensor, leaf, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_operator(device, dtype):
    """16-bit types are compared with torch in float64: its own 16-bit sums are off by more than the last bit."""
    tried, narrow = 0, dtype.itemsize == 2
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-4} if narrow else {}
    for sample in OPERATOR.sample_inputs(device, dtype, requires_grad=True):
        results = []
        for f, wide in ((batch_norm, False), (OPERATOR.op, narrow)):
            x, args, kwargs = leaves_like((sample.input, sample.args, sample.kwargs), torch.float64 if wide else dtype)
            leaves = [t for t in (x, *args[2:4], *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
            y = f(x, *args, **kwargs)
            results.append(
                [
                    y,
                    *args[:2],
                    *(torch.autograd.grad(y.sum() * 3, leaves, allow_unused=True) if y.requires_grad else ()),
                ]
            )
        assert results[0][0].dtype == dtype
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, check_dtype=not narrow, **tolerance)
        tried += 1
    assert tried > 5


def call_of(op, sample):
    """op as a function of its input, without what a transform would not let it change."""
    mean, var, *rest = sample.args
    if sample.kwargs.get("training") or (len(rest) > 2 and rest[2]):
        mean = var = None
    return lambda x: op(x, mean, var, *rest, **sample.kwargs)


def squared(f):
    return lambda x: f(x).square().sum()


def test_operator_under_transforms(device):
    for sample in OPERATOR.sample_inputs(device, torch.float64, requires_grad=False):
        x = sample.input
        if not x.numel():
            continue
        f, g = call_of(batch_norm, sample), call_of(OPERATOR.op, sample)
        torch.testing.assert_close(grad(squared(f))(x), grad(squared(g))(x))
        for ours, theirs in zip(jvp(f, (x,), (x,)), jvp(g, (x,), (x,)), strict=True):
            torch.testing.assert_close(ours, theirs)
        many = torch.stack([x, 2 * x + 1])
        torch.testing.assert_close(vmap(f)(many), torch.stack([f(x), f(2 * x + 1)]))


def test_errors_are_of_torchs_classes(device):
    samples = OPERATOR.error_inputs(device) if OPERATOR.error_inputs_func else ()
    for sample in samples:
        call = sample.sample_input
        with pytest.raises(sample.error_type):
            batch_norm(call.input, *call.args, **call.kwargs)


def test_every_sample_is_tried():
    """The modules that torch has samples of, none of them skipped; it has none of lazy ones."""
    assert {info.name.removeprefix("nn.") for info in MODULES} == {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
