"""The activations that batch normalization fuses, and the ways to name one.

    activation="silu"               its name
    activation=nn.SiLU              a class of torch.nn, or an instance: nn.LeakyReLU(0.2)
    activation=nn.functional.silu   a function of torch

Adding one takes a row and a line of `apply` here, and an entry, with its derivatives, in csrc/core/activation.h.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Row(NamedTuple):
    module: type[nn.Module]
    functions: tuple[Callable[..., Tensor], ...]
    parameter: str | None = None  # the attribute of the module that `activation_param` stands for
    default: float = 0.0


_TABLE = {
    "none": _Row(nn.Identity, ()),
    "relu": _Row(nn.ReLU, (F.relu, torch.relu, Tensor.relu)),
    "relu6": _Row(nn.ReLU6, (F.relu6,)),
    "leaky_relu": _Row(nn.LeakyReLU, (F.leaky_relu,), "negative_slope", 0.01),
    "silu": _Row(nn.SiLU, (F.silu,)),
    "hardswish": _Row(nn.Hardswish, (F.hardswish,)),
    "sigmoid": _Row(nn.Sigmoid, (F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit)),
    "tanh": _Row(nn.Tanh, (F.tanh, torch.tanh, Tensor.tanh)),
}
#: What `activation` may be, besides None, a class of torch.nn and a function.
NAMES = tuple(name for name in _TABLE if name != "none")

_BY_NAME = {None: ("none", 0.0)} | {name: (name, _TABLE[name].default) for name in NAMES}
#: The attributes of an activation as it is made by default.
_USUAL = {name: dict(vars(row.module())) for name, row in _TABLE.items()}
_BY_CLASS = {row.module: name for name, row in _TABLE.items()}
_BY_OBJECT = _BY_CLASS | {f: name for name, row in _TABLE.items() for f in row.functions}

#: In graphs, where those that change their argument in place are no other activation.
_BY_CALL: dict[Any, str] = {f: name for name, row in _TABLE.items() for f in row.functions} | {torch.relu_: "relu"}
_BY_METHOD = {f"{name}{suffix}": name for name in ("relu", "sigmoid", "tanh") for suffix in ("", "_")}

ActivationName: TypeAlias = Literal["relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh"]
Activation: TypeAlias = ActivationName | type[nn.Module] | nn.Module | Callable[..., Tensor] | None
"""What `activation` takes, everywhere in this package: a name, a class of torch.nn or an instance of one, a
function of torch, or None."""


def resolve(activation: Activation, param: float | None = None) -> tuple[str, float]:
    """The operators' `activation` and `activation_param`.

    Raises:
        ValueError: there is no such activation, it has options or hooks that the kernels do not know, or `param` is
            given to one that has no parameter.
        TypeError: `param` is no number.
    """
    if param is None and (activation is None or isinstance(activation, str)) and activation in _BY_NAME:
        return _BY_NAME[activation]  # what a layer asks for at every call
    name, default = _find(activation)
    if param is None:
        return name, default
    if not is_number(param):
        raise TypeError(f"activation_param should be a number, not {param!r}")
    if not has_parameter(name):
        raise ValueError(f"activation_param should be None for {activation!r}, which has no parameter, not {param!r}")
    if isinstance(activation, nn.Module) and param != default:
        raise ValueError(f"activation_param should be None or {default!r} for {activation!r}, not {param!r}")
    return name, float(param)


def is_number(value: object) -> bool:
    """Whether an argument that takes a number takes `value`: Python's numbers and numpy's, but not True."""
    return isinstance(value, (float, Real)) and not isinstance(value, bool)  # float first: it is soon found


def apply(name: str, param: float, y: Tensor) -> Tensor:
    """The operators' activation by torch's own functions. A chain, because TorchScript compiles it."""
    if name == "relu":
        return F.relu(y)
    if name == "relu6":
        return F.relu6(y)
    if name == "leaky_relu":
        return F.leaky_relu(y, param)
    if name == "silu":
        return F.silu(y)
    if name == "hardswish":
        return F.hardswish(y)
    if name == "sigmoid":
        return torch.sigmoid(y)
    if name == "tanh":
        return torch.tanh(y)
    if name != "none":
        raise ValueError(f"there is no activation {name}")
    return y


def has_parameter(name: str) -> bool:
    """Whether `activation_param` says anything to the operators' activation `name`."""
    return _TABLE[name].parameter is not None


def fusible(module: nn.Module) -> tuple[ActivationName | None, float | None] | None:
    """`activation` and `activation_param` of a layer that does what `module` does after it; None where the kernels know
    no such activation."""
    try:
        name, param = resolve(module)
    except ValueError:
        return None
    return _public(name), param if has_parameter(name) else None


def module_of(name: ActivationName, param: float | None) -> nn.Module:
    """The layer of torch.nn for the `activation` and `activation_param` of one of bnext."""
    row = _TABLE[name]
    return row.module() if row.parameter is None or param is None else row.module(**{row.parameter: param})


def _public(name: str) -> ActivationName | None:
    return None if name == "none" else cast(ActivationName, name)


def fusible_call(
    function: Callable[..., Tensor] | str, options: tuple, keywords: dict
) -> tuple[ActivationName | None, float | None] | None:
    """Likewise, for a function or a method's name that is called with these arguments after the tensor."""
    keywords = {name: value for name, value in keywords.items() if name != "inplace"}
    name = _BY_METHOD.get(function) if isinstance(function, str) else _BY_CALL.get(function)
    if name is None:
        return None
    row = _TABLE[name]
    if row.parameter is None:
        return None if keywords or not all(isinstance(option, bool) for option in options) else (_public(name), None)
    param = keywords.pop(row.parameter, options[0] if options else row.default)
    return (_public(name), float(param)) if not keywords and isinstance(param, (int, float)) else None


def _find(activation: Activation) -> tuple[str, float]:
    """Its name in the table, and its parameter where nobody gives another one."""
    if activation is None or isinstance(activation, str):
        if activation in _BY_NAME:
            return _BY_NAME[activation]
    elif isinstance(activation, nn.Module):
        if type(activation) in _BY_CLASS:
            name = _BY_CLASS[type(activation)]
            return name, _parameter_of(activation, name)
    elif callable(activation) and activation.__hash__ is not None and activation in _BY_OBJECT:
        name = _BY_OBJECT[activation]
        return name, _TABLE[name].default
    modules = ", ".join(f"nn.{row.module.__name__}" for row in _TABLE.values())
    raise ValueError(
        f"activation should be None, {', '.join(map(repr, NAMES))}, a class of torch.nn or an instance of one "
        f"({modules}), or its function in torch or torch.nn.functional, not {activation!r}"
    )


def _parameter_of(module: nn.Module, name: str) -> float:
    """Refuses what else the module may do."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"activation {module!r} has hooks, which would not be called")
    if "forward" in vars(module):
        raise ValueError(f"activation {module!r} has a forward of its own, which would not be called")
    row, usual = _TABLE[name], _USUAL[name]
    # Dynamo of torch 2.11 cannot list a module's attributes; what its class does not know has no part in its forward.
    for option in usual if torch.compiler.is_compiling() else vars(module):
        if option.startswith("_") or option in ("training", "inplace", row.parameter):
            continue
        value = getattr(module, option)
        if value != usual.get(option):
            raise ValueError(f"activation {module!r} has {option}={value!r}, where only {usual.get(option)!r} is fused")
    return row.default if row.parameter is None else float(getattr(module, row.parameter))
