"""Which way each batch norm of a model goes, for people to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bnext.conversion import spelled
from bnext.inspection import copied, uncompiled
from bnext.nn import FrozenBatchNorm2d, _BatchNorm
from bnext.routes import Route
from bnext.switch import is_enabled, kernels_run
from bnext.torch_layers import TorchFrozenBatchNorm2d

__all__ = ["Explanation", "explain"]


class Explanation(dict[str, Route]):
    """A `Route` for the name of each batch norm; prints as a table."""

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        return "\n".join(f"{name:{width}}  {route.way:8}  {route.why}" for name, route in self.items())


def explain(module: nn.Module, *inputs: object, **keywords: object) -> Explanation:
    """Which way each batch norm of `module` goes in `module(*inputs, **keywords)`, and why.

    >>> import torch, bnext
    >>> net = torch.nn.Sequential(bnext.BatchNorm2d(3), torch.nn.BatchNorm2d(3))
    >>> print(bnext.explain(net, torch.randn(2, 3, 4, 4)))
    0  kernels   nothing keeps the call from them
    1  torch     it is a torch.nn.BatchNorm2d: bnext.convert(model) makes it one of bnext

    Runs a copy of `module`, so that no statistics change. A batch norm that is not called is left out; one that is
    called again goes the way of its last call. No other thread should run batch norm meanwhile: `bnext.kernels_run`
    tells what `bnext.enable` reaches.

    The copy runs without being compiled, but where `torch.compile` has made `module` or a part of it, that is told of
    as a graph. What it has made of a function is told of as without it.
    """
    found = Explanation()
    run = _Run()
    model = copied(module)
    compiled = [name for name, part in module.named_modules() if _is_compiled(part)]  # a copy need not say so
    for name in compiled:
        run.watch_graph(model.get_submodule(name))
    for name, layer in model.named_modules():
        if isinstance(layer, (_BatchNorm, FrozenBatchNorm2d)):
            _watch_ours(layer, name, run, found)
        elif isinstance(layer, (nn.modules.batchnorm._BatchNorm, TorchFrozenBatchNorm2d)):
            _watch(layer, name, run, found)
    with uncompiled():
        model(*inputs, **keywords)
    return found


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


class _Run:
    """Whether the run is in a part of the model that torch.compile would make a graph of."""

    def __init__(self) -> None:
        self._graphs = 0

    @property
    def in_graph(self) -> bool:
        return self._graphs > 0

    def watch_graph(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self._graphs += 1

    def _leave(self, *_: Any) -> None:
        self._graphs -= 1


def _watch_ours(layer: nn.Module, name: str, run: _Run, found: Explanation) -> None:
    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[name] = layer._route(*args, **kwargs, compiled=run.in_graph)

    layer.register_forward_pre_hook(note, with_kwargs=True)


def _watch(layer: nn.Module, name: str, run: _Run, found: Explanation) -> None:
    """Whether the kernels take a call of torch's operators is decided behind these: it shows in how many they ran."""
    before = 0

    def begin(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal before
        found[name] = _by_torch(layer, run.in_graph)
        before = kernels_run()

    def end(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not run.in_graph and kernels_run() > before:
            enabled = "bnext.enable() has put them behind torch's operators"
            found[name] = Route("kernels", enabled if is_enabled() else "its forward calls them")

    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(end)


def _by_torch(layer: nn.Module, compiled: bool) -> Route:
    if not is_enabled():
        return Route("torch", f"it is a {spelled(type(layer))}: bnext.convert(model) makes it one of bnext")
    if compiled:
        return Route("torch", "torch.compile takes it apart, where its backend is none that bnext.enable() reaches")
    return Route("torch", "bnext.enable() does not reach this call: docs/enable.md says what it reaches")
