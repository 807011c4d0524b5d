"""Torch's own batch norm on bnext's kernels: models of torch.nn's layers run them as they are, in eager mode.

    >>> import torch, bnext
    >>> model, x = torch.nn.BatchNorm2d(8), torch.randn(4, 8, 5, 5)
    >>> before = bnext.kernels_run()
    >>> with bnext.enable():
    ...     model(x).sum().backward()
    >>> bnext.kernels_run() - before
    2

What holds is a matter of the process, not of a thread, because autograd runs backwards on threads of its own.
docs/enable.md says which calls the kernels take, and what else to know.
"""

from __future__ import annotations

import sys
import threading

from bnext._extension import MODULE, extension

__all__ = ["Enabled", "disable", "enable", "is_enabled", "kernels_run"]


class _Switch:
    """How many calls of `enable` hold: those that stand on their own, and the blocks that are open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.standing = 0
        self.blocks = 0
        self.ended = 0  # how often `disable` ended those that stood

    @property
    def on(self) -> bool:
        return self.standing > 0 or self.blocks > 0

    def set(self) -> None:
        extension().set_enabled(self.on)


_switch = _Switch()


class Enabled:
    """What `enable` returns. As a context manager it turns the call that made it into a block, which ends with it."""

    def __init__(self) -> None:
        extension()  # may compile for minutes, which nobody should wait for at the lock
        with _switch.lock:
            self._stands_since: int | None = _switch.ended
            _switch.standing += 1
            _switch.set()

    def __enter__(self) -> Enabled:
        with _switch.lock:
            if self._stands_since == _switch.ended:
                _switch.standing -= 1
            self._stands_since = None
            _switch.blocks += 1
            _switch.set()
        return self

    def __exit__(self, *_: object) -> None:
        with _switch.lock:
            _switch.blocks -= 1
            _switch.set()


def enable() -> Enabled:
    """Lets bnext's kernels run torch's batch norm in eager mode: `enable()` until `disable()`, or for a block:

        with bnext.enable():
            train(model)

    It reaches `torch.nn.BatchNorm1d`, `2d` and `3d`, `F.batch_norm` and whatever else calls torch's operators on CPU
    and CUDA tensors, forward and backward, and changes neither classes nor modules. Where the kernels do not take a
    call, torch's run it, with the same results and errors as without. Graphs that torch.compile has made are not
    reached, since it takes batch norm apart before any kernel is chosen.

    It holds for the whole process, on all threads, from the call on. Blocks may be nested, and may overlap on several
    threads: it is on while one is open. A block begins with the call, and ends with the block.

    The first call in a process loads the extension, or compiles it, and puts its kernels before torch's. No other
    thread should run batch norm just then. Later calls cost nothing, and may be made at any time, also between a
    forward and its backward.

    Raises:
        ImportError: there is no extension, and none can be compiled.
    """
    return Enabled()


def disable() -> None:
    """Ends what calls of `enable` outside of a `with` began. Blocks that are open, here or on another thread, go on."""
    with _switch.lock:
        if _switch.standing:
            _switch.standing = 0
            _switch.ended += 1
            _switch.set()


def is_enabled() -> bool:
    """Whether bnext's kernels run torch's batch norm now: on any thread, as what holds is a matter of the process."""
    return _switch.on


def kernels_run() -> int:
    """How many operator calls this process has handed to bnext's kernels, of its own layers or of torch's.

    The difference of two values tells whether the calls between them ran here: a forward counts one, and so does
    a backward.
    """
    loaded = sys.modules.get(MODULE)
    return loaded.kernels_run() if loaded is not None else 0
