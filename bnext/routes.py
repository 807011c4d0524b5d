"""Which way a call of batch norm goes, decided in one place. `bnext.explain` tells."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bnext._extension import extension

__all__ = ["Route", "of_call", "while_traced"]

Way = Literal["kernels", "function", "sum", "torch"]


class Route(NamedTuple):
    """The way of a call, and why."""

    #: "kernels"; "function", the kernels from a Function in Python; "sum", the kernels for the normalization and torch
    #: for what follows it; or "torch", torch's own operators.
    way: Way
    why: str


_KERNELS = Route("kernels", "nothing keeps the call from them")
_WRAPPER = Route("torch", "a tensor is a wrapper of others, such as a DTensor")

#: What csrc/bindings/obstacle.cpp finds.
_OBSTACLES = {
    "transform": Route("function", "torch.func (vmap, grad, jvp, ...) is at work"),
    "forward_ad": Route("function", "a tensor has a tangent of forward-mode differentiation"),
    "residual": Route("sum", "the residual has another shape or dtype than the input: it is broadcast and promoted"),
    "layout": Route("torch", "a tensor has the layout of MKL-DNN"),
    "device": Route("torch", "there are kernels for the CPU and for CUDA alone"),
    "empty": Route("torch", "the input is a vector of no elements"),
    "counter": Route("torch", "num_batches_tracked is not int64"),
}


def while_traced(training: bool, compiled: bool = False) -> Route | None:
    """The way of a call that becomes part of a graph, as all do where `compiled` says so; None where nothing is
    traced."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting():
        return Route("torch", "a program that is exported runs, and is quantized or folded, without bnext")
    if not (compiled or torch.compiler.is_compiling()):
        return None
    if training:
        return Route("kernels", "torch.compile keeps the operator of a training step")
    return Route("torch", "Inductor can fold evaluation into its neighbours")


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
    if any(_wraps_others(t) for t in tensors):
        return _WRAPPER
    found = extension().obstacle(*tensors)
    if found is None or found == "subclass":  # a fake tensor, say, which takes any operator
        return _KERNELS
    if found == "transform" and _functionalizes():
        return Route("torch", "torch.func.functionalize takes no Function")
    return _OBSTACLES[found]


def _functionalizes() -> bool:
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Functionalize


def _wraps_others(t: Tensor | None) -> bool:
    """DTensor and its like."""
    return isinstance(t, Tensor) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(t)
