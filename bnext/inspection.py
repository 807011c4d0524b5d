"""Running a model to look at it: as it is without torch.compile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["uncompiled"]


class _Blocks:
    """The blocks of `uncompiled` that any thread is in."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.stance = contextlib.ExitStack()  # the one that the first of them found, which the last one restores


_blocks = _Blocks()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what torch.compile has made runs as if it had not, in all threads.

    Dynamo does not guard on hooks: a graph from before a hook was registered would go on without it.
    """
    with _blocks.lock:
        if _blocks.count == 0:
            _blocks.stance.enter_context(torch.compiler.set_stance("force_eager"))
        _blocks.count += 1
    try:
        yield
    finally:
        with _blocks.lock:
            _blocks.count -= 1
            if _blocks.count == 0:
                _blocks.stance.close()
