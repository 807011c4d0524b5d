"""On a GPU: graphs, streams, threads, memory, failed launches, and every plan on shapes that each has its trouble with.

The same input gives the same bits on every run of the same plan, so that whatever runs beside, or is replayed, is
compared with one quiet run, bit by bit; and quiet runs with float64.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from problems import assert_exact
from test_cuda_plans import kernels

import bnext

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PLANS = ["automatic", "resident", "cooperative", "two_pass"]
FORMATS = [torch.contiguous_format, torch.channels_last]
#: 2 MB of float32: several blocks to a channel, or to a tile of channels, in every plan.
SHAPE = (16, 32, 32, 32)

each_plan = pytest.mark.parametrize("plan", PLANS)
each_format = pytest.mark.parametrize("memory_format", FORMATS, ids=["planar", "interleaved"])


class Step:
    """A forward and a backward of a layer with running statistics, on operands of its own."""

    def __init__(
        self, shape=SHAPE, memory_format=torch.contiguous_format, dtype=torch.float32, fused=True, device="cuda"
    ):
        def make() -> torch.Tensor:
            x = torch.randn(shape, device=device).to(dtype)
            return x.to(memory_format=memory_format) if len(shape) == 4 else x

        kind = {2: bnext.BatchNorm1d, 4: bnext.BatchNorm2d}[len(shape)]
        of_parameters = dtype if dtype == torch.float64 else torch.float32
        # A cumulative average takes a counter more, and shows how often the step was run.
        self.layer = kind(
            shape[1], momentum=None, activation="relu" if fused else None, device=device, dtype=of_parameters
        )
        self.x, self.dy = make().requires_grad_(), make()
        self.residual = make().requires_grad_() if fused else None
        with torch.no_grad():
            self.layer.weight.uniform_(0.5, 1.5)
            self.layer.bias.uniform_(-1, 1)

    def operands(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.residual, self.layer.weight, self.layer.bias) if t is not None]

    def __call__(self) -> list[torch.Tensor]:
        """y and the gradients."""
        y = self.layer(self.x) if self.residual is None else self.layer(self.x, self.residual)
        return [y.detach(), *torch.autograd.grad(y, self.operands(), self.dy)]

    def repeated(self, times: int) -> list[torch.Tensor]:
        """What it gives the last of so many times from the start, and the buffers after; by itself."""
        self.layer.reset_running_stats()
        for _ in range(times):
            results = self()
        torch.cuda.synchronize()
        buffers = [buffer.clone() for buffer in self.layer.buffers()]
        self.layer.reset_running_stats()
        torch.cuda.synchronize()  # the next to run it may be on another stream
        return results + buffers

    def check(self) -> None:
        """Against float64."""
        layer, before = self.layer, [buffer.clone() for buffer in self.layer.buffers()]
        names = ["y", "dx", *(["dresidual"] if self.residual is not None else []), "dweight", "dbias"]
        found = dict(zip(names, self(), strict=True))
        found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
        options = {"residual": self.residual, "activation": layer.activation}
        options["momentum"] = 1 / layer.num_batches_tracked.item()
        assert_exact(found, self.x, layer.weight, layer.bias, *before[:2], dy=self.dy, **options)


def assert_same_bits(actual, expected) -> None:
    assert [torch.equal(a, e) for a, e in zip(actual, expected, strict=True)] == [True] * len(expected)


@contextlib.contextmanager
def forced(plan: str) -> Iterator[None]:
    """The plan; a test of a shape that has no such plan is skipped."""
    try:
        with bnext.cuda.force_plan(plan):
            yield
    except RuntimeError as error:
        if "this shape has no plan" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of the step, and what its replays write to. Nothing is left to be loaded or cached by then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    torch.cuda.synchronize()
    step.layer.reset_running_stats()
    torch.cuda.synchronize()
    return graph, results


# ---- graphs


@each_format
@each_plan
def test_a_captured_step_replays_beside_eager_work(plan, memory_format):
    with forced(plan):
        steps = [Step(memory_format=memory_format) for _ in range(2)]
        expected = [step.repeated(50) for step in steps]
        graph, results = captured(steps[0])
        streams = [torch.cuda.Stream() for _ in range(2)]
        beside = []
        for _ in range(50):
            with torch.cuda.stream(streams[0]):
                graph.replay()
            with torch.cuda.stream(streams[1]):
                beside.append(steps[1]())
        torch.cuda.synchronize()
        assert_same_bits([*results, *steps[0].layer.buffers()], expected[0])
        assert_same_bits([*beside[-1], *steps[1].layer.buffers()], expected[1])
        for other in beside[:-1]:
            assert_same_bits(other, beside[-1])


@each_format
@each_plan
def test_graphs_replayed_at_the_same_time_share_no_counters(plan, memory_format):
    with forced(plan):
        steps = [Step(memory_format=memory_format) for _ in range(3)]
        expected = [step.repeated(100) for step in steps]
        graphs = [captured(step) for step in steps]
        streams = [torch.cuda.Stream() for _ in steps]
        for _ in range(100):
            for (graph, _), stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for step, (_, results), wanted in zip(steps, graphs, expected, strict=True):
            assert_same_bits([*results, *step.layer.buffers()], wanted)


@each_plan
def test_counters_of_a_graph_that_is_gone_serve_the_next(plan):
    """A graph is dropped while its last replays run, and another captured at once."""
    with forced(plan):
        step = Step(memory_format=torch.channels_last)
        expected = step.repeated(1)[: 1 + len(step.operands())]
        for _ in range(20):
            graph, results = captured(step)
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(results, expected)
            graph.replay()
            del graph, results
        torch.cuda.synchronize()


@pytest.mark.parametrize("plan", PLANS[1:])
def test_counters_that_run_out_in_a_capture_are_allocated_there(plan):
    """Each captured call takes at least 64, of the 65536 that are allocated at a time, in the mode that forbids
    allocations to all threads."""
    with forced(plan):
        x = torch.randn(4096, 64, device="cuda")
        expected = bnext.functional.batch_norm(x, None, None, training=True)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            first = bnext.functional.batch_norm(x, None, None, training=True)
            for _ in range(3000):
                last = bnext.functional.batch_norm(x, None, None, training=True)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert_same_bits([first, last], [expected, expected])


@each_format
@each_plan
def test_a_replay_runs_the_kernels_of_an_eager_call_and_no_others(plan, memory_format):
    """No counters are zeroed, and nothing else is filled or copied."""
    with forced(plan):
        step = Step(memory_format=memory_format)
        step()
        eager = kernels(step)
        graph, _ = captured(step)
        assert sorted(kernels(graph.replay)) == sorted(eager)
        assert not any("emset" in name or "fill" in name.lower() for name in eager), eager


# ---- streams, threads, devices


@each_format
@each_plan
def test_streams_at_once(plan, memory_format):
    with forced(plan):
        steps = [Step(memory_format=memory_format) for _ in range(4)]
        expected = [step.repeated(25) for step in steps]
        streams = [torch.cuda.Stream() for _ in steps]
        torch.cuda.synchronize()
        results = []
        for _ in range(25):
            for step, stream in zip(steps, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(step())
        torch.cuda.synchronize()
        for i, (step, wanted) in enumerate(zip(steps, expected, strict=True)):
            assert_same_bits([*results[len(results) - len(steps) + i], *step.layer.buffers()], wanted)
            for other in results[i :: len(steps)]:
                assert_same_bits(other, wanted[: len(other)])


@each_plan
@pytest.mark.parametrize("own_stream", [False, True], ids=["one stream", "a stream each"])
def test_threads_at_once(plan, own_stream):
    with forced(plan):
        steps = [Step(memory_format=torch.channels_last) for _ in range(4)]
        expected = [step.repeated(25) for step in steps]
        results: list[list[torch.Tensor]] = [[] for _ in steps]

        def work(i: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream() if own_stream else None):
                for _ in range(25):
                    results[i] = steps[i]()
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(steps))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for step, last, wanted in zip(steps, results, expected, strict=True):
            assert_same_bits([*last, *step.layer.buffers()], wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several GPUs")
@each_plan
def test_every_gpu_whichever_is_current(plan):
    with forced(plan):
        for device in range(torch.cuda.device_count()):
            Step(device=f"cuda:{device}").check()
            Step(device=f"cuda:{device}", memory_format=torch.channels_last).check()
        assert torch.cuda.current_device() == 0


# ---- memory


def least_allocated() -> int:
    """Of bytes. The thread of autograd's that ran a backward lets go of its results some time after the caller has them."""
    found = []
    for _ in range(10):
        found.append(torch.cuda.memory_allocated())
        time.sleep(0.01)
    return min(found)


