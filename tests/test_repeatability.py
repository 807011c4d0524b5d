"""The same bits on every run, for any number of threads, in any company."""

import pytest
import torch
from problems import DTYPES, channels_last, contiguous

import bnext

#: Small and large enough to be split; more channels than threads and fewer.
SHAPES = [
    (300, 6),
    (9, 257),
    (4, 6, 33, 31),
    (2, 64, 28, 28),
    (1, 1, 211, 223),
    (64, 3, 9, 9),
    (3, 1021, 3, 3),
    (7, 2048),
    (70, 37, 5, 5),
]


def run(device, dtypes, layout, shape, **options):
    """All that a training step computes."""
    dtype, parameter_dtype = dtypes
    torch.manual_seed(2)
    x = layout(torch.randn(shape, device=device).to(dtype)).requires_grad_()
    residual = layout(torch.randn(shape, device=device).to(dtype)).requires_grad_()
    kind = bnext.BatchNorm1d if len(shape) == 2 else bnext.BatchNorm2d
    m = kind(shape[1], activation="relu", device=device, dtype=parameter_dtype)
    y = m(x, residual)
    y.backward(torch.randn(shape, device=device).to(dtype))
    return [y, x.grad, residual.grad, *(p.grad for p in m.parameters()), *m.buffers(), m.eval()(x)]


def assert_same_bits(a, b):
    for s, t in zip(a, b, strict=True):
        assert torch.equal(s, t)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_same_bits_on_every_run(device, dtypes, layout):
    for shape in SHAPES:
        first = run(device, dtypes, layout, shape)
        for _ in range(3):
            assert_same_bits(first, run(device, dtypes, layout, shape))


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtypes, layout):
    for shape in SHAPES:
        torch.set_num_threads(1)
        first = run("cpu", dtypes, layout, shape)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert_same_bits(first, run("cpu", dtypes, layout, shape))


def test_streams_do_not_disturb_each_other():
    """Scratch memory and counters belong to a stream."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    x = torch.randn(32, 64, 56, 56, device="cuda")
    expected = bnext.functional.batch_norm(x, None, None, training=True)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            results.append(bnext.functional.batch_norm(x, None, None, training=True))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_cuda_graph_replays_a_training_step():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    x = torch.randn(16, 32, 28, 28, device="cuda", requires_grad=True)
    ours, eager = (bnext.BatchNorm2d(32, momentum=None, activation="relu", device="cuda") for _ in range(2))

    def step(m):
        return torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(ours)
    torch.cuda.synchronize()
    ours.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step(ours)
    for _ in range(3):
        graph.replay()
        expected = step(eager)
    torch.cuda.synchronize()
    assert_same_bits(grads, expected)
    assert_same_bits(ours.buffers(), eager.buffers())
    assert ours.num_batches_tracked.item() == 3
