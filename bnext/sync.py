"""Batch normalization over the batches of several processes: `torch.nn.SyncBatchNorm` on bnext's kernels, also on CPUs.

    >>> import bnext, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), bnext.BatchNorm2d(8, activation="relu"))
    >>> layer = bnext.convert_sync_batchnorm(model)[1]
    >>> type(layer).__name__, layer.activation
    ('SyncBatchNorm', 'relu')

Forward and backward take one collective each: every process gathers the statistics of all, a row each, and merges them
itself; the two sums of the backward are added over all. docs/math.md has the formulas. The gradients of weight and
bias are those of the process's own part of the batch: DistributedDataParallel averages them.

The order of the collectives is that of the calls, which has to be the same in every process of a group, as for all of
torch.distributed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from bnext import ops
from bnext._extension import extension
from bnext.activation import Activation, apply, resolve
from bnext.checkpointing import held
from bnext.nn import _BatchNorm
from bnext.recomputation import here

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """Batch normalization of (N, C) or (N, C, *), in training by the statistics of a whole process group: see
    `torch.nn.SyncBatchNorm`.

    Takes CPU tensors too, by a backend such as gloo. In evaluation mode, in a group of one process, and without
    torch.distributed it is the ordinary layer. N may differ between processes, and be 0.

    `activation` is None, a name such as "relu", `nn.SiLU()` or `F.silu`; `forward(input, residual=None)` returns
    activation(bn(input) + residual) in the shape of `input`. Raises what `torch.nn.SyncBatchNorm` raises, what
    `bnext.functional.batch_norm` lists, and RuntimeError, with the names of the layer and of the group, where the group
    fails: in particular where a process does not come before the group's timeout.
    """

    #: What errors call the layer; `convert_sync_batchnorm` gives its place in the model.
    _name: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight: bool = True,
        bias: bool = True,
        activation: Activation = None,
        activation_param: float | None = None,
        decay: float | None = None,
        unbiased: bool | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            weight=weight,
            bias=bias,
            activation=activation,
            activation_param=activation_param,
            decay=decay,
            unbiased=unbiased,
        )
        self.process_group = process_group

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(bn(input) + residual), in the shape, dtype and memory format of `input`.

        Call the layer, not this: `layer(input)` or `layer(input, residual)` runs its hooks too. In training mode every
        process of the group has to call it, and it updates the running statistics. `residual` has the shape, dtype and
        device of `input` then: what other layers broadcast or promote is an error where several processes take part.
        """
        group = self._group() if self.training and not self.frozen and not isinstance(input, Proxy) else None
        if group is None:
            return super().forward(input, residual)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        steps = self.track_running_stats and (torch.compiler.is_compiling() or held.depth == 0)
        tracked = (self.running_mean, self.running_var, self.num_batches_tracked) if steps else ()
        mean, var, counter = tracked or (None, None, None)
        operands = (input, self.weight, self.bias, mean, var, counter, residual)
        if not torch.compiler.is_compiling():
            # Before the others wait for this process, and before anything is changed.
            extension().check_training(*operands, self.momentum, self.eps)
        activation, param = resolve(self.activation, self.activation_param)
        settings = _Settings(self.momentum, self.unbiased, self.eps, activation, param, group, self._who())

        def run(input: Tensor, *_: Any) -> Tensor:
            return cast(Tensor, _Forward.apply(input, self.weight, self.bias, residual, mean, var, counter, settings))

        if torch.compiler.is_compiling() or here.block is None:
            return run(input)
        args = (*operands, True, self.momentum, self.eps, activation, param)
        return cast(Tensor, here.block.run(run, *args))

    def _group(self) -> Any | None:
        """The process group to synchronise with, or None where there is nobody else."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _who(self) -> str:
        return f"SyncBatchNorm({self.num_features})" + (f" {self._name!r}" if self._name else "")


# ---- one layer's call


class _Settings(NamedTuple):
    """What a call takes besides tensors."""

    momentum: float | None
    unbiased: bool
    eps: float
    activation: str
    param: float
    group: Any
    who: str  # for errors


class _Saved(NamedTuple):
    """What the backward takes: operands that the forward had, and what it made of them."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None  # only for an activation's argument
    residual: Tensor | None  # only for an activation that keeps it
    mask: Tensor | None  # only for an activation that keeps a bit an element
    mean: Tensor
    invstd: Tensor
    total: Tensor  # how many values a channel all processes have

    def in_format(self, format: torch.memory_format) -> _Saved:
        """With x as the mask's bits are ordered by: a hook of saved tensors may have returned other strides."""
        return self if self.mask is None else self._replace(x=self.x.contiguous(memory_format=format))