@each_format
@each_plan
def test_the_steady_state_allocates_outputs_alone(plan, memory_format):
    """y, mean, invstd and the mask; dx, dresidual, dweight, dbias and the sums; and what blocks exchange through."""
    gc.collect()  # what tests before have left would be freed meanwhile
    with forced(plan):
        step = Step(memory_format=memory_format)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        before, bytes_before = torch.cuda.memory_stats(), least_allocated()
        for _ in range(20):
            step()
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
        for unchanged in ("segment.all.allocated", "reserved_bytes.all.current", "num_alloc_retries"):
            assert after[unchanged] == before[unchanged], unchanged
        assert least_allocated() == bytes_before
        assert (after["allocation.all.allocated"] - before["allocation.all.allocated"]) / 20 <= 9 + 2


# ---- failed launches


class Runtime:
    """The CUDA runtime that this process has loaded, for calls that torch does not make."""

    def __init__(self):
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libcudart" in line}
        self.library = ctypes.CDLL(min(paths))

    def __getattr__(self, name):
        return getattr(self.library, name)


def test_the_next_kernel_runs_after_a_launch_that_failed():
    """In a stream whose capture has become invalid every launch fails."""
    runtime, stream = Runtime(), torch.cuda.Stream()
    handle = ctypes.c_void_p(stream.cuda_stream)
    x = torch.randn(8, 64, 32, 32, device="cuda")  # by clusters, or blocks on their own: without counters
    stream.wait_stream(torch.cuda.current_stream())
    with forced("resident"), torch.cuda.stream(stream):
        expected = bnext.functional.batch_norm(x, None, None, training=True)
        again = bnext.functional.batch_norm(x, None, None, training=True)
        stream.synchronize()
        del again  # its memory serves the call that fails
        relaxed = 2
        assert runtime.cudaStreamBeginCapture(handle, relaxed) == 0
        assert runtime.cudaStreamSynchronize(handle) != 0, "which is not allowed, and makes it invalid"
        runtime.cudaGetLastError()
        try:
            with pytest.raises(RuntimeError, match="bnext::batch_norm_forward: cudaErrorStreamCapture"):
                bnext.functional.batch_norm(x, None, None, training=True)
            assert runtime.cudaPeekAtLastError() == 0
        finally:
            graph = ctypes.c_void_p()
            runtime.cudaStreamEndCapture(handle, ctypes.byref(graph))
            runtime.cudaGetLastError()
        assert torch.ones(8, device="cuda").sum().item() == 8
        assert torch.equal(bnext.functional.batch_norm(x, None, None, training=True), expected)


