"""The same batch normalization by torch's own operators: for where the kernels cannot go, and for programs that are
saved to run without bnext. TorchScript compiles what is here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bnext.activation import apply

__all__ = ["batch_norm"]


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
) -> Tensor:
    """activation(bn(input) + residual): `bnext.functional.batch_norm` in the arguments of the operator."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if training and momentum is None and running_mean is not None and running_var is not None:
        y = _cumulative(input, weight, bias, running_mean, running_var, num_batches_tracked, eps)
    else:
        factor = 0.0 if momentum is None else momentum
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    if residual is not None:
        y = y + residual
    return apply(activation, activation_param, y)


def _cumulative(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    eps: float,
) -> Tensor:
    """All batches weigh the same: running += (batch - running) / number of batches. That number is a tensor, which no
    operator of torch takes for a momentum; and reading it would stop a trace, and wait for a GPU."""
    if num_batches_tracked is None:
        raise ValueError("momentum=None averages over all batches, and needs num_batches_tracked to count them")
    mean, var = torch.zeros_like(running_mean), torch.ones_like(running_var)
    y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    part = 1.0 / num_batches_tracked.to(mean.dtype)
    running_mean.lerp_(mean, part)
    running_var.lerp_(var, part)
    return y
