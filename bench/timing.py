"""How time is measured: samples, their order, and what a sample is on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

Sampler = Callable[[], float]  # seconds that one call took
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of the samples, and the quartiles around it."""

    median: float
    low: float
    high: float
    samples: int
    after: dict[str, float] = field(default_factory=dict)  # medians of the samples that followed each contender

    @classmethod
    def of(cls, samples: Sequence[float], followed: Sequence[str] = ()) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        by_previous: dict[str, list[float]] = {}
        for previous, sample in zip(followed, samples, strict=False):
            by_previous.setdefault(previous, []).append(sample)
        after = {name: statistics.median(some) for name, some in by_previous.items() if len(some) >= FEWEST}
        return cls(median, low, high, len(samples), after)


FEWEST, MOST = 7, 200  # samples of each contender


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: rows of a Williams square, every other square reversed, so that each contender
    follows each other one equally often."""
    count = len(names)
    square, shift = divmod(number, count)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2, ...
    row = [names[(place + shift) % count] for place in zigzag]
    return row[::-1] if square % 2 else row


def interleave(
    samplers: dict[str, Sampler], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing | Exception]:
    """Samples all contenders in turn, for about `seconds` each.

    They take turns one sample at a time, in the order of `order`: whatever drifts (clocks, temperature,
    other users) hits all alike, and so does what a contender leaves in the caches for the next. One
    that raises drops out.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    followed: dict[str, list[str]] = {name: [] for name in samplers}
    previous = ""
    failed: dict[str, Exception] = {}
    end = clock() + seconds * len(samplers)
    for number in range(MOST):
        if number >= FEWEST and clock() >= end:
            break
        for name in order(list(samplers), number):
            if name not in failed:
                try:
                    samples[name].append(samplers[name]())
                    followed[name].append(previous)
                    previous = name
                except Exception as error:
                    failed[name] = error
    return {name: failed.get(name) or Timing.of(samples[name], followed[name]) for name in samplers}


def wall_sampler(
    call: Call,
    settle: Call = lambda: None,
    shortest: float = 1e-3,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Call | None = None,
) -> Sampler:
    """Wall time of a call, repeated until a sample takes `shortest`. `settle` waits for what calls
    leave running; it is not timed. Nor is what `prepare` does for each call, which is then not repeated."""

    def sample() -> float:
        if prepare is not None:
            prepare()
        start = clock()
        for _ in range(repeat):
            call()
        elapsed = clock() - start
        settle()
        return elapsed / repeat

    repeat = 1
    warm_up(call)
    if prepare is not None:
        return sample
    repeat = max(1, min(1000, math.ceil(shortest / max(sample(), 1e-9))))
    return sample


def warm_up(call: Call) -> None:
    """Calls until everything is compiled and memory is there: until three calls in a row meet no new page.

    That may take a while even where freed memory is kept: malloc cuts a few bytes off a freed block to
    align the next one, and until its cache of such crumbs is full, the block is then too small."""
    quiet = 0
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        quiet = quiet + 1 if resource.getrusage(resource.RUSAGE_SELF).ru_minflt == before else 0
        if quiet == 3:
            break


class Cpu:
    """Wall time, with everything in the caches that the call before left there; `cold`: with nothing of the tensors in
    them, as a backward finds what its forward kept some layers ago."""

    kind = "cpu"
    sets = 1
    COLD = 128 << 20  # bytes, more than the caches hold

    def __init__(self, threads: int, cold: bool = False):
        self.threads, self.cold = threads, cold
        self._others = torch.zeros(self.COLD if cold else 0, dtype=torch.uint8)

    def evict(self) -> None:
        """Fills the caches of all threads with another tensor."""
        self._others.add_(1)

    def scope(self) -> AbstractContextManager:
        torch.set_num_threads(self.threads)
        return nullcontext()

    def sets_for(self, working_set: int) -> int:
        return 1

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        return wall_sampler(calls[0], prepare=self.evict if self.cold else None)

    def host_sampler(self, calls: Sequence[Call]) -> Sampler:
        return wall_sampler(calls[0])

    def copy(self, x: torch.Tensor) -> tuple[float, Sampler]:
        """The bytes that a copy reads and writes, and its sampler: a clone of the very tensor, since how
        fast memory is depends on the cache that a tensor fits in."""
        return 2 * x.nbytes, self.sampler([x.detach().clone])

    def release(self) -> None:
        pass


class Cuda:
    """Events around replays of a CUDA graph that holds several calls.

    Each call has operands of its own, and its results stay allocated until as many others have been
    written: together they are `COLD` times the L2 cache, so that every call finds its tensors in DRAM.
    (`MOST_SETS` bounds that: tensors under a megabyte or so stay in the L2, as they do in a network.)
    Replays are enqueued behind one that is not timed: no time of the host is in a sample.
    """

    kind = "cuda"
    threads = None
    COLD = 4
    MOST_SETS = 256
    FEWEST_CALLS = 32  # in a graph: what a replay costs by itself, about 10 us, is shared by so many
    COPY = 256 << 20

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @cached_property
    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties().L2_cache_size

    def scope(self) -> AbstractContextManager:
        # Autograd runs a backward on the stream of its forward: all of it on the one that captures.
        return torch.cuda.stream(self.stream)

    def sets_for(self, working_set: int) -> int:
        return max(2, min(self.MOST_SETS, math.ceil(self.COLD * self.l2_bytes / max(1, working_set))))

    def sampler(self, calls: Sequence[Call]) -> Sampler:
        rounds = math.ceil(self.FEWEST_CALLS / len(calls))
        alive: deque[object] = deque(maxlen=len(calls))
        for call in calls:
            alive.append(call())  # warm-up, out of the graph
        graph = torch.cuda.CUDAGraph()
        # What Python frees during a capture may be a graph, and ends it. Where a contender has raised, its traceback
        # holds some.
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(rounds):
                    for call in calls:
                        alive.append(call())
        finally:
            if was_enabled:
                gc.enable()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / (rounds * len(calls))

        sample()
        return sample

    def host_sampler(self, calls: Sequence[Call]) -> Sampler:
        return wall_sampler(calls[0], settle=torch.cuda.synchronize)

    @cached_property
    def _copies(self) -> Sampler:
        source = torch.empty(self.COPY, dtype=torch.uint8, device="cuda").random_()  # zeros may copy faster
        target = torch.empty_like(source)
        return self.sampler([lambda: target.copy_(source)])

    def copy(self, x: torch.Tensor) -> tuple[float, Sampler]:
        """The same for all tensors: a copy from device memory to device memory, far larger than the L2."""
        return 2 * self.COPY, self._copies

    def release(self) -> None:
        torch.cuda.empty_cache()


def reuse_heap() -> bool:
    """Makes glibc keep the memory of freed tensors. By default every tensor over 32 MiB is mapped anew,
    and a third of a layer's time, or two, is page faults, whoever computes it. False where there is no
    such setting."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # No mapping for large blocks at all: the threshold that would allow some cannot exceed 32 MiB.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
