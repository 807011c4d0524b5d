"""Running statistics: of a whole data set at once, or frozen."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnext import nn as layers
from bnext.conversion import convert
from bnext.inspection import uncompiled
from bnext.sync import SyncBatchNorm

__all__ = ["freeze", "unfreeze", "update_statistics"]

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, *, parameters: bool = True) -> Model:
    """Converts every batch norm of `model`, and has it evaluate from now on: by its running statistics, which no longer
    change, in training mode too. Gradients run through it to the input.

    Neither `update_statistics` nor `torch.optim.swa_utils.update_bn` changes them: the latter calls
    `reset_running_stats`, which does nothing in a frozen layer, and then trains. `reset_parameters` and
    `load_state_dict` still do.

    Args:
        model: any module; changed in place.
        parameters: `weight` and `bias` of these layers do not change either: `requires_grad` is False.

    Raises:
        ValueError: a batch norm has no running statistics, or is lazy and has not seen a batch, or cannot be converted.
            Nothing has changed then.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        if layer.running_mean is None:
            raise ValueError(f"bnext.freeze: {name or 'the layer'} has no running statistics to go by")
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError(
                f"bnext.freeze: {name or 'the layer'} should have seen a batch before it is frozen: {layer!r} is lazy, "
                "and has no running statistics to go by yet"
            )
    convert(model, strict=True)
    for layer in _batch_norms(model):
        layer.frozen = True
        if parameters:
            trained = [name for name, t in layer.named_parameters(recurse=False) if t.requires_grad]
            for name in trained:
                layer.get_parameter(name).requires_grad_(False)
            vars(layer)[_TRAINED] = (*vars(layer).get(_TRAINED, ()), *trained)
    return model


def unfreeze(model: Model, *, parameters: bool = True) -> Model:
    """Undoes `freeze`: with `parameters`, `requires_grad` is True again where that has made it False."""
    for layer in _batch_norms(model):
        if layer.frozen:
            layer.frozen = False
            trained = vars(layer).pop(_TRAINED, ())
            if parameters:
                for name in trained:
                    layer.get_parameter(name).requires_grad_(True)
    return model


#: The attribute of a frozen layer that has the names of the parameters that trained before.
_TRAINED = "_trained_before_freeze"


