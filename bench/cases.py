"""One case: a problem (what is normalized) in one phase (which call is timed), the bytes that it
declares, the call itself, and what it should return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bnext import reference

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
EPILOGUES = ("none", "relu", "add_relu")
# What host overhead is measured on: as little to compute as there can be.
TINY = (2, 8, 2, 2)
EPS, MOMENTUM = 1e-5, 0.1


LAYOUTS = ("contiguous", "channels_last")  # the latter stands for channels_last_3d, too


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The memory layouts that torch has for a shape."""
    return LAYOUTS if len(shape) >= 4 else LAYOUTS[:1]


@dataclass(frozen=True)
class Problem:
    """Everything that the result and the speed of a batch norm depend on, but the provider."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"  # one of layouts(shape)
    epilogue: str = "none"  # act(bn(x) + residual): none, relu, add_relu
    parameters: str = "float32"  # dtype of weight, bias and running statistics of 16-bit inputs, or "same"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def parameter_dtype(self) -> torch.dtype:
        if self.itemsize == 2 and self.parameters != "same":
            return DTYPES[self.parameters]
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Phase:
    """What is timed. `call` prepares it, and returns what is run again and again."""

    name: str
    what: str
    tensors: dict[str, float]  # per epilogue, how many tensors like x have to be read or written
    call: Callable[[nn.Module, Operands], Callable[[], tuple[Tensor, ...]]]
    results: tuple[str, ...]  # what the call returns, by the names of Expected
    masks: int = 0  # how many sign masks, of one bit an element, add_relu writes or reads
    training: bool = True
    records: bool = True  # with a graph for the backward
    frozen: bool = False  # weight and bias take no gradient
    host: bool = False  # wall time of calls that have next to nothing to compute


# The one place that says how many bytes a phase has to move, whoever does it: each tensor of the size
# of x once. Vectors of C values are not counted. A residual is one more to read, and its gradient
# one more to write; after add_relu, the signs that the backward needs are one bit an element. After relu
# alone the backward can tell them from x, which it reads anyway, unless it is frozen.
def declared_bytes(problem: Problem, phase: Phase) -> float:
    masks = phase.masks / 8 if problem.epilogue == "add_relu" else 0
    return problem.numel * (phase.tensors[problem.epilogue] * problem.itemsize + masks)


@dataclass
class Operands:
    x: Tensor
    dy: Tensor
    residual: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass
class State:
    """Parameters and buffers, the same for every provider."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def install(self, module: nn.Module, frozen: bool = False) -> None:
        bn = batch_norm_of(module)
        with torch.no_grad():
            for name, value in vars(self).items():
                getattr(bn, name).copy_(value)
        bn.weight.requires_grad_(not frozen)
        bn.bias.requires_grad_(not frozen)


