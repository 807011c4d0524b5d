"""Batch normalization as a function."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnext._extension import extension
from bnext.activation import Activation, resolve

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
            inputs, float32. Training updates them in place, with the unbiased variance of the
            batch; evaluation normalizes by them.
        weight, bias: (C,), each optional, of one dtype: that of `input`, or float32 for 16-bit inputs.
        training: normalize by the statistics of the batch.
        momentum: the weight of the new batch in the running statistics. None weighs all batches
            equally, and needs `num_batches_tracked`.
        eps: added to the variance.
        activation: None; or "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or "tanh"; or the
            class of one in `torch.nn`, an instance such as `nn.LeakyReLU(0.2)`, or its function in
            `torch` or `torch.nn.functional`.
        activation_param: leaky_relu's slope, 0.01 where it is None.
        residual: shape, dtype and device of `input`.
        num_batches_tracked: int64 of one element, on the device of `input`.

    Returns:
        Shape, dtype and memory format of `input`.

    Raises:
        ValueError: `input` has fewer than 2 dimensions; one value a channel in training; `eps` is
            not positive; unknown `activation`, or one with options that the kernels do not know; one of
            the running statistics is missing; `momentum=None` without `num_batches_tracked`.
        RuntimeError: a shape, dtype or device does not match; evaluation without running
            statistics; integer or complex input. Nothing has been changed then.
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
        )
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    call = torch.ops.bnext.batch_norm if traced and _loaded() else _direct()
    return call(
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
    )


@functools.cache
def _direct() -> Callable[..., Tensor]:
    """The operator past the dispatcher's boxing."""
    return extension().batch_norm


def _loaded() -> bool:
    return extension() is not None


# What torch.compiler.assume_constant_result does, without importing the compiler for it: a graph
# may be the first to need the operators, and they are loaded while it is traced.
_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]
