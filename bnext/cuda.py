"""What the CUDA kernels' plans go by. docs/kernels.md explains the plans; the CPU has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from bnext import _extension

__all__ = ["force_plan", "plans", "set_sm_margin"]


def _cuda_extension() -> ModuleType:
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
        plan: one of :func:`plans`.

    Raises:
        ValueError: there is no such plan.
        NotImplementedError: where bnext was built without CUDA.

    A call on a tensor whose shape the plan cannot take raises RuntimeError.
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