@torch.no_grad()
def update_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.types.Device = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> None:
    """Sets the running statistics of every batch norm in `model` to the mean and the variance of all that it
    normalizes while `loader` goes through the model: those of the data set, not an average of those of its batches.
    The variance is unbiased, unless the layer's steps take the biased one.

    Statistics of batches are merged by Chan, Golub and LeVeque's formula, with their true counts, in float64. So a
    smaller last batch weighs less, and the spread between batches counts, which `torch.optim.swa_utils.update_bn`
    leaves out. Takes batch norms of torch.nn and of bnext; each normalizes by its batch meanwhile, as in training.
    Frozen ones keep their statistics and normalize by them, as in training too; one that the model does not call keeps
    its own.

    `bnext.SyncBatchNorm` and `torch.nn.SyncBatchNorm` normalize by the batches of their process group meanwhile, and
    get the statistics of what all of its processes have normalized, with the same bits in each: every process calls
    this function, with a loader of its own part of the data.

    What `torch.compile` has made of the model, or of anything else, runs without being compiled meanwhile, in all
    threads.

    Args:
        model: restored to its modes afterwards, also after an error; then its statistics are the old ones, too. Lazy
            layers take their shapes from the first batch, and keep these.
        loader: batches: a tensor, or a tuple or list whose first element is the input.
        device: where inputs are moved; None leaves them where they are.
        forward: runs the model on a batch, in place of `model(input)`.
        progress: shows a line on stderr; None does so where stderr is a terminal.

    Raises:
        ValueError: `model` has no batch norm with running statistics that is not frozen, or `loader` is empty, or no
            batch comes to any of these layers.
        RuntimeError: a process of a group does not come to the end of its loader, or not before the group's timeout.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.running_mean is not None
        and not getattr(layer, "frozen", False)
    }
    if not found:
        raise ValueError("update_statistics: model has no batch norm with running statistics that is not frozen")
    merged = {name: _Merged() for name in found}
    modes = {module: module.training for module in model.modules()}
    before = {name: _copied(layer) for name, layer in found.items()}
    hooks = [
        layer.register_forward_pre_hook(_merge_into(merged[name]), with_kwargs=True) for name, layer in found.items()
    ]
    batches = 0
    try:
        model.eval()
        for layer in found.values():
            layer.train()
        with uncompiled():
            for batch in _shown(loader, progress):
                batches += 1
                if forward is not None:
                    forward(model, batch)
                    continue
                input = batch[0] if isinstance(batch, (tuple, list)) else batch
                model(input if device is None else input.to(device))
        if batches == 0:
            raise ValueError("update_statistics: loader is empty")
        for name, layer in found.items():
            merged[name] = _of_all_processes(merged[name], layer, name)
        if all(statistics.count == 0 for statistics in merged.values()):
            raise ValueError(
                f"update_statistics: model should call one of its batch norms ({', '.join(map(repr, found))}) with "
                f"values, but none of {batches} batches came to any of them"
            )
    except BaseException:
        for name, layer in found.items():
            _restore(layer, before[name])
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    for name, layer in found.items():
        if merged[name].count == 0:  # the model did not call it, or with nothing
            _restore(layer, before[name])
            continue
        merged[name].write(layer)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)


def _copied(layer: nn.Module) -> list[Tensor] | None:
    """Its buffers; None where it is lazy and has none yet."""
    buffers = list(layer.buffers())
    return None if any(is_lazy(t) for t in buffers) else [t.clone() for t in buffers]


def _restore(layer: nn.modules.batchnorm._BatchNorm, before: list[Tensor] | None) -> None:
    if before is not None:
        for t, old in zip(layer.buffers(), before, strict=True):
            t.copy_(old)
    elif _copied(layer) is not None:  # it was lazy, and has seen a batch meanwhile
        layer.reset_running_stats()


class _Merged:
    """The statistics of all values of a channel so far, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None  # of deviations from the mean, their sum

    def add(self, x: Tensor) -> None:
        count = x.numel() // x.shape[1] if x.shape[1] else 0
        if count > 0:
            mean, var = (t.double() for t in torch.ops.bnext.batch_norm_stats(x))
            self.merge(count, mean, var * count)

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Adds those of other values."""
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * (count / total)
        self.squares += squares + delta.square() * (self.count * count / total)
        self.count = total

    def write(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        if self.mean is None or self.squares is None or layer.running_mean is None or layer.running_var is None:
            return
        layer.running_mean.copy_(self.mean)
        unbiased = getattr(layer, "unbiased", True)
        layer.running_var.copy_(self.squares / max(self.count - unbiased, 1))


def _merge_into(merged: _Merged) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = args[0] if args else kwargs[next(iter(inspect.signature(layer.forward).parameters))]
        merged.add(input.detach())

    return hook


def _of_all_processes(merged: _Merged, layer: nn.modules.batchnorm._BatchNorm, name: str) -> _Merged:
    """The statistics of what the processes of its group have normalized together, of which `merged` has this process's
    part. They are merged in the order of ranks, so that all processes get the same bits."""
    # Torch's layer chooses the same processes by the same attribute.
    group = SyncBatchNorm._group(cast(SyncBatchNorm, layer)) if isinstance(layer, nn.SyncBatchNorm) else None
    if group is None or layer.running_mean is None:
        return merged
    mine = layer.running_mean.new_zeros((3, *layer.running_mean.shape), dtype=torch.float64)
    if merged.mean is not None and merged.squares is not None:
        mine[0], mine[1], mine[2] = merged.count, merged.mean, merged.squares
    total = _Merged()
    for counts, mean, squares in _gathered(mine, group, name):
        count = int(counts[0])
        if count > 0:
            total.merge(count, mean, squares)
    return total


def _gathered(mine: Tensor, group: Any, name: str) -> list[Tensor]:
    """Those of all processes of the group, in the order of their ranks."""
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(rows, mine, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"update_statistics: {name or 'the layer'}: gathering the statistics failed in process {dist.get_rank()}, "
            f"over processes {dist.get_process_group_ranks(group)}; each of them has to come to the end of its loader, "
            f"and in time: {error}"
        ) from error
    return rows


def _batch_norms(model: nn.Module) -> list[layers._BatchNorm]:
    return [layer for layer in model.modules() if isinstance(layer, layers._BatchNorm)]


def _shown(loader: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    """The batches, with a line that says how many are done."""
    show = sys.stderr.isatty() if progress is None else progress
    total = f" of {len(loader)}" if isinstance(loader, Sized) else ""
    last = 0.0
    for i, batch in enumerate(loader, 1):
        yield batch
        if show and time.monotonic() - last > 0.2:
            last = time.monotonic()
            print(f"\rstatistics: {i}{total} batches", end="", file=sys.stderr, flush=True)
    if show:
        print(file=sys.stderr)