def batch_norm_of(module: nn.Module) -> nn.modules.batchnorm._BatchNorm:
    """The layer inside what a provider built."""
    return next(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def _differentiable(module: nn.Module, operands: Operands) -> list[Tensor]:
    bn = batch_norm_of(module)
    return [t for t in (operands.x, bn.weight, bn.bias, operands.residual) if t is not None and t.requires_grad]


def _forward(module: nn.Module, operands: Operands):
    inputs = operands.inputs
    return lambda: (module(*inputs),)


def _backward(module: nn.Module, operands: Operands):
    y, wanted, dy = module(*operands.inputs), _differentiable(module, operands), operands.dy
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _step(module: nn.Module, operands: Operands):
    inputs, wanted, dy = operands.inputs, _differentiable(module, operands), operands.dy
    return lambda: torch.autograd.grad(module(*inputs), wanted, dy)


_GRADIENTS = ("dx", "dweight", "dbias", "dresidual")

_FORWARD = Phase(
    "forward",
    "training forward, with what the backward needs, and the step of the running statistics",
    {"none": 2, "relu": 2, "add_relu": 3}, _forward, ("y",), masks=1,
)  # fmt: skip
_EVAL = Phase(
    "eval",
    "forward by the running statistics, without a graph",
    {"none": 2, "relu": 2, "add_relu": 3}, _forward, ("y",), training=False, records=False,
)  # fmt: skip


def _and_read(phase: Phase) -> Phase:
    def prepare(module: nn.Module, operands: Operands):
        forward = phase.call(module, operands)

        def call() -> tuple[Tensor, ...]:
            (y,) = forward()
            y.detach().sum()
            return (y,)

        return call

    what = f"{phase.name}, and a sum over y, as the next layer reads it"
    tensors = {epilogue: number + 1 for epilogue, number in phase.tensors.items()}
    return replace(phase, name=f"{phase.name}_read", what=what, tensors=tensors, call=prepare)


PHASES = {
    phase.name: phase
    for phase in (
        _FORWARD,
        _EVAL,
        _and_read(_FORWARD),
        _and_read(_EVAL),
        Phase(
            "backward",
            "gradients of x, weight, bias and residual by autograd, from a forward that is not timed",
            {"none": 3, "relu": 3, "add_relu": 4}, _backward, _GRADIENTS, masks=1,
        ),
        Phase(
            "step",
            "training forward and backward",
            {"none": 5, "relu": 5, "add_relu": 7}, _step, _GRADIENTS, masks=2,
        ),
        Phase(
            "frozen",
            "backward of a layer in eval mode whose weight and bias take no gradient",
            {"none": 2, "relu": 3, "add_relu": 3}, _backward, ("dx", "dresidual"), masks=1,
            training=False, frozen=True,
        ),
        Phase(
            "host",
            f"wall time of a training forward on {'x'.join(map(str, TINY))}, the GPU not waited for",
            dict.fromkeys(EPILOGUES, 0), _forward, ("y",), host=True,
        ),
        Phase(
            "host_eval",
            "the same of the forward by the running statistics",
            dict.fromkeys(EPILOGUES, 0), _forward, ("y",), training=False, records=False, host=True,
        ),
        Phase(
            "host_backward",
            "the same of the backward",
            dict.fromkeys(EPILOGUES, 0), _backward, _GRADIENTS, host=True,
        ),
    )
}  # fmt: skip


def make_state(problem: Problem, device: str) -> State:
    generator = torch.Generator().manual_seed(1)
    channels = problem.shape[1]

    def uniform(low: float, high: float) -> Tensor:
        values = low + (high - low) * torch.rand(channels, generator=generator)
        return values.to(device, problem.parameter_dtype)

    return State(uniform(-1.5, 1.5), uniform(-1, 1), uniform(-1, 1), uniform(0.5, 2))


def make_operands(problem: Problem, device: str, seed: int) -> Operands:
    """Normal values, x with another mean and deviation in each channel."""
    generator = torch.Generator(device).manual_seed(seed)
    channels = (-1, *[1] * (len(problem.shape) - 2))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(len(problem.shape)) if problem.layout == "channels_last" else None

    def normal() -> Tensor:
        values = torch.empty(problem.shape, dtype=DTYPES[problem.dtype], device=device, memory_format=memory_format or
                             torch.contiguous_format)  # fmt: skip
        return values.normal_(generator=generator)

    def by_channel(low: float, high: float) -> Tensor:
        values = torch.empty(problem.shape[1], device=device).uniform_(low, high, generator=generator)
        return values.to(DTYPES[problem.dtype]).reshape(channels)

    x = normal().mul_(by_channel(0.5, 2)).add_(by_channel(-2, 2))
    residual = normal().requires_grad_() if problem.epilogue == "add_relu" else None
    return Operands(x.requires_grad_(), normal(), residual)


# How far off a result may be, relative to its own value plus the root mean square of all, which is
# about 1 for what is like x (never less: it is 0 where gradients cancel, in channels of two values) and
# grows with the number of values for sums. Wide enough for every honest provider, since this asks
# whether the same function is computed; how exactly bnext computes it is for its tests to say.
TOLERANCE = {"float64": 1e-10, "float32": 2**-12, "float16": 2**-8, "bfloat16": 2**-5}


class Expected:
    """What every provider has to return for a problem, in float64."""

    def __init__(self, problem: Problem, state: State, operands: Operands):
        self.problem, self.state, self.operands = problem, state, operands
        self._known: dict[bool, dict[str, Tensor]] = {}
        # Next to zero, where relu's gradient jumps, rounding decides: no gradient arrives there.
        if problem.epilogue != "none":
            for training in (True, False):
                near = self._forward(training, activation=None).y.abs() < 4 * TOLERANCE[problem.dtype]
                operands.dy.masked_fill_(near, 0)

    def results(self, training: bool) -> dict[str, Tensor]:
        """Of the forward and of the backward, in training or by the running statistics."""
        if training not in self._known:
            self._known[training] = self._compute(training)
        return self._known[training]

    def complaint(self, phase: Phase, module: nn.Module, returned: tuple[Tensor, ...]) -> str | None:
        """What is wrong with what one call of the phase returned, and with what it did to the module."""
        actual = dict(zip(phase.results, returned, strict=False))  # without a residual, dresidual is missing
        if phase.training:
            bn = batch_norm_of(module)
            actual |= {"running_mean": bn.running_mean, "running_var": bn.running_var}
        expected = self.results(phase.training)
        for name, tensor in actual.items():
            if tensor.shape != expected[name].shape:
                return f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            scale = expected[name].abs() + expected[name].square().mean().sqrt().clamp(min=1)
            worst = ((tensor.detach() - expected[name]).abs() / scale).nan_to_num(nan=torch.inf).max().item()
            if worst > TOLERANCE[self.problem.dtype]:
                return f"{name} is off by {worst:.2g} of its scale, allowed {TOLERANCE[self.problem.dtype]:.2g}"
        return None

    def _forward(self, training: bool, activation: str | None) -> reference.Forward:
        return reference.forward(
            self.operands.x, **vars(self.state), training=training, momentum=MOMENTUM, eps=EPS,
            activation=activation, residual=self.operands.residual,
        )  # fmt: skip

    def _compute(self, training: bool) -> dict[str, Tensor]:
        activation = None if self.problem.epilogue == "none" else "relu"
        f = self._forward(training, activation)
        b = reference.backward(
            self.operands.dy, self.operands.x, f.mean, f.invstd, self.state.weight, self.state.bias,
            training=training, activation=activation, residual=self.operands.residual,
        )  # fmt: skip
        return {
            "y": f.y, "running_mean": f.running_mean, "running_var": f.running_var,
            "dx": b.dx, "dweight": b.dweight, "dbias": b.dbias, "dresidual": b.dresidual,
        }  # fmt: skip
