"""Checks and times every provider on one problem: a row for each phase and provider, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from bench.cases import Expected, Phase, Problem, declared_bytes, make_operands, make_state
from bench.providers import Provider
from bench.timing import Cpu, Cuda, Sampler, Timing, interleave


class WrongNumbers(Exception):
    """A provider's result is not that of float64."""

    PREFIX = "wrong numbers: "


@dataclass
class Row:
    """One measured cell; README.md explains each field. Times are None where `error` says why."""

    suite: str
    batch: int | None
    shape: tuple[int, ...]
    count: int
    dtype: str
    layout: str
    epilogue: str
    parameters: str
    phase: str
    threads: int | None
    provider: str
    error: str | None = None
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    bytes: float = 0
    gbs: float | None = None
    copy_gbs: float | None = None
    copy_percent: float | None = None
    floor_ms: float | None = None
    ratio: float | None = None
    after_ms: dict[str, float] = field(default_factory=dict)
    runs_ms: list[float] = field(default_factory=list)
    speedup: dict[str, float] = field(default_factory=dict)

    @classmethod
    def blank(
        cls,
        problem: Problem,
        phase: Phase,
        threads: int | None,
        suite: str,
        batch: int | None,
        count: int,
        provider: str,
    ) -> Row:
        p = problem
        about = (
            suite,
            batch,
            p.shape,
            count,
            p.dtype,
            p.layout,
            p.epilogue,
            p.parameters,
            phase.name,
            threads,
            provider,
        )
        return cls(*about, bytes=declared_bytes(problem, phase))

    @classmethod
    def from_json(cls, values: dict) -> Row:
        return cls(**values | {"shape": tuple(values["shape"])})

    @property
    def is_wrong(self) -> bool:
        return self.error is not None and self.error.startswith(WrongNumbers.PREFIX)


def measure(
    problem: Problem,
    phases: Sequence[Phase],
    providers: Sequence[Provider],
    device: Cpu | Cuda,
    seconds: float,
    suite: str = "",
    batch: int | None = None,
    count: int = 1,
) -> Iterator[Row]:
    """The rows of one phase after the other. `seconds` is how long each provider is sampled in each."""
    bench = None
    with device.scope():
        for phase in phases:
            about = (problem, phase, device.threads, suite, batch, count)
            rows = [Row.blank(*about, provider.name) for provider in providers]
            try:
                bench = bench or _Bench(problem, providers, device)
                bench.fill(rows, phase, seconds)
            except Exception as error:  # of no provider: typically, the tensors alone fill the memory
                for row in rows:
                    row.error = explain(error)
            yield from rows
        del bench
        device.release()


class _Bench:
    """The operands and modules of a problem, for all of its phases."""

    def __init__(self, problem: Problem, providers: Sequence[Provider], device: Cpu | Cuda):
        self.device, self.providers = device, providers
        working_set = 2 * problem.numel * problem.itemsize  # the least that a call touches: x and y
        self.state = make_state(problem, device.kind)
        self.sets = [make_operands(problem, device.kind, seed) for seed in range(device.sets_for(working_set))]
        self.expected = Expected(problem, self.state, self.sets[0])
        self.modules: dict[str, nn.Module | Exception] = {}
        for provider in providers:
            try:
                with provider.scope():
                    self.modules[provider.name] = provider.build(problem, device.kind)
            except Exception as error:
                self.modules[provider.name] = error

    def fill(self, rows: list[Row], phase: Phase, seconds: float) -> None:
        copied_bytes, copy = self.device.copy(self.sets[0].x)
        samplers: dict[str, Sampler] = {"copy": copy}
        outcomes: dict[str, Timing | Exception] = {}
        for provider in self.providers:
            try:
                samplers[provider.name] = self._sampler(provider, phase)
            except Exception as error:
                outcomes[provider.name] = error
        outcomes |= interleave(samplers, seconds)
        _fill(rows, outcomes, copied_bytes)

    def _sampler(self, provider: Provider, phase: Phase) -> Sampler:
        module = self.modules[provider.name]
        if isinstance(module, Exception):
            raise module
        with provider.scope(), torch.set_grad_enabled(phase.records):
            module.train(phase.training)
            self.state.install(module, phase.frozen)
            calls = [phase.call(module, self.sets[0])]
            complaint = self.expected.complaint(phase, module, calls[0]())
            if complaint:
                raise WrongNumbers(complaint)
            if phase.host:
                sampler = self.device.host_sampler(calls)
            else:
                calls += [phase.call(module, operands) for operands in self.sets[1:]]
                sampler = self.device.sampler(calls)

        def sample() -> float:
            with provider.scope(), torch.set_grad_enabled(phase.records):
                return sampler()

        return sample


def _fill(rows: list[Row], outcomes: dict[str, Timing | Exception], copied_bytes: int) -> None:
    copy = outcomes["copy"]
    for row in rows:
        time = outcomes[row.provider]
        if isinstance(time, Exception):
            row.error = explain(time)
            continue
        row.ms, row.low_ms, row.high_ms = (1e3 * t for t in (time.median, time.low, time.high))
        row.samples = time.samples
        row.after_ms = {name: 1e3 * median for name, median in time.after.items()}
        if row.bytes and isinstance(copy, Timing):
            row.copy_gbs = copied_bytes / copy.median * 1e-9
    derive(rows)


def derive(rows: Sequence[Row]) -> None:
    """What follows from the times of one case's rows and the copy's rate."""
    times = {row.provider: row.ms for row in rows if row.ms}
    for row in rows:
        if not row.ms:
            continue
        row.speedup = {name: ms / row.ms for name, ms in times.items() if name != row.provider}
        if row.copy_gbs:
            row.gbs = row.bytes / row.ms * 1e-6
            row.copy_percent = 100 * row.gbs / row.copy_gbs
            row.floor_ms = row.bytes / row.copy_gbs * 1e-6
            row.ratio = row.ms / row.floor_ms


def explain(error: Exception) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else ""
    prefix = WrongNumbers.PREFIX if isinstance(error, WrongNumbers) else f"{type(error).__name__}: "
    return (prefix + message)[:240]
