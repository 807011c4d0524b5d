"""Running statistics under activation checkpointing, which runs the forward twice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["hold_statistics", "update_once"]


class _Held(threading.local):
    """How many blocks of `hold_statistics` this thread is in; a default in the class, as every training step asks."""

    depth = 0


held = _Held()


@contextlib.contextmanager
def hold_statistics() -> Iterator[None]:
    """Inside, layers of bnext in training mode normalize by the batch and leave their running statistics alone.

    It holds for the thread, and not for `bnext.functional.batch_norm`, which updates the tensors that it is given.
    Graphs that torch.compile has made do not ask for it.
    """
    held.depth += 1
    try:
        yield
    finally:
        held.depth -= 1


def update_once() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=bnext.update_once)`: the statistics
    step in the forward, and not once more when the backward runs it again, as those of torch.nn do.

    >>> import torch, bnext
    >>> from torch.utils.checkpoint import checkpoint
    >>> norm = bnext.BatchNorm1d(3)
    >>> x = torch.randn(4, 3, requires_grad=True)
    >>> checkpoint(norm, x, use_reentrant=False, context_fn=bnext.update_once).sum().backward()
    >>> norm.num_batches_tracked
    tensor(1)
    """
    return contextlib.nullcontext(), hold_statistics()
