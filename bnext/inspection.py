"""Looking at a model: a copy of it, and a run without torch.compile."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["copied", "uncompiled"]

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, shared: Iterable[Tensor] = ()) -> Model:
    """A copy of `model` that has `shared` in common with it, and its process groups, of which there are no copies."""
    kept = [*shared, *(value for module in model.modules() for value in vars(module).values() if _is_group(value))]
    return copy.deepcopy(model, {id(value): value for value in kept})


def _is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


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
