"""Batch normalization by its definition, in float64: what tests and benchmarks compare with.

Slow and plain. Nothing here uses the extension; the activations, and their derivatives, are `torch.nn.functional`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Forward:
    """All float64: y like x, the others (C,). The running statistics are None where not given."""

    y: Tensor
    mean: Tensor
    var: Tensor  # biased
    invstd: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None


@dataclass
class Backward:
    """All float64: dx, dresidual like x, dweight, dbias (C,)."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dresidual: Tensor


def forward(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    activation_param: float | None = None,
    residual: Tensor | None = None,
    unbiased: bool = True,
) -> Forward:
    """act((x - mean) / sqrt(var + eps) * weight + bias + residual) for x of shape (N, C, *)."""
    x = x.detach().double()
    axes, m = _axes(x), x.numel() // x.shape[1]
    running_mean, running_var = (None if t is None else t.double() for t in (running_mean, running_var))
    if training:
        mean = x.mean(axes)
        var = (x - _channel(mean, x)).square().mean(axes)
        if running_mean is not None and running_var is not None:
            running_mean = (1 - momentum) * running_mean + momentum * mean
            running_var = (1 - momentum) * running_var + momentum * (var * m / (m - 1) if unbiased else var)
    elif running_mean is None or running_var is None:
        raise ValueError("evaluation needs running_mean and running_var")
    else:
        mean, var = running_mean, running_var
    invstd = 1 / (var + eps).sqrt()
    y = _before_activation(x, mean, invstd, weight, bias, residual)
    return Forward(_activate(y, activation, activation_param), mean, var, invstd, running_mean, running_var)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    activation: str | None = None,
    activation_param: float | None = None,
    residual: Tensor | None = None,
) -> Backward:
    """The gradients of `forward`, given its mean and invstd."""
    dy, x = dy.detach().double(), x.detach().double()
    axes, m = _axes(x), x.numel() // x.shape[1]
    z = _before_activation(x, mean, invstd, weight, bias, residual).requires_grad_()
    with torch.enable_grad():
        (dy,) = torch.autograd.grad(_activate(z, activation, activation_param), z, dy)
    xhat = (x - _channel(mean, x)) * _channel(invstd, x)
    dbias, dweight = dy.sum(axes), (dy * xhat).sum(axes)
    dx = dy - (_channel(dbias, x) + xhat * _channel(dweight, x)) / m if training else dy
    scale = invstd if weight is None else invstd * weight.detach().double()
    return Backward(dx * _channel(scale, x), dweight, dbias, dy)


def _activate(z: Tensor, activation: str | None, param: float | None) -> Tensor:
    if activation is None:
        return z
    return getattr(torch.nn.functional, activation)(z, *([] if param is None else [param]))


def _axes(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _channel(t: Tensor, x: Tensor) -> Tensor:
    return t.detach().double().reshape([-1 if d == 1 else 1 for d in range(x.dim())])


def _before_activation(x, mean, invstd, weight, bias, residual) -> Tensor:
    y = (x - _channel(mean, x)) * _channel(invstd, x)
    if weight is not None:
        y = y * _channel(weight, x)
    if bias is not None:
        y = y + _channel(bias, x)
    if residual is not None:
        y = y + residual.detach().double()
    return y