def _format_of(dense: Tensor) -> torch.memory_format:
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    return next(f for f in formats if dense.is_contiguous(memory_format=f))


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, running_mean, running_var, counter, settings):
        stats = _gathered(ops.batch_norm_local_stats(x), settings)
        mean, invstd, total = ops.batch_norm_merge(
            stats, running_mean, running_var, counter, settings.momentum, settings.eps, settings.unbiased
        )
        activation, param = settings.activation, settings.param
        keeps = residual is not None and activation != "none" and any(ctx.needs_input_grad)
        y, mask = ops.batch_norm_normalize(x, mean, invstd, weight, bias, residual, activation, param, keeps)
        uses_mask = mask.numel() > 0
        needs_bias = activation != "none"
        ctx.format = _format_of(y)
        ctx.save_for_backward(
            x,
            weight,
            bias if needs_bias else None,
            residual if keeps and not uses_mask else None,
            mask if uses_mask else None,
            mean,
            invstd,
            total,
        )
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx, dy):
        saved, settings = _Saved(*ctx.saved_tensors).in_format(ctx.format), ctx.settings
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph
            gradients = _Backward.apply(dy, *saved, settings, wanted)
        else:
            gradients = _gradients(dy, saved, settings, wanted)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None, None


def _gradients(dy: Tensor, saved: _Saved, settings: _Settings, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and residual."""
    x, weight, bias, residual, mask, mean, invstd, total = saved
    # In the order of the operators' arguments.
    operands = (dy, x, mean, invstd, weight, bias, mask, residual)
    activation = (settings.activation, settings.param)
    sum_dy, sum_dy_xmu, dweight, dbias = ops.batch_norm_backward_reduce(*operands, *activation)
    none = settings.activation == "none"
    dx, dresidual = None, dy if wanted[3] and none else None
    if wanted[0] or (wanted[3] and not none):
        sums = torch.stack((sum_dy, sum_dy_xmu))
        if wanted[0]:
            sums = _added(sums, settings)
        # Only the device knows the total; where it is 0 there is nothing to divide for.
        means = sums / total.clamp(min=1)
        gradients = ops.batch_norm_backward_input(*operands, means[0], means[1], 1, *activation)
        dx = gradients[0]
        if wanted[3] and not none:
            dresidual = gradients[1]
    return dx, dweight, dbias, dresidual


# ---- the second order


class _Backward(torch.autograd.Function):
    """The backward, where it will itself be differentiated. Its own derivative is that of the same formulas, written in
    torch's operators and a sum over processes that knows its gradient; hence so are all further ones."""

    @staticmethod
    def forward(ctx, dy, *rest):
        *saved, settings, wanted = rest
        ctx.save_for_backward(dy, *saved)
        first = _Saved(*saved)
        ctx.settings, ctx.format = settings, torch.contiguous_format if first.mask is None else _format_of(first.x)
        gradients = _gradients(dy, first, settings, wanted)
        # What torch gets back as it came, it takes for an output that is an input.
        return tuple(g.view_as(g) if g is dy else g for g in gradients)

    @staticmethod
    def backward(ctx, *gradients):
        again = torch.is_grad_enabled()
        dy, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]  # dy, x, weight, bias, residual
        with torch.enable_grad():
            operands = [dy, *saved[:4]]
            if not again:
                each = zip(operands, needs, strict=True)
                operands = [None if t is None else t.detach().requires_grad_(need) for t, need in each]
            restored = _Saved(*operands[1:], *saved[4:]).in_format(ctx.format)
            first = _differentiable_gradients(operands[0], restored, ctx.settings)
            both = zip(first, gradients, strict=True)
            pairs = [(f, g.view_as(f).to(f.dtype)) for f, g in both if g is not None and f.requires_grad]
            inputs = [t for t, n in zip(operands, needs, strict=True) if n]
            found = iter(
                torch.autograd.grad(
                    [f for f, _ in pairs],
                    inputs,
                    [g for _, g in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
            )
        return *(next(found) if n else None for n in needs), *[None] * (len(ctx.needs_input_grad) - 5)


def _differentiable_gradients(dy: Tensor, saved: _Saved, settings: _Settings) -> tuple[Tensor, ...]:
    """Like `_gradients`; mean and invstd are taken from x anew, as what is differentiated."""
    acc = saved.mean.dtype
    axes = [d for d in range(dy.dim()) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(dy.dim())]
    count = saved.total.clamp(min=1).to(acc)

    def mean(*terms: Tensor) -> list[Tensor]:
        sums = _Added.apply(torch.stack([t.sum(axes) for t in terms]), settings)
        return [(s / count).view(shape) for s in sums]

    x, dy = saved.x.to(acc), dy.to(acc)
    (mu,) = mean(x)
    (var,) = mean((x - mu).square())
    invstd = (var + settings.eps).rsqrt()
    xhat = (x - mu) * invstd
    weight = torch.ones_like(invstd) if saved.weight is None else saved.weight.to(acc).view(shape)
    if saved.mask is not None:
        # 0 and not dy * 0 where the derivative is, as in torch, so that what is infinite there stays there.
        g = torch.where(_bits(saved, settings), dy, dy * settings.param if settings.param else 0.0)
    elif settings.activation != "none":
        z = xhat * weight
        if saved.bias is not None:
            z = z + saved.bias.to(acc).view(shape)
        if saved.residual is not None:
            z = z + saved.residual.to(acc)
        z = z if z.requires_grad else z.requires_grad_()
        y = apply(settings.activation, settings.param, z)
        (g,) = torch.autograd.grad(y, z, dy, create_graph=True)
    else:
        g = dy
    mean_g, mean_gx = mean(g, g * xhat)
    dx = (g - mean_g - xhat * mean_gx) * (invstd * weight)
    dtype = saved.x.dtype
    return dx.to(dtype), (g * xhat).sum(axes), g.sum(axes), g.to(dtype)


def _bits(saved: _Saved, settings: _Settings) -> Tensor:
    """A mask as bool like x: where the derivative is 1. The kernel that knows the mask's order multiplies by it."""
    x, nothing = saved.x.detach(), torch.zeros_like(saved.mean)
    statistics = (saved.mean, saved.invstd, saved.weight, saved.bias)
    operands = (torch.ones_like(x), x, *statistics, saved.mask, None, nothing, nothing, 1)
    return ops.batch_norm_backward_input(*operands, settings.activation, settings.param)[1] == 1


class _Added(torch.autograd.Function):
    """The sum over all processes, each of which has a part of what is differentiated."""

    @staticmethod
    def forward(ctx, sums, settings):
        ctx.settings = settings
        return _added(sums.clone(), settings)

    @staticmethod
    def backward(ctx, gradient):
        return _Added.apply(gradient, ctx.settings), None


# ---- collectives


def _gathered(row: Tensor, settings: _Settings) -> Tensor:
    """The rows of all processes of the group, in the order of their ranks."""
    group = settings.group
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as funcol  # takes longer to import than all of bnext

        return funcol.all_gather_tensor(row.unsqueeze(0), 0, group)
    ranks = dist.get_world_size(group)
    rows = row.new_empty(ranks * row.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # what newer torch calls it, first
    with _failing_by_name("all_gather", settings):
        gather(rows, row, group)
    return rows.view(ranks, -1)


def _added(sums: Tensor, settings: _Settings) -> Tensor:
    """The sum over all processes of the group; may be `sums` itself."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as funcol

        return funcol.all_reduce(sums, "sum", settings.group)
    with _failing_by_name("all_reduce", settings):
        dist.all_reduce(sums, group=settings.group)
    return sums


@contextlib.contextmanager
def _failing_by_name(collective: str, settings: _Settings) -> Iterator[None]:
    """Whoever waits for a process that does not come should learn where."""
    try:
        yield
    except RuntimeError as error:
        group = settings.group
        raise RuntimeError(
            f"bnext.{settings.who}: {collective} failed in process {dist.get_rank()}, over process group "
            f"{group.group_name!r} of processes {dist.get_process_group_ranks(group)}; each of them has to call the "
            f"layer as often as the others, with as many channels, and in time: {error}"
        ) from error
