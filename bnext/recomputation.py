"""Outputs of batch norms that need not be kept for the backward: they follow from what the batch norm keeps anyway.

A convolution behind a batch norm keeps its input y; the batch norm keeps x, and y = activation((x - mean) * invstd *
weight + bias + residual) is one pass over x. So whoever would keep y keeps this recipe, by saved-tensor hooks of
autograd, and the backward computes y again, to the bit, when it is asked for.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["recompute"]

Model = TypeVar("Model", bound=nn.Module)

#: How many normalizations a recipe may take. With a residual that has a recipe of its own it takes more than one.
_LONGEST = 2


@overload
def recompute(model: None = None) -> Recomputation: ...
@overload
def recompute(model: Model, on: bool = True) -> Model: ...
def recompute(model: Any = None, on: bool = True) -> Any:
    """Has operators that would keep the output of a batch norm for their backward compute it again instead.

    >>> import torch, bnext
    >>> net = torch.nn.Sequential(bnext.BatchNorm2d(3, activation="relu"), torch.nn.Conv2d(3, 8, 3))
    >>> x = torch.randn(2, 3, 9, 9)
    >>> with bnext.recompute():
    ...     loss = net(x).sum()
    >>> loss.backward()  # the same gradients, to the bit

    It holds for layers of bnext, and for `bnext.functional.batch_norm`, in the thread that runs them; the backward may
    run anywhere. Costs a pass over x for every output that is asked for, once a backward. An output with a residual is
    computed again where the residual is kept for another reason, or is computed again itself; docs/memory.md has the
    rules, and what it saves. `bnext.memory` tells for a model.

    In graphs of torch.compile it does nothing: which values to keep is decided by the compiler's partitioner. Under
    `torch.func` it is an error, as torch has no saved-tensor hooks there.

    Args:
        model: has its forward run so from now on, also in copies and pickles of it. None is for a `with` block.
        on: False undoes it for `model`.

    Returns:
        `model`, or a context manager.
    """
    if model is None:
        return Recomputation()
    _end_interrupted()
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if is_hook_of_recompute(hook)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    if on:
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    return model


class _Here(threading.local):
    """The thread's innermost block, and those that modules' hooks have entered, with the frame that ran the hook."""

    block: Recomputation | None = None

    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, FrameType, Recomputation]] = []


here = _Here()


def _enter(module: nn.Module, args: Any) -> None:
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        _end_interrupted()
        here.entered.append((module, sys._getframe(1), Recomputation().__enter__()))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling() and here.entered and here.entered[-1][0] is module:
        here.entered.pop()[2].__exit__()


def is_hook_of_recompute(hook: Any) -> bool:
    return hook in (_enter, _leave)


def is_recomputed(model: nn.Module) -> bool:
    """Whether `recompute` has changed this module."""
    return any(map(is_hook_of_recompute, model._forward_pre_hooks.values()))


def _end_interrupted() -> None:
    """Ends what calls left that were interrupted: torch runs no hook after a KeyboardInterrupt."""
    while here.entered and not _is_running(here.entered[-1][1]):
        here.entered.pop()[2].__exit__()


def _is_running(frame: FrameType) -> bool:
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


class Recomputation:
    """A block of `recompute`: knows the outputs of batch norms, and gives those who would keep one a recipe."""

    def __init__(self) -> None:
        #: By the address of the storage.
        self._outputs: dict[int, _Output] = {}
        self._kept: weakref.WeakValueDictionary[int, _Kept] = weakref.WeakValueDictionary()
        self._saved: list[tuple[Tensor, _Value]] | None = None  # by the batch norm that runs
        self._is_open = False

    def __enter__(self) -> Recomputation:
        if not torch.compiler.is_compiling():
            if self._is_open:
                raise RuntimeError("this block of bnext.recompute() is open: another one can be put inside it")
            self._is_open = True
            self._outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
            torch._C._autograd._push_saved_tensors_default_hooks(self._pack, _unpack)
            self._before, here.block = here.block, self
        return self

    def __exit__(self, *error: object) -> None:
        if not torch.compiler.is_compiling():
            here.block = self._before
            _remove_saved_tensors_hooks(self._pack)
            self._outputs.clear()
            self._is_open = False

    def run(self, function: Callable[..., Tensor | None], *args: Any) -> Tensor | None:
        """Runs a batch norm, given as `torch.ops.bnext.batch_norm` takes it, and notes how its output can be computed
        again: by what it kept for its own backward."""
        saved: list[tuple[Tensor, _Value]] = []
        self._saved = saved
        try:
            y = function(*args)
        finally:
            self._saved = None
        if saved and type(y) is Tensor and y.grad_fn is not None:
            input, weight, bias, *_, residual, _, _, _, activation, param = args[:12]
            recipe = self._recipe(saved, input, weight, bias, residual, activation, param)
            if recipe is not None:
                self._note(y, recipe)
        return y

    # ---- what comes to be kept

    def _pack(self, t: Tensor) -> _Reference:
        value, place = self._value_of(t)
        value.expect()
        if self._saved is not None and place is None:
            self._saved.append((t, value))
        return _Reference(value, place)

    def _value_of(self, t: Tensor) -> tuple[_Value, _Place | None]:
        """What `t` is, or what it is a part of, and which part."""
        if not _is_plain(t):
            return _Kept(t, self._outer), None
        found = self._found(t)
        if found is not None:
            whole = found.is_whole(t)
            return found.recipe, None if whole else _Place(t.size(), t.stride(), t.storage_offset() - found.offset)
        kept = self._kept[t.untyped_storage()._cdata] = _Kept(t, self._outer)
        return kept, None

    def _found(self, t: Tensor) -> _Output | None:
        """The output of a batch norm that `t` is, or is a view of, as it was computed."""
        output = self._outputs.get(t.untyped_storage()._cdata)
        return output if output is not None and output.holds(t) else None

    # ---- recipes

    def _recipe(
        self,
        saved: Sequence[tuple[Tensor, _Value]],
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        param: float,
    ) -> _Recipe | None:
        """None where it would have to keep a tensor of that size that nobody keeps, or be too long."""
        others = [t for t in (input, weight, bias, residual) if t is not None]
        x = next((value for t, value in saved if _same(t, input)), None)
        statistics = [
            value for t, value in saved if t.is_floating_point() and not any(_same(t, other) for other in others)
        ]
        if x is None or len(statistics) != 2:
            return None
        operands: list[_Value | None] = [x, *statistics]
        # Copies: FSDP frees parameters after the layer's forward, and gathers them for its backward, which comes later
        # than that of those who take its output.
        operands += [None if t is None else _Kept(t.detach().clone(), None) for t in (weight, bias)]
        if residual is None:
            operands.append(None)
        else:
            output, kept = self._found(residual), self._kept.get(residual.untyped_storage()._cdata)
            if output is not None and output.is_whole(residual):
                operands.append(output.recipe)
            elif kept is not None and kept.holds(residual):
                operands.append(kept)
            else:
                return None
        recipe = _Recipe(operands, activation, param)
        return recipe if recipe.length <= _LONGEST else None

    def _note(self, y: Tensor, recipe: _Recipe) -> None:
        address = y.untyped_storage()._cdata
        outputs = self._outputs

        def forget(reference: weakref.ref[Tensor]) -> None:
            if address in outputs and outputs[address].y is reference:
                del outputs[address]

        outputs[address] = _Output(weakref.ref(y, forget), y, recipe)


def _remove_saved_tensors_hooks(pack: Callable[[Tensor], Any]) -> None:
    """Also from below those that others have set since a call was interrupted."""
    autograd, others = torch._C._autograd, []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        autograd._pop_saved_tensors_default_hooks()
        if top[0] == pack:
            break
        others.append(top)
    for hooks in reversed(others):
        autograd._push_saved_tensors_default_hooks(*hooks)


def _is_plain(t: Tensor) -> bool:
    return type(t) is Tensor and t.layout is torch.strided


def _same(t: Tensor, other: Tensor) -> bool:
    return t.data_ptr() == other.data_ptr() and t.shape == other.shape and t.stride() == other.stride()


class _Output:
    """The output of a batch norm, for as long as it is there, and how to compute it."""

    def __init__(self, reference: weakref.ref[Tensor], y: Tensor, recipe: _Recipe) -> None:
        self.y = reference
        self.version = y._version
        self.offset = y.storage_offset()
        self.recipe = recipe

    def holds(self, t: Tensor) -> bool:
        """Whether `t`, in a storage of this address, is still what the recipe gives: not if somebody changed it in
        place, or gave y another storage, whose old address is somebody else's."""
        y = self.y()
        return (
            y is not None
            and y._version == self.version
            and y.dtype == t.dtype
            and y.untyped_storage()._cdata == t.untyped_storage()._cdata
        )

    def is_whole(self, t: Tensor) -> bool:
        y = self.y()
        return y is not None and _same(t, y)


