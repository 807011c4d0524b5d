"""bnext.cuda: which plan the CUDA kernels take, and how many launches that is."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

import bnext
from bnext._extension import extension

with_cuda = pytest.mark.skipif(not extension().with_cuda, reason="this build has no CUDA code")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.skipif(extension().with_cuda, reason="this build has CUDA code")
@pytest.mark.parametrize(
    "call",
    [
        bnext.cuda.plans,
        lambda: bnext.cuda.set_sm_margin(1),
        lambda: bnext.cuda.force_plan("cooperative").__enter__(),
        lambda: bnext.cuda.describe_plan((2, 3), gpu="H100"),
        lambda: bnext.cuda.refused_launches(0),
    ],
)
def test_a_build_without_cuda_says_so(call):
    with pytest.raises(NotImplementedError, match="without CUDA|no CUDA code"):
        call()


@with_cuda
def test_force_plan_holds_within():
    assert bnext.cuda.plans() == ["automatic", "resident", "cooperative", "two_pass"]
    force = extension().force_plan
    with bnext.cuda.force_plan("two_pass"):
        with bnext.cuda.force_plan("cooperative"):
            assert force("cooperative") == "cooperative"
        assert force("two_pass") == "two_pass"
    assert force("automatic") == "automatic"
    names = "'automatic', 'resident', 'cooperative' or 'two_pass'"
    with pytest.raises(ValueError, match=f"plan should be {names}, not 'fast'"), bnext.cuda.force_plan("fast"):
        pass
    assert force("automatic") == "automatic"


@with_cuda
def test_force_plan_takes_details():
    force = extension().force_plan
    with bnext.cuda.force_plan("resident:tile_vecs=8,groups=2"):
        assert force("resident:cluster=4") == "resident:groups=2,tile_vecs=8"
        with pytest.raises(ValueError, match="cluster of plan 'resident' should be 1, 2, 4, 8 or 16, not '5'"):
            force("resident:cluster=5")
        assert force("automatic") == "resident:cluster=4"


@with_cuda
def test_describe_plan_needs_no_gpu():
    describe = bnext.cuda.describe_plan
    shape, bf16 = (64, 64, 56, 56), torch.bfloat16
    assert describe(shape, bf16, gpu="H100").startswith("resident: 1 launch of 64 tiles, 2 blocks of 256 threads each")
    assert describe(shape, bf16, gpu="T4").startswith("two_pass: 2 launches, of 64 tiles, ")
    assert "in clusters; 102400 bytes" in describe(shape, bf16, gpu="H100", backward=True)
    assert ", 8 blocks of" in describe(shape, bf16, gpu="H100", plan="resident:cluster=8")
    last = describe(shape, bf16, memory_format=torch.channels_last, gpu="H100", plan="resident")
    assert last.startswith("resident: 1 launch of 1 tile, 131 blocks ")
    with bnext.cuda.force_plan("two_pass"):
        assert describe(shape, bf16, gpu="H100").startswith("two_pass")
    # A mask goes with the elementwise pass: vecs of 8 elements.
    plain, masked = (describe((64, 64, 8, 8), gpu="A100", residual=r, activation="relu") for r in (False, True))
    assert plain != masked
    # The layout is that of the layer: (N, C) is interleaved, whatever the format.
    assert describe((4096, 64), gpu="H100", plan="resident:tile_vecs=4").startswith("resident")


@with_cuda
def test_describe_plan_goes_without_what_a_device_refuses():
    x, h100 = torch.empty(64, 64, 56, 56, device="meta", dtype=torch.bfloat16), list(bnext.cuda.GPUS["H100"])

    def describe(cooperative, clusters, plan=""):
        return extension().describe_plan(x, False, "none", False, [*h100, cooperative, clusters], plan)

    assert "in clusters" in describe(True, True) and "in clusters" not in describe(True, False)
    assert describe(True, True, "cooperative").startswith("cooperative")
    with pytest.raises(RuntimeError, match="has no cooperative launches, or refuses them"):
        describe(False, True, "cooperative")


@with_cuda
@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "gpu should be one of H100, .*, or a device's index, not 'H900'", {"gpu": "H900"}),
        (ValueError, "activation should be None, 'relu', .*, not 'gelu'", {"gpu": "H100", "activation": "gelu"}),
        (ValueError, "plan should be 'automatic', .*, not 'fast'", {"gpu": "H100", "plan": "fast"}),
        (
            RuntimeError,
            "this shape has no plan 'resident:tile_vecs=2', which .* asks for: in a planar layout, the one detail is cluster",
            {"gpu": "H100", "plan": "resident:tile_vecs=2"},
        ),
    ],
)
def test_describe_plan_refuses_what_force_plan_would(error, message, options):
    with pytest.raises(error, match=message):
        bnext.cuda.describe_plan((8, 16, 8, 8), **options)


@with_cuda
def test_set_sm_margin_returns_what_held_before():
    before = bnext.cuda.set_sm_margin(16)
    assert bnext.cuda.set_sm_margin(0) == 16
    for wrong in (-1, 4096):
        with pytest.raises(
            ValueError, match=f"sm_margin should be a number of multiprocessors, from 0 on, not {wrong}"
        ):
            bnext.cuda.set_sm_margin(wrong)
    assert bnext.cuda.set_sm_margin(before) == 0


@with_cuda
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("BNEXT_PLAN", "fast", "BNEXT_PLAN: plan should be"),
        ("BNEXT_PLAN", "resident:cluster=7", "BNEXT_PLAN: cluster of plan 'resident' should be"),
        ("BNEXT_SM_MARGIN", "few", "BNEXT_SM_MARGIN should be a number of multiprocessors, not 'few'"),
        ("BNEXT_SM_MARGIN", "-3", "sm_margin should be"),
    ],
)
def test_environment_is_checked(name, value, message):
    code = "import bnext.cuda; bnext.cuda.set_sm_margin(0)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {name: value}, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


@with_cuda
def test_environment_sets_what_holds_at_first():
    code = "from bnext._extension import extension as e; print(e().force_plan('automatic'), e().set_sm_margin(0))"
    for plan in ("cooperative", "resident:groups=2,splits=64"):
        env = os.environ | {"BNEXT_PLAN": plan, "BNEXT_SM_MARGIN": "8"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [plan, "8"]


# ---- on a GPU


def kernels(call) -> list[str]:
    """The names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def train(shape, memory_format=torch.contiguous_format, dtype=torch.bfloat16, residual=False):
    """(forward, backward) of a layer whose running statistics and counter take part."""
    module = bnext.BatchNorm2d(shape[1], activation="relu" if residual else None, device="cuda")
    x, dy = (torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format) for _ in range(2))
    inputs = [x.requires_grad_(), *module.parameters()]
    extra = (x.detach().clone().requires_grad_(),) if residual else ()

    def forward():
        return module(x, *extra)

    y = forward()
    return forward, lambda: torch.autograd.grad(y, [*inputs, *extra], dy, retain_graph=True)


