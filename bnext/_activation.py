"""Which activations there are: the type of the argument `activation`, and the operators' names."""

from __future__ import annotations

from typing import Literal, TypeAlias

Activation: TypeAlias = Literal["relu"] | None
"""What `activation` takes, everywhere in this package."""

_OPERATOR_NAMES: dict[str | None, str] = {None: "none", "relu": "relu"}


def operator_name(activation: Activation) -> str:
    """The name that `torch.ops.bnext.*` takes for it. Raises ValueError where there is none."""
    if activation not in _OPERATOR_NAMES:
        raise ValueError(f"activation should be None or 'relu', not {activation!r}")
    return _OPERATOR_NAMES[activation]
