"""What the CUDA kernels' plans go by. docs/kernels.md explains the plans; the CPU has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from bnext import _extension
from bnext.activation import Activation, resolve

if TYPE_CHECKING:
    from bnext._C import Extension

__all__ = ["GPUS", "describe_plan", "force_plan", "plans", "refused_launches", "set_sm_margin"]

#: What plans look at of a device: ten times its compute capability, multiprocessors, bytes of shared memory of
#: one, of a block, and of L2, bytes a microsecond of a copy, and how many clusters of 2, 4, 8 and 16 blocks run
#: together, which only a device itself knows (an H200 was asked for an H100's, a B200's are guesses).
GPUS = {
    "H100": (90, 132, 233472, 232448, 52428800, 3017000, 66, 30, 15, 7),
    "B200": (100, 148, 233472, 232448, 132644864, 7200000, 74, 34, 16, 0),
    "A100": (80, 108, 167936, 166912, 41943040, 1750000, 0, 0, 0, 0),
    "RTX4090": (89, 128, 102400, 101376, 75497472, 907000, 0, 0, 0, 0),
    "T4": (75, 40, 65536, 65536, 4194304, 288000, 0, 0, 0, 0),
}


def _cuda_extension() -> Extension:
    extension = _extension.extension()
    if not hasattr(extension, "force_plan"):
        raise NotImplementedError(
            "this build of bnext has no CUDA code, hence no plans: python -m bnext.doctor says why"
        )
    return extension


def plans() -> list[str]:
    """The names that :func:`force_plan` takes: ``"automatic"``, and one for each plan.

    Raises:
        NotImplementedError: where bnext was built without CUDA.
    """
    return _cuda_extension().plans()


@contextmanager
def force_plan(plan: str) -> Iterator[None]:
    """Within it, every training forward and backward on a GPU takes this plan.

    It holds for the whole process, since autograd runs the backward on a thread of its own. The
    environment variable ``BNEXT_PLAN`` does the same from the start.

    Args:
        plan: one of :func:`plans`. ``"resident"`` also with details: ``"resident:cluster=4"`` says how
            many blocks share a channel in a contiguous layout (1, 2, 4, 8 or 16), or a tile of channels in
            channels_last layouts. There, ``"resident:cluster=4,tile_vecs=8"`` also says how many vectors of 16
            bytes a tile is wide (of 8 elements, where a sign mask goes with them); and
            ``"resident:groups=2,splits=64,tile_vecs=8"``, or some of these, how many tiles are worked on at a
            time without clusters, and by how many blocks each.

    Raises:
        ValueError: there is no such plan, or detail.
        NotImplementedError: where bnext was built without CUDA.

    A call on a tensor whose shape the plan cannot take, as it is asked for, raises RuntimeError, which
    says what the device would take.
    """
    extension = _cuda_extension()
    previous = extension.force_plan(plan)
    try:
        yield
    finally:
        extension.force_plan(previous)


def set_sm_margin(multiprocessors: int) -> int:
    """Leaves some multiprocessors to kernels that run beside bnext's.

    Kernels whose blocks wait for each other (those of channels_last layouts, and of small
    tensors) can only begin once there is room for all of their blocks. A communication kernel
    that holds a few multiprocessors for long would make them wait: with a margin of as many,
    they do without those.

    Args:
        multiprocessors: how many, 0 at first, or what the environment variable
            ``BNEXT_SM_MARGIN`` says.

    Returns:
        What held before.

    Raises:
        ValueError: a negative number, or more than 1024.
        NotImplementedError: where bnext was built without CUDA.
    """
    return _cuda_extension().set_sm_margin(multiprocessors)


def refused_launches(device: int | None = None) -> list[str]:
    """What the driver has refused to launch on a device so far: cooperative launches, clusters, clusters of 16.

    Drivers do under MPS, in green contexts, on virtual GPUs and in debuggers. bnext then goes on with plans
    that do without, which move more bytes; nothing is lost but time.

    Args:
        device: its index; by default the current one.

    Raises:
        NotImplementedError: where bnext was built without CUDA.
    """
    return _cuda_extension().refused_launches(torch.cuda.current_device() if device is None else device)


def describe_plan(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    backward: bool = False,
    activation: Activation = None,
    residual: bool = False,
    gpu: str | int | None = None,
    plan: str | None = None,
) -> str:
    """In words, the plan that a training forward or backward gets.

    Args:
        shape, dtype, memory_format: of the input.
        backward: of the backward, rather than of the forward.
        activation, residual: as the layer has them.
        gpu: one of :data:`GPUS`, which need not be there; or a device's index, by default the current one, which is
            taken without what it has refused to launch (:func:`refused_launches`).
        plan: as for :func:`force_plan`, by default what holds.

    Raises:
        ValueError: there is no such plan, activation or GPU.
        RuntimeError: the shape has no such plan.
        NotImplementedError: where bnext was built without CUDA.

    >>> import torch, bnext
    >>> said = bnext.cuda.describe_plan((64, 64, 56, 56), torch.bfloat16, gpu="H100")
    >>> print(*said.split("; "), sep="\\n")
    resident: 1 launch of 64 tiles, 2 blocks of 256 threads each, in clusters
    204800 bytes of shared memory a block
    predicted: resident 24.0 us, two_pass 30.4 us
    """
    extension = _cuda_extension()
    name, _ = resolve(activation)
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise ValueError(f"gpu should be one of {', '.join(GPUS)}, or a device's index, not {gpu!r}")
        properties = [*GPUS[gpu], True, True]  # it refuses neither cooperative launches nor clusters
    else:
        properties = extension.device_properties(torch.cuda.current_device() if gpu is None else gpu)
    x = torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=memory_format)
    return extension.describe_plan(x, backward, name, residual, properties, plan or "")