@on_gpu
@pytest.mark.parametrize("plan, launches", [("resident", 1), ("cooperative", 1), ("two_pass", 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_forced_plan_is_the_one_that_runs(plan, launches, memory_format):
    with bnext.cuda.force_plan(plan):
        for call in train((8, 32, 28, 28), memory_format):
            names = kernels(call)
            assert len(names) == launches, names
            assert all(plan == "two_pass" or plan in name for name in names)


@on_gpu
def test_a_plan_that_the_shape_does_not_allow_is_refused():
    with bnext.cuda.force_plan("resident"), pytest.raises(RuntimeError, match="this shape has no plan 'resident'"):
        train((64, 3, 40, 40), torch.channels_last)


@on_gpu
@pytest.mark.parametrize("shape", [(128, 6, 24, 24), (32, 2048, 1, 1), (8, 3, 17, 19), (4, 100, 9, 9), (2, 512, 7, 7)])
def test_small_tensors_take_as_many_launches_as_planned(shape):
    """One, unless two overlap, which takes less time than blocks that wait for each other."""
    for memory_format, residual in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
        kind = {"memory_format": memory_format, "activation": "relu" if residual else None, "residual": residual}
        for call, backward in zip(train(shape, memory_format, residual=residual), (False, True), strict=True):
            plan = bnext.cuda.describe_plan(shape, torch.bfloat16, backward=backward, **kind)
            names = kernels(call)
            assert len(names) == int(re.search(r": (\d) launch", plan)[1]), (kind, plan, names)
            # Those that clusters can take, and those that fit a block, take one.
            one = shape in ((32, 2048, 1, 1), (2, 512, 7, 7)) or (shape[1], memory_format) == (
                6,
                torch.contiguous_format,
            )
            assert len(names) == 1 or (not one and "the second overlaps the first" in plan), plan


@on_gpu
@pytest.mark.parametrize("margin", [1, 16, 1000])
def test_a_margin_changes_no_more_than_rounding(margin):
    x = torch.randn(32, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last)
    expected = bnext.functional.batch_norm(x, None, None, training=True)
    previous = bnext.cuda.set_sm_margin(margin)
    try:
        actual = bnext.functional.batch_norm(x, None, None, training=True)
    finally:
        bnext.cuda.set_sm_margin(previous)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)
