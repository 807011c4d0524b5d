"""The same batch normalization by torch's own operators: for where the kernels cannot go, and for programs that are
saved to run without bnext. TorchScript compiles what is here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bnext.activation import apply

__all__ = ["batch_norm", "ghost_batches"]


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_param: float,
    unbiased: bool,
    ghost_batch_size: int | None,
) -> Tensor:
    """activation(bn(input) + residual): `bnext.functional.batch_norm` in the arguments of the operator."""
    statistics = (running_mean, running_var, num_batches_tracked)
    if training and ghost_batch_size is not None:
        parts: list[Tensor] = []
        for part in ghost_batches(input, ghost_batch_size):
            parts.append(_normalized(part, weight, bias, statistics, training, momentum, eps, unbiased))
        y = torch.cat(parts)
    else:
        y = _normalized(input, weight, bias, statistics, training, momentum, eps, unbiased)
    if residual is not None:
        y = y + residual
    return apply(activation, activation_param, y)


def ghost_batches(input: Tensor, size: int) -> list[Tensor]:
    """The parts of at most `size` examples, in order and as even as possible. Raises before any of them is used."""
    if size < 1:
        raise ValueError(f"ghost_batch_size should be None or a positive integer, not {size}")
    parts = list(torch.tensor_split(input, max(1, (input.size(0) + size - 1) // size)))
    least = parts[-1]
    if least.size(0) == 1 and least.numel() == least.size(1):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}, whose smallest ghost "
            "batch is of 1 example"
        )
    return parts


def _check_average(running_mean: Tensor | None, num_batches_tracked: Tensor | None, momentum: float | None) -> None:
    """As csrc/bindings/checks.cpp does."""
    if momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum=None averages over all batches, and needs num_batches_tracked to count them")


def _normalized(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],
    training: bool,
    momentum: float | None,
    eps: float,
    unbiased: bool,
) -> Tensor:
    running_mean, running_var, num_batches_tracked = statistics
    # Everything that can fail comes before the first update.
    if training:
        _check_average(running_mean, num_batches_tracked, momentum)
    unlike_torch = momentum is None or not unbiased
    if training and unlike_torch and running_mean is not None and running_var is not None:
        mean, var = torch.zeros_like(running_mean), torch.ones_like(running_var)
        y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if input.numel() > 0:  # an empty batch has no statistics
            _step(running_mean, running_var, mean, var, momentum, num_batches_tracked, _correction(input, unbiased))
    else:
        factor = 0.0 if momentum is None else momentum
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    return y


def _correction(input: Tensor, unbiased: bool) -> float:
    """What makes the unbiased variance of a batch what `running_var` takes."""
    values = input.numel() // input.shape[1]
    return 1.0 if unbiased else (values - 1) / values


def _step(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    correction: float,
) -> None:
    """running += (batch - running) * momentum, or / number of batches. That number is a tensor, which no operator of
    torch takes for a momentum; and reading it would stop a trace, and wait for a GPU."""
    if momentum is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * correction, momentum)
    elif num_batches_tracked is not None:
        part = 1.0 / num_batches_tracked.to(mean.dtype)
        running_mean.lerp_(mean, part)
        running_var.lerp_(var * correction, part)
