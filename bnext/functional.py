"""Batch normalization as a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnext import aten, routes, transforms
from bnext._extension import extension
from bnext.activation import Activation, apply, resolve
from bnext.operators import implement_batch_norm
from bnext.recomputation import here

__all__ = ["Activation", "batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    activation_param: float | None = None,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    unbiased: bool = True,
    ghost_batch_size: int | None = None,
) -> Tensor:
    """Normalizes each channel of `input`, adds `residual`, applies `activation`: one kernel for

        y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        y = y + residual                      # if given
        y = torch.nn.functional.relu(y)       # if activation == "relu", and so on

    and, in training with `num_batches_tracked` given, `num_batches_tracked += 1`.

    >>> import torch
    >>> x, residual = torch.randn(2, 8, 64, 4, 4)
    >>> batch_norm(x, None, None, training=True, activation="relu", residual=residual).shape
    torch.Size([8, 64, 4, 4])

    Args:
        input: (N, C) or (N, C, *); float32, float64, float16 or bfloat16; any strides. N or any
            other size may be 0.
        running_mean, running_var: (C,), both or neither, in the dtype of `input` or, for 16-bit
            inputs, float32. Training updates them in place, with the variance of the
            batch that `unbiased` says; evaluation normalizes by them.
        weight, bias: (C,), each optional, of one dtype: that of `input`, or float32 for 16-bit inputs.
        training: normalize by the statistics of the batch.
        momentum: the weight of the new batch in the running statistics. None weighs all batches
            equally, and needs `num_batches_tracked`.
        eps: added to the variance.
        activation: None; or "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or "tanh"; or the
            class of one in `torch.nn`, an instance such as `nn.LeakyReLU(0.2)`, or its function in
            `torch` or `torch.nn.functional`.
        activation_param: leaky_relu's slope, 0.01 where it is None.
        residual: on the device of `input`. In its shape and dtype it is fused; otherwise it is broadcast and
            promoted as by `y + residual`, without fusion.
        num_batches_tracked: one element, on the device of `input`.
        unbiased: let `running_var` take the unbiased variance of the batch, as torch does; False is for the biased
            one, as in Keras and Flax. The batch itself is normalized by the biased one in any case.
        ghost_batch_size: in training, normalize ceil(N / ghost_batch_size) parts of the batch, those of
            `torch.tensor_split(input, ...)`, each by its own statistics: `torch.cat([batch_norm(part, ...) for part in
            parts])`. Each steps the running statistics and `num_batches_tracked`. Ignored where `training` is False.

    Where the kernels cannot go, torch's own operators compute the same: `bnext.explain` says when, and docs/models.md
    gives the rules.

    Returns:
        Shape, dtype and memory format of `input`, unless `residual` has others.

    Raises:
        IndexError: `input` has fewer than 2 dimensions.
        NotImplementedError: a sparse tensor, or integer or complex `input`.
        ValueError: one value a channel in training, of the smallest ghost batch too; `ghost_batch_size` or `eps` is
            not positive; unknown `activation`, or one with options that the kernels do not know; one of
            the running statistics is missing; `momentum=None` without `num_batches_tracked`.
        RuntimeError: a shape, dtype or device does not match; evaluation without running
            statistics. Nothing has been changed then.
        TypeError: an argument is of another type than these.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual, num_batches_tracked):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual, num_batches_tracked),
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            activation=activation,
            activation_param=activation_param,
            residual=residual,
            num_batches_tracked=num_batches_tracked,
            unbiased=unbiased,
            ghost_batch_size=ghost_batch_size,
        )
    args = (
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        residual,
        training,
        momentum,
        eps,
        *resolve(activation, activation_param),
        unbiased,
        ghost_batch_size,
    )
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        route = routes.while_traced(training)
        if route is not None:
            return aten.batch_norm(*args) if route.way == "torch" else torch.ops.bnext.batch_norm(*args)
    try:
        block = here.block
        y = _direct()(*args) if block is None else block.run(_direct(), *args)
    except TypeError:
        wrong = _wrong_type(args)
        if wrong is None:  # of a hook of the user's
            raise
        raise TypeError(wrong) from None
    return call_kernels_or_torch(*args) if y is None else y


@functools.cache
def _direct() -> Callable[..., Tensor | None]:
    """The operator past the dispatcher's boxing; None where something keeps the call from the kernels."""
    return extension().batch_norm_if_possible


def call_kernels_or_torch(*args: Any) -> Tensor:
    """`torch.ops.bnext.batch_norm`, by whatever way there is for these arguments."""
    input, *_, counter, residual, training, momentum, eps = args[:10]
    activation, activation_param, unbiased, ghost_batch_size = args[10:]
    route = routes.of_call(*args[:7])
    if route.way == "kernels":
        return extension().batch_norm(*args)
    if residual is not None:  # before anything has changed
        _check_broadcast(input, residual)
        if residual.device != input.device:
            raise RuntimeError(f"residual is on {residual.device}, but input is on {input.device}")
        torch.promote_types(input.dtype, residual.dtype)  # raises where the sum would
        if residual.is_complex():  # which not every activation takes
            apply(activation, activation_param, residual.new_empty(0))
    if route.way == "torch" and training and counter is not None:
        counter.add_(0)  # raises where it cannot be written
    if route.way == "sum":
        how = training, momentum, eps
        y = call_kernels_or_torch(*args[:6], None, *how, "none", 0.0, unbiased, ghost_batch_size)
        return apply(activation, activation_param, y + residual)
    return (transforms if route.way == "function" else aten).batch_norm(*args)


implement_batch_norm(call_kernels_or_torch, aten.batch_norm)


def _check_broadcast(input: Tensor, residual: Tensor) -> None:
    for a, b in zip(reversed(input.shape), reversed(residual.shape), strict=False):
        if a != b and a != 1 and b != 1:
            raise RuntimeError(
                f"residual should have the shape of input, {list(input.shape)}, or broadcast with it, "
                f"not {list(residual.shape)}"
            )


_ARGUMENTS: dict[str, Any] = {
    "input": Tensor,
    "weight": (Tensor, NoneType),
    "bias": (Tensor, NoneType),
    "running_mean": (Tensor, NoneType),
    "running_var": (Tensor, NoneType),
    "num_batches_tracked": (Tensor, NoneType),
    "residual": (Tensor, NoneType),
    "training": bool,
    "momentum": (float, int, NoneType),
    "eps": (float, int),
    "activation": str,
    "activation_param": (float, int),
    "unbiased": bool,
    "ghost_batch_size": (int, NoneType),
}


def _wrong_type(args: tuple[Any, ...]) -> str | None:
    """What the signature of a C++ function, dumped, would leave to the reader to find out."""
    for (name, kinds), value in zip(_ARGUMENTS.items(), args, strict=False):
        if not isinstance(value, kinds):
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            expected = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            return f"batch_norm(): argument '{name}' must be {expected}, not {type(value).__name__}"
    return None