def test_a_refused_plan_changes_nothing():
    step = Step((8, 64, 28, 28), fused=False)
    before = [buffer.clone() for buffer in step.layer.buffers()]
    with bnext.cuda.force_plan("resident:tile_vecs=4"), pytest.raises(RuntimeError, match="the one detail is cluster"):
        step()
    assert_same_bits(step.layer.buffers(), before)
    step.check()


# ---- shapes and plans


@pytest.mark.parametrize("plan", ["automatic", "resident"])
@pytest.mark.parametrize(
    "shape, memory_format",
    [
        ((256, 128), None),
        ((300, 64), None),
        ((4, 32, 7, 7), torch.contiguous_format),
        ((4, 16, 9, 9), torch.contiguous_format),
        ((4, 64, 14, 14), torch.contiguous_format),
        ((32, 64, 8, 8), torch.channels_last),
    ],
    ids=str,
)
def test_float64_where_static_and_kept_memory_add_up_to_more_than_48_kb(shape, memory_format, plan):
    """A residual and relu in float64 take 36 KB of static shared memory; 12 to 28 KB are kept beside it."""
    with forced(plan):
        Step(shape, memory_format, torch.float64).check()


FORCED = [
    "cooperative",
    "two_pass",
    *(f"resident:cluster={cluster}" for cluster in (1, 2, 4, 8, 16)),
    "resident:tile_vecs=1",
    "resident:tile_vecs=2",
    "resident:tile_vecs=8",
    "resident:groups=1",
    "resident:groups=1,tile_vecs=2",
    "resident:groups=2,splits=3",
]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "add_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", FORCED)
def test_every_plan_on_a_small_grid_of_shapes(plan, dtype, fused):
    ran = 0
    for shape in [(16, 8), (700, 64), (2, 64, 4, 4), (4, 16, 7, 7), (8, 32, 14, 14), (3, 128, 28, 28), (2, 24, 31, 33)]:
        for memory_format in FORMATS if len(shape) == 4 else FORMATS[:1]:
            with contextlib.suppress(pytest.skip.Exception), forced(plan):
                Step(shape, memory_format, dtype, fused).check()
                ran += 1
    clusters = plan.partition("cluster=")[2]
    if clusters in ("", "1") or (torch.cuda.get_device_capability() >= (9, 0) and clusters != "16"):
        assert ran > 0, f"{plan} fitted no shape"


def test_what_describe_plan_says_is_what_runs():
    for shape in (SHAPE, (4, 32, 7, 7), (64, 3, 40, 40), (256, 4, 64, 64)):
        for memory_format in FORMATS:
            step = Step(shape, memory_format, fused=False)
            said = bnext.cuda.describe_plan(shape, torch.float32, memory_format=memory_format)
            step()
            names = kernels(lambda step=step: step.layer(step.x))
            assert len(names) == int(said.split(": ")[1][0]), (said, names)
            kind = said.split(":")[0]
            assert kind == "two_pass" or f"::{kind}_" in names[0], (said, names)
