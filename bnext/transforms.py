"""Batch normalization under `torch.func` and in forward mode, where a C++ autograd Function cannot go: a Function in
Python runs the same kernels, forward and backward.

Derivatives of higher order, and those in forward mode, are taken of formulas in torch's operators. Under vmap each of
the examples is a batch of its own: they become channels of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext import activation as activations
from bnext import aten
from bnext._extension import extension

__all__ = ["batch_norm"]


class _Settings(NamedTuple):
    """What has no gradient, and is no tensor."""

    training: bool
    eps: float
    activation: str
    activation_param: float


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
    """`bnext.functional.batch_norm` in the arguments of the operator."""
    if training and ghost_batch_size is not None:
        parts = aten.ghost_batches(input, ghost_batch_size)
        residuals = [None] * len(parts) if residual is None else residual.tensor_split(len(parts))
        statistics = running_mean, running_var, num_batches_tracked

        def of_part(part: Tensor, r: Tensor | None) -> Tensor:
            first = part, weight, bias, *statistics, r
            return batch_norm(*first, training, momentum, eps, activation, activation_param, unbiased, None)

        return torch.cat([of_part(*pair) for pair in zip(parts, residuals, strict=True)])
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("running_mean and running_var must be defined in evaluation mode")
    values = input.numel() // input.shape[1] if input.numel() > 0 else 0
    if training and values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if training:
        counter = None if num_batches_tracked is None else num_batches_tracked.long()  # of any dtype, as in torch
        statistics = running_mean, running_var, counter
        extension().check_training(input, weight, bias, *statistics, residual, momentum, eps)
    given = (None, None) if training else (running_mean, running_var)
    settings = _Settings(training, eps, activation, activation_param)
    y, mean, var = _BatchNorm.apply(input, weight, bias, residual, *given, settings)
    if training and values > 0:  # an empty batch has no statistics
        step = var * (values / (values - 1)) if unbiased else var
        _step(running_mean, running_var, num_batches_tracked, momentum, mean, step)
    if training and num_batches_tracked is not None:  # last: vmap may refuse to write the others
        num_batches_tracked.add_(1)
    return y


@torch.no_grad()
def _step(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    var: Tensor,
) -> None:
    if running_mean is None or running_var is None:
        return
    if momentum is None:
        assert num_batches_tracked is not None  # checked before anything has changed
        weight = 1.0 / (num_batches_tracked + 1).to(mean.dtype)
    else:
        weight = torch.full((), momentum, dtype=mean.dtype, device=mean.device)
    stepped = [torch.lerp(t.to(mean.dtype), batch, weight) for t, batch in ((running_mean, mean), (running_var, var))]
    before = running_mean.clone()
    running_mean.copy_(stepped[0])
    try:
        running_var.copy_(stepped[1])
    except RuntimeError:  # of vmap, where only running_mean is batched: a call that fails changes nothing
        running_mean.copy_(before)
        raise


class _BatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual, mean, var) -> y, and the mean and variance that it used."""

    @staticmethod
    def forward(x, weight, bias, residual, mean, var, settings):
        ops = torch.ops.bnext
        if settings.training:
            mean, var = ops.batch_norm_stats(x)
        else:
            mean, var = (t.to(_statistics_dtype(x)) for t in (mean, var))
        invstd = (var + settings.eps).rsqrt()
        how = settings.activation, settings.activation_param
        y, _ = ops.batch_norm_normalize(x, mean, invstd, weight, bias, residual, *how, False)
        return y, mean.clone(), var.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.settings = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(*tensors[:4], mean, var)
        ctx.save_for_forward(*tensors[:4], mean, var)

    @staticmethod
    def backward(ctx, dy, _mean, _var):
        x, weight, bias, residual, mean, var = ctx.saved_tensors
        active = ctx.settings.activation != "none"
        grads = _Backward.apply(dy, x, weight, bias, residual if active else None, mean, var, ctx.settings)
        dx, dweight, dbias, dresidual = grads
        return dx, dweight, dbias, dresidual if active or residual is None else dy, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        *primals, mean, var = ctx.saved_tensors

        def formula(*tensors: Any) -> tuple[Tensor | None, ...]:
            return (_normalized(*(*tensors, mean, var, ctx.settings))[0],)

        (tangent,) = _push_forward(formula, primals, tangents[:4])
        return tangent, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, settings = inputs
        (x, weight, bias, residual, mean, var), wide = _fold(info.batch_size, in_dims, tensors, (0, 3))
        y, mean, var = _BatchNorm.apply(x, weight, bias, residual, mean, var, settings)
        if settings.training and in_dims[0] is None:  # all examples have the same statistics
            return (*_unfold(info.batch_size, (y,), wide), mean[:wide], var[:wide]), (1, None, None)
        return _unfold(info.batch_size, (y, mean, var), wide), (1, 0, 0)


