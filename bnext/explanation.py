"""Which way each batch norm of a model goes, for people to read."""

from __future__ import annotations

import copy

from torch import nn

from bnext.conversion import spelled
from bnext.nn import FrozenBatchNorm2d, _BatchNorm
from bnext.routes import Route
from bnext.switch import is_enabled
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
    called again goes the way of its last call.
    """
    found = Explanation()
    model = copy.deepcopy(module)

    def note(name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if isinstance(layer, (_BatchNorm, FrozenBatchNorm2d)):
                found[name] = layer._route(*args, **kwargs)
            elif is_enabled():
                found[name] = Route("kernels", "bnext.enable() has put them behind torch's operators")
            else:
                kind = spelled(type(layer))
                found[name] = Route("torch", f"it is a {kind}: bnext.convert(model) makes it one of bnext")

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, TorchFrozenBatchNorm2d)):
            layer.register_forward_pre_hook(note(name), with_kwargs=True)
    model(*inputs, **keywords)
    return found
