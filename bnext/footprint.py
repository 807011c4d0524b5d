"""What a training step keeps for its backward, layer by layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnext.inspection import copied, uncompiled
from bnext.recomputation import recompute

__all__ = ["Kept", "Memory", "memory"]


class Kept(NamedTuple):
    """Bytes that a layer keeps."""

    before: int  #: as it is
    after: int  #: under `bnext.recompute()`


class Memory(dict[str, Kept]):
    """Each layer that keeps something, by its name; prints as a table."""

    @property
    def total(self) -> Kept:
        return Kept(sum(kept.before for kept in self.values()), sum(kept.after for kept in self.values()))

    def __str__(self) -> str:
        rows = [
            ("layer", "kept", "recompute"),
            *((name or "(model)", *map(_spelled, kept)) for name, kept in self.items()),
        ]
        rows.append(("total", *map(_spelled, self.total)))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:{width}}  {before:>10}  {after:>10}" for name, before, after in rows)


def memory(model: nn.Module, *inputs: Any, **keywords: Any) -> Memory:
    """Bytes that `model(*inputs, **keywords)` keeps for the backward, with and without `bnext.recompute()`.

    >>> import torch, bnext
    >>> net = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 16, 3), bnext.BatchNorm2d(16, activation="relu"), torch.nn.Conv2d(16, 16, 3)
    ... )
    >>> print(bnext.memory(net, torch.randn(8, 3, 32, 32)))
    layer        kept   recompute
    0         98.3 kB     98.3 kB
    1        460.9 kB    460.9 kB
    2        460.8 kB         0 B
    total      1.0 MB    559.2 kB

    Counts each tensor once, where it is kept first; parameters and buffers are there anyway, and left out. Runs copies
    of `model` in its own mode, so that no statistics change. Of a model that `torch.compile` has made it tells what the
    layers keep without it: what a graph keeps is no layer's.
    """
    before, after = (_kept(model, on, inputs, keywords) for on in (False, True))
    return Memory({name: Kept(before.get(name, 0), after.get(name, 0)) for name in {**before, **after}})


def _kept(model: nn.Module, recomputes: bool, inputs: tuple, keywords: dict[str, Any]) -> dict[str, int]:
    model = recompute(copied(model), recomputes)
    seen = {_address(t) for t in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # so that no address comes twice
    found: dict[str, int] = {}
    running = [""]

    def enter(name: str):
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    def pack(t: Tensor) -> Tensor:
        if t.layout is torch.strided and _address(t) not in seen:
            seen.add(_address(t))
            alive.append(t)
            found[running[-1]] = found.get(running[-1], 0) + t.untyped_storage().nbytes()
        return t

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)
    with uncompiled(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(*inputs, **keywords)
        del output
    return found


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _spelled(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    unit = "kB" if size < 1_000_000 else "MB" if size < 1_000_000_000 else "GB"
    return f"{size / {'kB': 1e3, 'MB': 1e6, 'GB': 1e9}[unit]:.1f} {unit}"