class _Backward(torch.autograd.Function):
    """(dy, x, weight, bias, residual, mean, var) -> dx, dweight, dbias, dresidual; None for what is not given."""

    @staticmethod
    def forward(dy, x, weight, bias, residual, mean, var, settings):
        needs = [True, weight is not None, bias is not None, residual is not None]
        invstd = (var + settings.eps).rsqrt()
        how = settings.activation, settings.activation_param
        grads = torch.ops.bnext.batch_norm_backward(
            dy, x, weight, bias, mean, invstd, None, residual, *how, settings.training, needs
        )
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _formula(ctx) -> tuple[Callable[..., tuple[Tensor | None, ...]], list[Tensor | None]]:
        *primals, mean, var = ctx.saved_tensors

        def formula(dy: Tensor, *tensors: Any) -> tuple[Tensor | None, ...]:
            return _gradients(dy, *(*tensors, mean, var, ctx.settings))

        return formula, primals

    @staticmethod
    def backward(ctx, *cotangents):
        formula, primals = _Backward._formula(ctx)
        return *_pull_back(formula, primals, cotangents), None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        formula, primals = _Backward._formula(ctx)
        return _push_forward(formula, primals, tangents[:5])

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, settings = inputs
        folded, wide = _fold(info.batch_size, in_dims, tensors, (0, 1, 4))
        grads = _Backward.apply(*folded, settings)
        dims = tuple(None if g is None else 1 if i in (0, 3) else 0 for i, g in enumerate(grads))
        return _unfold(info.batch_size, grads, wide), dims


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    settings: _Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula of the forward: y, the normalized x, invstd, and the activation's argument."""
    wide, over = _statistics_dtype(x), [d for d in range(x.dim()) if d != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    xd = x.to(wide)
    if settings.training:
        var, mean = torch.var_mean(xd, over, correction=0)
    invstd = (var.to(wide) + settings.eps).rsqrt().view(shape)
    normalized = (xd - mean.to(wide).view(shape)) * invstd
    argument = normalized
    if weight is not None:
        argument = argument * weight.to(wide).view(shape)
    if bias is not None:
        argument = argument + bias.to(wide).view(shape)
    if residual is not None:
        argument = argument + residual.to(wide)
    y = activations.apply(settings.activation, settings.activation_param, argument).to(x.dtype)
    return y, normalized, invstd, argument


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    settings: _Settings,
) -> tuple[Tensor | None, ...]:
    """The formula of the backward (docs/math.md), for derivatives of it."""
    _, normalized, invstd, argument = _normalized(x, weight, bias, residual, mean, var, settings)
    over, shape = [d for d in range(x.dim()) if d != 1], invstd.shape

    def activation(t: Tensor) -> Tensor:
        return activations.apply(settings.activation, settings.activation_param, t)

    grad = dy.to(argument.dtype)
    if settings.activation != "none":
        (grad,) = torch.func.vjp(activation, argument)[1](grad)
    dweight, dbias = (grad * normalized).sum(over), grad.sum(over)
    dx = grad
    if settings.training:
        values = x.numel() // x.shape[1]
        dx = grad - (dbias.view(shape) + normalized * dweight.view(shape)) / values
    dx = dx * invstd
    if weight is not None:
        dx = dx * weight.to(dx.dtype).view(shape)
    return (
        dx.to(x.dtype),
        None if weight is None else dweight.to(weight.dtype).view_as(weight),
        None if bias is None else dbias.to(bias.dtype).view_as(bias),
        None if residual is None else grad.to(residual.dtype),
    )


def _pull_back(
    formula: Callable[..., tuple[Tensor | None, ...]],
    primals: Sequence[Any],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The formula's vector-Jacobian product. A missing tensor stays missing."""
    there = [i for i, t in enumerate(primals) if t is not None]
    wanted = [i for i, t in enumerate(cotangents) if t is not None]

    def of_those(*tensors: Tensor) -> tuple[Tensor, ...]:
        everything = list(primals)
        for i, t in zip(there, tensors, strict=True):
            everything[i] = t
        results = formula(*everything)
        return tuple(r for i in wanted if (r := results[i]) is not None)

    vjp: Any = torch.func.vjp(of_those, *(t for t in primals if t is not None))[1]
    grads: list[Tensor | None] = [None] * len(primals)
    for i, grad in zip(there, vjp(tuple(cotangents[i] for i in wanted)), strict=True):
        grads[i] = grad
    return grads


def _push_forward(
    formula: Callable[..., tuple[Tensor | None, ...]],
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The formula's Jacobian-vector product, as the transpose of the transpose: forward mode does not nest."""
    results = formula(*primals)
    given = [i for i, r in enumerate(results) if r is not None]

    def spread(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        everything: list[Tensor | None] = [None] * len(results)
        for i, t in zip(given, tensors, strict=True):
            everything[i] = t
        return everything

    def transpose(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(g for g in _pull_back(formula, primals, spread(cotangents)) if g is not None)

    zeros = (torch.zeros_like(r) for r in results if r is not None)
    pairs = zip(primals, tangents, strict=True)
    moved = tuple(torch.zeros_like(p) if t is None else t for p, t in pairs if p is not None)
    return tuple(spread(torch.func.vjp(transpose, *zeros)[1](moved)))


def _fold(
    examples: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None], like_x: tuple[int, ...]
) -> tuple[list[Tensor | None], int]:
    """Makes the examples of vmap channels: (B, N, C, *) and (B, C) become (N, B * C, *) and (B * C,)."""
    folded: list[Tensor | None] = []
    channels = 0
    for i, (t, dim) in enumerate(zip(tensors, in_dims, strict=False)):
        if t is None:
            folded.append(None)
            continue
        t = t.unsqueeze(0).expand(examples, *t.shape) if dim is None else t.movedim(dim, 0)
        if i in like_x:
            channels = t.shape[2]
            folded.append(t.movedim(0, 1).flatten(1, 2))
        else:
            folded.append(t.reshape(-1))
    return folded, channels


def _unfold(examples: int, results: Sequence[Tensor | None], channels: int) -> tuple[Tensor | None, ...]:
    """Makes examples of channels again: at dimension 1 of what is like x, at 0 of a vector of channels."""
    sizes = (examples, channels)
    return tuple(
        None if t is None else t.unflatten(1, sizes) if t.dim() > 1 else t.unflatten(0, sizes) for t in results
    )