# ---- what a node of the graph holds in place of a tensor


class _Place(NamedTuple):
    """Where a view is in what it is a view of."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Reference(NamedTuple):
    value: _Value
    place: _Place | None


def _unpack(reference: _Reference) -> Tensor:
    t = reference.value.get()
    return t if reference.place is None else t.as_strided(*reference.place)


class _Value:
    """A tensor that several may ask for. What it takes work to get is there from the first who asks in a backward to
    the last, and no longer than that backward."""

    #: How many normalizations it takes.
    length = 0

    def __init__(self) -> None:
        self._expected = 0  # how many will ask
        self._left = 0  # how many of them have not, in the backward `_task`
        self._task = -1
        self._made: Tensor | None = None

    def expect(self) -> None:
        self._expected += 1

    def get(self) -> Tensor:
        task = torch._C._current_graph_task_id()
        if task == -1:  # somebody looks at the graph
            return self.make()
        if task != self._task:
            self._task, self._left, self._made = task, self._expected, None
        t = self.make() if self._made is None else self._made
        self._left -= 1
        if self._left <= 0:
            self._made = None
        elif self._made is None:
            self._made = t
            Variable._execution_engine.queue_callback(self._drop)  # if not all of them ask
        return t

    def _drop(self) -> None:
        self._made = None

    def make(self) -> Tensor:
        raise NotImplementedError


class _Kept(_Value):
    """A tensor that is kept as it is; by other hooks, if there are any around."""

    def __init__(self, t: Tensor, outer: Any) -> None:
        super().__init__()
        self._outer = outer
        # Other hooks need not keep the storage. A weak reference to it keeps its address from being somebody else's.
        self._address = StorageWeakRef(t.untyped_storage()) if outer is not None and _is_plain(t) else None
        self._form = _form(t)
        self._version = t._version
        self._t = t if outer is None else outer[0](t)

    def holds(self, t: Tensor) -> bool:
        """Whether it is `t`, in a storage of the same address."""
        return self._version == t._version and self._form == _form(t)

    def make(self) -> Tensor:
        if self._outer is not None:
            return self._outer[1](self._t)
        if self._t._version != self._version:  # autograd leaves the check to its hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self._t.type()} {list(self._t.shape)} is at version {self._t._version}; expected version "
                f"{self._version} instead. Hint: torch.autograd.set_detect_anomaly(True) finds the operation."
            )
        return self._t

    def get(self) -> Tensor:
        return self.make() if self._outer is None else super().get()


def _form(t: Tensor) -> tuple[Any, ...]:
    return (t.dtype, t.size()) + ((t.stride(), t.storage_offset()) if t.layout is torch.strided else ())


class _Recipe(_Value):
    """The output of a batch norm: of x, mean, invstd, weight, bias and residual."""

    def __init__(self, operands: Sequence[_Value | None], activation: str, param: float) -> None:
        super().__init__()
        self._operands = operands
        self._how = activation, param
        self.length = 1 + sum(operand.length for operand in operands if operand is not None)

    def expect(self) -> None:
        if self._expected == 0:
            for operand in self._operands:
                if operand is not None:
                    operand.expect()
        super().expect()

    @torch.no_grad()
    def make(self) -> Tensor:
        operands = (None if operand is None else operand.get() for operand in self._operands)
        return torch.ops.bnext.batch_norm_normalize(*operands, *self._how, False)[0]
