"""The schemas of `torch.ops.bnext.*`, registered when bnext is imported.

A program saved by `torch.export` or `torch.jit` names operators by their schemas, and is loaded before anything has
called one. So the schemas are here, where registering them loads and compiles nothing, and the kernels are in the
extension, which the first call of any operator loads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnext._extension import extension

_LIBRARY = torch.library.Library("bnext", "DEF")

SCHEMAS = [
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor? residual, bool training, float? momentum, float eps, "
    "str activation='none', float activation_param=0.0, bool unbiased=True, int? ghost_batch_size=None) -> Tensor",
    "batch_norm_stats(Tensor x) -> (Tensor mean, Tensor var)",
    "batch_norm_local_stats(Tensor x) -> Tensor",
    "batch_norm_merge(Tensor stats, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum, float eps, bool unbiased=True) "
    "-> (Tensor mean, Tensor invstd, Tensor count)",
    "batch_norm_normalize(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual=None, "
    "str activation='none', float activation_param=0.0, bool save_mask=False) -> (Tensor y, Tensor mask)",
    "batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, "
    "str activation='none', float activation_param=0.0, bool save_mask=False, bool unbiased=True, "
    "int? ghost_batch_size=None) "
    "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
    "batch_norm_forward_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "Tensor? residual, float eps, "
    "str activation='none', float activation_param=0.0, bool save=False, bool save_mask=False) "
    "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)",
    "batch_norm_backward_reduce(Tensor dy, Tensor x, Tensor mean, Tensor invstd, "
    "Tensor? weight=None, Tensor? bias=None, Tensor? mask=None, Tensor? residual=None, "
    "str activation='none', float activation_param=0.0) "
    "-> (Tensor sum_dy, Tensor sum_dy_xmu, Tensor dweight, Tensor dbias)",
    "batch_norm_backward_input(Tensor dy, Tensor x, Tensor mean, Tensor invstd, "
    "Tensor? weight, Tensor? bias, Tensor? mask, Tensor? residual, "
    "Tensor sum_dy, Tensor sum_dy_xmu, SymInt count, "
    "str activation='none', float activation_param=0.0) -> (Tensor dx, Tensor dresidual)",
    "batch_norm_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
    "Tensor? mask, Tensor? residual, str activation, float activation_param, bool training, bool[4] needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
]

#: Their names.
OPERATORS = [schema.split("(")[0] for schema in SCHEMAS]


_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}  # where the extension has kernels


def implement_batch_norm(function: Callable[..., Tensor], by_torch: Callable[..., Tensor]) -> None:
    """Has the operator `batch_norm` call `function`, which is composed of the others: what compilers trace it into, and
    autograd runs. Where torch.compile traces vmap it calls `by_torch`, as there is no rule for a Function."""

    def complete(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        defaults = ("none", 0.0, True, None)  # which the dispatcher leaves out
        return lambda *args: f(*args, *defaults[len(args) - 10 :])

    _LIBRARY.impl("batch_norm", complete(function), "CompositeImplicitAutograd")
    _LIBRARY.impl("batch_norm", complete(by_torch), "FuncTorchBatchedDecomposition")


def _load(name: str) -> Callable[..., Any]:
    """What operator `name` does where no kernel is registered: the extension's come before it once they are loaded."""

    def load(*args: Any, **kwargs: Any) -> Any:
        extension()
        operator = getattr(torch.ops.bnext, name).default
        operator._dispatch_cache.clear()  # of the Python dispatcher, by which torch.compile would come here for ever
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        device = tensors[0].device.type
        key = _KEYS.get(device)
        if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"bnext::{name}", key):
            raise NotImplementedError(f"bnext::{name} has kernels for cpu and cuda tensors, not for {device}")
        for t in tensors:
            if t.layout != torch.strided or t.is_quantized:
                kind = "quantized" if t.is_quantized else str(t.layout).removeprefix("torch.")
                raise NotImplementedError(f"bnext::{name} has kernels for dense tensors, not for {kind} ones")
        return operator(*args, **kwargs)

    return load


for _schema in SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name in OPERATORS:
    if _name != "batch_norm":
        _LIBRARY.impl(_name, _load(_name), "CompositeExplicitAutograd")
