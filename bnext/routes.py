"""Which way a call of batch norm goes, decided in one place, and what `bnext.explain` says about it."""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bnext._extension import extension
from bnext.switch import is_enabled

__all__ = ["Explanation", "Route", "explain"]

Way = Literal["kernels", "function", "sum", "torch"]


class Route(NamedTuple):
    """The way of a call, and why."""

    #: "kernels"; "function", the kernels from a Function in Python; "sum", the kernels for the normalization and torch
    #: for what follows it; or "torch", torch's own operators.
    way: Way
    why: str


_KERNELS = Route("kernels", "nothing keeps the call from them")

#: What csrc/bindings/obstacle.cpp finds.
_OBSTACLES = {
    "transform": Route("function", "torch.func (vmap, grad, jvp, ...) is at work"),
    "forward_ad": Route("function", "a tensor has a tangent of forward-mode differentiation"),
    "residual": Route("sum", "the residual has another shape or dtype than the input: it is broadcast and promoted"),
    "subclass": Route("torch", "a tensor is a wrapper of others, such as a DTensor"),
    "layout": Route("torch", "a tensor has the layout of MKL-DNN"),
    "device": Route("torch", "there are kernels for the CPU and for CUDA alone"),
    "empty": Route("torch", "the input is a vector of no elements"),
    "counter": Route("torch", "num_batches_tracked is not int64"),
}


def while_traced(training: bool) -> Route | None:
    """The way of a call that becomes part of a graph; None where nothing is traced."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
        return Route("torch", "a program that is exported runs, and is quantized or folded, without bnext")
    if not torch.compiler.is_compiling():
        return None
    if training:
        return Route("kernels", "torch.compile keeps the operator of a training step")
    return Route("torch", "Inductor fuses evaluation into its neighbours")


def of_call(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
) -> Route:
    """The way of a call that is executed, or whose operator a compiler takes apart."""
    tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked, residual)
    found = extension().obstacle(*tensors)
    if found is None or (found == "subclass" and not any(_wraps_others(t) for t in tensors)):
        return _KERNELS
    if found == "transform" and _functionalizes():
        return Route("torch", "torch.func.functionalize takes no Function")
    return _OBSTACLES[found]


def _functionalizes() -> bool:
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Functionalize


def _wraps_others(t: Tensor | None) -> bool:
    """DTensor and its like. Fake tensors, and those of functionalization, take any operator."""
    return isinstance(t, Tensor) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(t)


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
    from bnext.nn import _BatchNorm

    found = Explanation()
    model = copy.deepcopy(module)

    def note(name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            if isinstance(layer, _BatchNorm):
                found[name] = layer._route(*args, **kwargs)
            elif is_enabled():
                found[name] = Route("kernels", "bnext.enable() has put them behind torch's operators")
            else:
                kind = f"{type(layer).__module__.removesuffix('.modules.batchnorm')}.{type(layer).__name__}"
                found[name] = Route("torch", f"it is a {kind}: bnext.convert(model) makes it one of bnext")

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.register_forward_pre_hook(note(name), with_kwargs=True)
    model(*inputs, **keywords)
    return found
