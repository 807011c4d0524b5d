"""bnext.enable(): torch's own operators and layers on these kernels. kernels_run() proves that they ran; torch in
float64 is the exact answer; torch without them says what else an operator returns, and what it raises."""

import contextlib
import copy
import functools
import itertools
import subprocess
import sys
import threading

import pytest
import torch
from problems import (
    DTYPES,
    LAYOUTS,
    Tolerance,
    assert_within,
    channels_last,
    contiguous,
    eps_of,
    expanded,
    in_float64,
    statistics,
)
from torch import nn
from torch.nn import functional as F

import bnext

aten = torch.ops.aten
SHAPES = [(33, 7), (3, 5, 4), (2, 3, 7, 7), (3, 16, 4, 4), (6, 1, 5, 5), (2, 4, 3, 2, 5)]
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def _off_before_and_after():
    assert not bnext.is_enabled()
    yield
    left_on = bnext.is_enabled()
    bnext.disable()
    assert not left_on and not bnext.is_enabled()


@contextlib.contextmanager
def runs(count):
    """What is inside is handed to the kernels in `count` calls."""
    before = bnext.kernels_run()
    yield
    assert bnext.kernels_run() - before == count


def layer(shape, dtype, parameter_dtype, device, **options):
    m = LAYERS[len(shape)](shape[1], **options).to(device, parameter_dtype)
    for p in m.parameters():
        nn.init.normal_(p, 0.5)
    if m.running_mean is not None:
        nn.init.normal_(m.running_mean)
        nn.init.uniform_(m.running_var, 0.5, 2)
    return m


def check_step(m, x, enabled_forward=True, enabled_backward=True):
    """One step of `m` forward and back, each enabled or not, against the same in float64."""
    exact = copy.deepcopy(m).cpu().double()
    before = copy.deepcopy(dict(m.named_buffers()))
    batch = m.training or m.running_mean is None
    running = [] if batch else [in_float64(m.running_mean), (in_float64(m.running_var) + m.eps).rsqrt()]
    mean, invstd = running or statistics(x)
    parameter_dtype = next((t.dtype for t in m.state_dict().values()), x.dtype)
    tolerance = Tolerance(x, mean, invstd, m.weight, parameter_dtype)

    x, x64 = x.detach().requires_grad_(), in_float64(x).requires_grad_()
    with bnext.enable() if enabled_forward else contextlib.nullcontext(), runs(int(enabled_forward)):
        y = m(x)
    y64 = exact(x64)
    biases = [] if m.bias is None else [m.bias.view(-1, *[1] * (x.dim() - 2))]
    assert y.dtype == x.dtype
    if enabled_forward:
        assert_within(y, y64, tolerance.y(y64, *biases), "y")
        if batch and m.running_mean is not None:
            n = x.numel() // x.shape[1]
            wanted, old = exact.running_mean, before["running_mean"]
            assert_within(m.running_mean, wanted, tolerance.running_mean(wanted, old), "running_mean")
            wanted, old, of_batch = exact.running_var, before["running_var"], (invstd**-2 - m.eps) * n / (n - 1)
            assert_within(m.running_var, wanted, tolerance.running_var(wanted, old, of_batch), "running_var")
        for name, old in before.items():
            assert batch or torch.equal(getattr(m, name), old), name

    dy = torch.randn_like(y)
    inputs = [x, *m.parameters()]
    with bnext.enable() if enabled_backward else contextlib.nullcontext(), runs(int(enabled_backward)):
        gradients = dict(zip(["x", *dict(m.named_parameters())], torch.autograd.grad(y, inputs, dy), strict=True))
    exact_gradients = torch.autograd.grad(y64, [x64, *exact.parameters()], in_float64(dy))
    if batch and parameter_dtype != torch.float32 and x.dtype.itemsize == 2 and not x.is_cuda:
        tolerance.u = 2 * eps_of(x.dtype)  # torch's operators save mean and invstd in the parameters' dtype there
    for (name, got), wanted in zip(gradients.items(), exact_gradients, strict=True):
        allowed = {"x": tolerance.dx, "weight": tolerance.dweight, "bias": tolerance.dbias}[name](wanted, dy)
        assert got.dtype == (x.dtype if name == "x" else parameter_dtype)
        if enabled_backward:
            assert_within(got, wanted, allowed, f"gradient of {name}")
        else:  # torch's own kernels round more often, or cancel
            u = eps_of(x.dtype if x.is_cuda else got.dtype)  # on CUDA it rounds to the input's type in between
            torch.testing.assert_close(in_float64(got), wanted, rtol=64 * u, atol=256 * u)


# ---- results


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", [*LAYOUTS, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
def test_layers_run_here_and_are_exact(dtype, parameter_dtype, layout, training, device):
    for shape in SHAPES:
        x = layout(torch.randn(shape, dtype=torch.float64).add(0.5).to(device, dtype))
        check_step(layer(shape, dtype, parameter_dtype, device).train(training), x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 1.0}, {"eps": 0.1}]
    + [{"affine": False, "track_running_stats": False}],
    ids=str,
)
def test_options_of_the_layers(options, training, device):
    for dtype, parameter_dtype in DTYPES:
        m = layer((5, 3, 4, 4), dtype, parameter_dtype, device, **options).train(training)
        for _ in range(2):
            check_step(m, channels_last(torch.randn(5, 3, 4, 4, device=device).to(dtype)))
        if m.num_batches_tracked is not None:
            assert m.num_batches_tracked == 2 * training


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_one_parameter_alone(missing, device):
    """Of a bias without a weight, torch decides on the gradient."""
    if missing == "weight" and device == "cuda":
        pytest.skip("torch's own backward on CUDA needs a weight")
    m = layer((5, 3, 4), torch.float32, torch.float32, device)
    m.register_parameter(missing, None)
    x = torch.randn(5, 3, 4, device=device, requires_grad=True)
    exact, x64 = copy.deepcopy(m).double(), x.detach().double().requires_grad_()
    with bnext.enable(), runs(1 if missing == "weight" else 2):
        m(x).square().sum().backward()
    exact(x64).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for p, q in zip(m.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_frozen_parameters_and_inputs(training, device):
    """Each combination of what needs a gradient."""
    for needs in itertools.product([True, False], repeat=3):
        if not any(needs):
            continue
        m = layer((4, 3, 5), torch.float64, torch.float64, device).train(training)
        x = torch.randn(4, 3, 5, device=device, dtype=torch.float64)
        tensors = [t.requires_grad_(n) for t, n in zip([x, m.weight, m.bias], needs, strict=True)]
        wanted_of = [t for t in tensors if t.requires_grad]
        expected = torch.autograd.grad(copy.deepcopy(m)(x).square().sum(), [x], allow_unused=True) if needs[0] else []
        with bnext.enable(), runs(2):
            gradients = torch.autograd.grad(m(x).square().sum(), wanted_of)
        assert all(g is not None for g in gradients)
        if needs[0]:
            torch.testing.assert_close(gradients[0], expected[0])


@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("enabled_forward", [True, False], ids=["forward here", "backward here"])
def test_the_flag_may_change_between_forward_and_backward(dtype, parameter_dtype, training, enabled_forward, device):
    for layout in (contiguous, channels_last):
        x = layout(torch.randn(4, 3, 5, 6, dtype=torch.float64).add(0.5).to(device, dtype))
        m = layer(x.shape, dtype, parameter_dtype, device).train(training)
        check_step(m, x, enabled_forward=enabled_forward, enabled_backward=not enabled_forward)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_order(training, device):
    """By torch's own formula, from what was saved here."""
    mean, var, w, b = torch.randn(4, 3, device=device, dtype=torch.float64).unbind()
    x = torch.randn(4, 3, 2, 2, device=device, dtype=torch.float64, requires_grad=True)
    inputs = (x, w.requires_grad_(), b.requires_grad_())

    def f(x, w, b):
        return F.batch_norm(x, mean.clone(), var.abs(), w, b, training)

    before = bnext.kernels_run()
    with bnext.enable():
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)
    assert bnext.kernels_run() > before + 50


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_a_large_mean_does_not_cost_digits(layout, device):
    x = layout(torch.randn(8, 16, 28, 28, device=device) + 1e4)
    exact = torch.var(x.double(), (0, 2, 3))

    def worst():
        m = nn.BatchNorm2d(16, momentum=1.0, device=device)
        y = m(x)
        off = (m.running_var.double() / exact - 1).abs().max()
        mean, invstd = (t.to(device) for t in statistics(x))
        return off, (y.double() - (x.double() - mean) * invstd).abs().max()

    torchs = worst()
    with bnext.enable(), runs(1):
        ours = worst()
    assert ours[0] < 8 * eps_of(torch.float32) and ours[1] < 2e-3  # of the mean, 10^4 * eps is 1.2e-3 already
    if device == "cpu" and layout is channels_last:
        assert torchs[0] > 10 * ours[0]


# ---- what an operator returns, beside y


def described(t):
    return None if t is None else (t.shape, t.dtype, t.stride() if t.numel() else None, t.is_inference(), t._version)


def forwards(x, w, b, mean, var, training):
    yield "native_batch_norm", lambda: aten.native_batch_norm(x, w, b, mean, var, training, 0.1, 1e-5)
    if mean is None:
        yield "no_stats", lambda: aten._native_batch_norm_legit.no_stats(x, w, b, training, 0.1, 1e-5)
        return
    yield "legit", lambda: aten._native_batch_norm_legit(x, w, b, mean, var, training, 0.1, 1e-5)
    if x.is_cuda and x.dtype == torch.float16 and x.data_ptr() % 16:
        return  # one of the others ended all work on an H100 by a misaligned access, most likely in cuDNN, which they call
    if training:
        yield "with_update", lambda: aten._batch_norm_with_update(x, w, b, mean, var, 0.1, 1e-5)
        yield "functional", lambda: aten._batch_norm_with_update_functional(x, w, b, mean, var, 0.1, 1e-5)
    else:
        yield "no_training", lambda: aten._native_batch_norm_legit_no_training(x, w, b, mean, var, 0.1, 1e-5)
        if x.device.type == "cpu":
            yield "no_update", lambda: aten._batch_norm_no_update(x, w, b, mean, var, 0.1, 1e-5)
    cudnn = x.is_cuda and torch.backends.cudnn.is_available() and w is not None and x.is_contiguous()
    if cudnn and (x.dtype.itemsize > 2 or (x.dtype, w.dtype) == (torch.float16, torch.float32)):
        yield "cudnn", lambda: aten.cudnn_batch_norm(x, w, b, mean, var, training, 0.1, 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
def test_operators_return_what_torchs_do(dtype, parameter_dtype, training, device):
    options = {"device": device, "dtype": parameter_dtype}
    for shape, layout in itertools.product([(4, 3), (4, 3, 5, 6), (2, 3, 2, 2, 2)], [*LAYOUTS, expanded]):
        x = layout(torch.randn(shape).to(device, dtype))
        w, b = torch.randn(2, 3, **options)
        for affine, has_running in itertools.product([True, False], [True, False]):
            if not (training or has_running):
                continue
            running = (torch.zeros(3, **options), torch.ones(3, **options)) if has_running else (None, None)
            parameters = (w, b) if affine else (None, None)
            for name, call in forwards(x, *parameters, *running, training):
                try:
                    theirs = call()
                except RuntimeError as error:  # of cuDNN, which only some of them make a tensor contiguous for
                    assert device == "cuda" and "is_contiguous" in str(error)
                    continue
                with bnext.enable(), runs(1):
                    ours = call()
                cudnns = 3 if name in ("cudnn", "with_update", "functional") and device == "cuda" else None
                found, expected = [[described(t) for t in r] for r in (ours, theirs)]
                if cudnns:  # its bytes are its own
                    del found[3], expected[3]
                assert found == expected, (name, layout.__name__)
                assert running[0] is None or running[0]._version == running[1]._version == 0

                if len(theirs) != 3:
                    continue
                for mask in itertools.product([True, False], repeat=3):
                    if not affine and (mask[1] or mask[2]):
                        continue
                    dy = torch.randn_like(x)
                    arguments = (dy, x, parameters[0], *running)
                    backward = functools.partial(aten.native_batch_norm_backward, *arguments)
                    expected = backward(theirs[1], theirs[2], training, 1e-5, mask)
                    with bnext.enable(), runs(int(any(mask))):
                        found = backward(ours[1], ours[2], training, 1e-5, mask)
                    if device == "cuda":  # torch returns more than is asked for, in strides that depend on a library
                        found, expected = [
                            [(t.shape, t.dtype) for t, asked in zip(r, mask, strict=True) if asked]
                            for r in (found, expected)
                        ]
                        assert found == expected
                    else:
                        assert [described(t) for t in found] == [described(t) for t in expected]


@pytest.mark.parametrize("update", [True, False])
def test_the_consolidated_operators(update, device):
    if not update and device == "cuda":
        pytest.skip("torch's own _batch_norm_no_update is made of CPU code")
    w, b, mean, var = torch.rand(4, 3, device=device).unbind()
    x, dy = torch.randn(2, 4, 3, 5, device=device).unbind()
    w.requires_grad_(), b.requires_grad_(), x.requires_grad_()
    op = aten._batch_norm_with_update if update else aten._batch_norm_no_update

    def gradients(of):
        y, *_ = op(x, w, b, mean.clone(), var.clone(), 0.1, 1e-5)
        with of:
            return torch.autograd.grad(y, [x, w, b], dy)

    expected = gradients(contextlib.nullcontext())
    with bnext.enable(), runs(2):
        ours = gradients(contextlib.nullcontext())
    torch.testing.assert_close(ours, expected)
    for before, after in ((bnext.enable, contextlib.nullcontext), (contextlib.nullcontext, bnext.enable)):
        with contextlib.ExitStack() as stack, runs(1):
            stack.enter_context(before())
            y, *_ = op(x, w, b, mean.clone(), var.clone(), 0.1, 1e-5)
            stack.close()
            stack.enter_context(after())
            torch.testing.assert_close(torch.autograd.grad(y, [x, w, b], dy), expected)


# ---- what goes to torch


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def ones(*shape, **options):
    return torch.ones(*shape, **options)


#: (input, running_mean, running_var, weight, bias), and what else F.batch_norm takes.
REFUSED = {
    "one dimension": lambda: F.batch_norm(ones(3), ones(3), ones(3)),
    "no dimension": lambda: F.batch_norm(ones(()), ones(3), ones(3)),
    "complex": lambda: F.batch_norm(ones(4, 3, dtype=torch.complex64), None, None, training=True),
    "integers": lambda: F.batch_norm(ones(4, 3, dtype=torch.int32), None, None, training=True),
    "float8": lambda: F.batch_norm(ones(4, 3).to(torch.float8_e4m3fn), None, None, training=True),
    "one value a channel": lambda: F.batch_norm(ones(1, 3), None, None, training=True),
    "eps 0": lambda: F.batch_norm(ones(4, 3), None, None, training=True, eps=0.0),
    "negative eps": lambda: F.batch_norm(ones(4, 3), ones(3), ones(3), eps=-1.0),
    "a short weight": lambda: F.batch_norm(ones(4, 3), None, None, ones(2), training=True),
    "a long running mean": lambda: F.batch_norm(ones(4, 3), ones(4), ones(3)),
    "a weight in float64": lambda: F.batch_norm(ones(4, 3), None, None, ones(3).double(), training=True),
    "a weight in 16 bits": lambda: F.batch_norm(ones(4, 3), None, None, ones(3).half(), training=True),
    "three dtypes": lambda: F.batch_norm(ones(4, 3).bfloat16(), ones(3), ones(3), ones(3).bfloat16(), training=True),
    "two 16-bit dtypes": lambda: F.batch_norm(ones(4, 3).bfloat16(), None, None, ones(3).half(), training=True),
    "one running statistic": lambda: F.batch_norm(ones(4, 3), ones(3), None, training=True),
    "no running statistics": lambda: F.batch_norm(ones(4, 3), None, None),
    "another device": lambda: F.batch_norm(ones(4, 3), None, None, ones(3, device="meta"), training=True),
    "sparse": lambda: F.batch_norm(ones(4, 3).to_sparse(), None, None, training=True),
    "a running mean with a gradient": lambda: F.batch_norm(
        ones(4, 3, requires_grad=True), ones(3, requires_grad=True), ones(3), training=True
    ),
    "a module's own check": lambda: nn.BatchNorm2d(3)(ones(4, 3)),
    "no values, of the operator": lambda: aten.native_batch_norm(ones(0, 3), None, None, None, None, True, 0.1, 1e-5),
    "saved in another dtype": lambda: aten.native_batch_norm_backward(
        *ones(2, 4, 3).bfloat16().unbind(), ones(3).bfloat16(), None, None, ones(3), ones(3), True, 1e-5, [True] * 3
    ),
    "a gradient of another shape": lambda: (
        F.batch_norm(ones(4, 3, requires_grad=True), None, None, training=True).sum(0).backward(ones(4, 3))
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_torchs(case):
    expected = outcome(REFUSED[case])
    assert issubclass(expected[0], Exception)
    bnext.enable()
    assert outcome(REFUSED[case]) == expected
    bnext.disable()


def direct(x, w=None, mean=None, var=None, training=True, eps=1e-5):
    """A call that changes copies, and returns them too."""
    copies = [t.clone() if t is not None and t.is_contiguous() else t for t in (mean, var)]
    return [*aten.native_batch_norm(x, w, None, *copies, training, 0.1, eps), *copies]


TORCHS = {
    "one value a channel": lambda x: direct(x[:1], mean=ones(3), var=ones(3)),
    "eps 0": lambda x: direct(x, eps=0.0),
    "negative eps": lambda x: direct(x, mean=ones(3), var=ones(3), training=False, eps=-0.5),
    "a weight that is no vector": lambda x: direct(x, w=ones(3, 1)),
    "expanded statistics": lambda x: direct(x, mean=ones(1).expand(3), var=ones(1).expand(3)),
    "a gradient with more rows": lambda x: list(
        aten.native_batch_norm_backward(
            torch.cat([x, x]), x, None, None, None, x[0], x[1].abs(), True, 1e-5, [True, False, False]
        )[:1]
    ),
    "no values": lambda x: F.batch_norm(x[:0], ones(3), ones(3), training=True),
}


@pytest.mark.parametrize("case", TORCHS)
def test_torch_runs_what_the_kernels_do_not_take(case):
    x = torch.randn(4, 3)
    expected = outcome(lambda: TORCHS[case](x))
    with bnext.enable(), runs(0):
        torch.testing.assert_close(outcome(lambda: TORCHS[case](x)), expected, rtol=0, atol=0, equal_nan=True)


def test_no_batch(device):
    m, x = nn.BatchNorm2d(3, device=device), torch.randn(0, 3, 2, 2, device=device, requires_grad=True)
    with bnext.enable(), runs(0):
        m(x).sum().backward()
    assert x.grad.shape == x.shape and m.num_batches_tracked == 1 and m.running_mean.count_nonzero() == 0


def test_mkldnn_tensors_stay_with_torch():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs mkldnn")
    from torch.utils.mkldnn import to_mkldnn

    m, x = to_mkldnn(nn.BatchNorm2d(3).eval()), torch.randn(4, 3, 5, 5).to_mkldnn()
    with bnext.enable(), runs(0):
        torch.testing.assert_close(m(x).to_dense(), x.to_dense(), rtol=1e-4, atol=1e-4)


def test_strided_running_statistics_are_written(device):
    mean, var = torch.ones(2, 6, device=device)[:, ::2].unbind()
    x = torch.randn(4, 3, 5, device=device)
    expected = [t.clone() for t in (mean, var)]
    F.batch_norm(x.double(), *(expected := [t.double() for t in expected]), training=True)
    with bnext.enable(), runs(1):
        F.batch_norm(x, mean, var, training=True)
    torch.testing.assert_close([mean.double(), var.double()], expected, rtol=1e-5, atol=1e-6)


# ---- modes and transforms


def test_inference_mode(device):
    x = torch.randn(4, 3, 5, 5, device=device)
    for training in (True, False):
        m = nn.BatchNorm2d(3, device=device).train(training)
        expected, version = copy.deepcopy(m)(x), m.running_mean._version
        with bnext.enable(), torch.inference_mode(), runs(1):
            y = m(x)
            torch.testing.assert_close(y, expected.detach())
        assert y.is_inference() and m.running_mean._version == version
    with torch.inference_mode():
        m = nn.BatchNorm2d(3, device=device)
    m.requires_grad_(False)
    with bnext.enable():
        with runs(0), contextlib.suppress(RuntimeError):  # of its counter, which torch.nn cannot count up
            m(x)
        with runs(0):  # torch updates buffers of inference mode that it was given outside
            F.batch_norm(x, m.running_mean, m.running_var, training=True)
        with runs(1), torch.inference_mode():
            m(x)


def test_no_grad_and_requires_grad(device):
    m, x = nn.BatchNorm1d(3, device=device), torch.randn(4, 3, device=device, requires_grad=True)
    with bnext.enable(), torch.no_grad(), runs(1):
        assert not m(x).requires_grad
    with bnext.enable(), runs(1):
        assert m(x).grad_fn.name().endswith("BatchNormBackward0")  # torch's own node, not one of bnext


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)]
    m = nn.Sequential(*layers).to(device)
    twin, x = copy.deepcopy(m), torch.randn(4, 3, 9, 9, device=device)
    with torch.autocast(device, dtype=dtype):
        expected = twin(x)
        with bnext.enable(), runs(2):
            y = m(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)
    torch.testing.assert_close(dict(m.named_buffers()), dict(twin.named_buffers()), rtol=0.02, atol=0.02)
    with bnext.enable(), runs(2):
        y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in m.parameters())


def test_instance_norm_is_made_of_the_same_operators(device):
    m = nn.InstanceNorm2d(3, affine=True, track_running_stats=True, device=device)
    x = torch.randn(4, 3, 5, 5, device=device)
    exact = copy.deepcopy(m).double()
    with bnext.enable(), runs(1):
        y = m(x)
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.running_var.double(), exact.running_var, rtol=1e-5, atol=1e-5)


def test_function_transforms(device):
    m = nn.BatchNorm1d(3, dtype=torch.float64, device=device)
    x, dx = torch.randn(2, 6, 4, 3, device=device, dtype=torch.float64).unbind()
    parameters = {k: v.detach() for k, v in m.named_parameters()}

    def training(x):
        return F.batch_norm(x, None, None, m.weight, m.bias, training=True)

    def loss(parameters, x):  # buffers of its own, as transforms ask for
        state = parameters | {k: v.clone() for k, v in m.named_buffers()}
        return torch.func.functional_call(m, state, (x,)).square().sum()

    def gradient_of_samples():
        return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    calls = {
        "grad": lambda: torch.func.grad(loss)(parameters, x[0]),
        "vmap": lambda: torch.vmap(training)(x),
        "jvp": lambda: torch.func.jvp(training, (x[0],), (dx[0],)),
        "jacrev": lambda: torch.func.jacrev(training)(x[0]),
        "hessian": lambda: torch.func.hessian(lambda x: training(x).pow(3).sum())(x[0]),
        "vmap of grad": lambda: m.eval() and gradient_of_samples(),
    }
    for name, call in calls.items():
        expected, before = call(), bnext.kernels_run()
        with bnext.enable():
            torch.testing.assert_close(call(), expected, msg=lambda text, name=name: f"{name}: {text}")
        assert bnext.kernels_run() > before, name


def test_forward_mode(device):
    from torch.autograd import forward_ad

    m = layer((4, 3), torch.float64, torch.float64, device)
    x, dx = torch.randn(2, 4, 3, dtype=torch.float64, device=device).unbind()
    results = []
    for switch in (contextlib.nullcontext(), bnext.enable()):
        with switch, forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(copy.deepcopy(m)(forward_ad.make_dual(x, dx))))
    torch.testing.assert_close(results[1].tangent, results[0].tangent)


@pytest.mark.parametrize(
    ("backend", "calls"),
    [("aot_eager", 2), ("aot_eager_decomp_partition", 0), pytest.param("inductor", 0, marks=pytest.mark.slow)],
)
def test_graphs_keep_or_lose_the_operator(backend, calls):
    """The second takes operators apart as inductor does, which compiles for a while."""
    torch._dynamo.reset()
    m, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    expected = copy.deepcopy(m)(x)
    with bnext.enable(), runs(calls):
        y = torch.compile(m, backend=backend)(x)
        y.sum().backward()
    torch.testing.assert_close(y, expected)


def test_checkpointing(device):
    m, x = nn.BatchNorm1d(3, device=device), torch.randn(4, 3, device=device, requires_grad=True)
    with bnext.enable(), runs(3):
        torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None


def test_the_meta_device_is_not_touched():
    with bnext.enable(), runs(0):
        assert nn.BatchNorm2d(3, device="meta")(torch.empty(4, 3, 5, 5, device="meta")).shape == (4, 3, 5, 5)


# ---- networks


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def resnet():
    head = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10), nn.BatchNorm1d(10)]
    return nn.Sequential(*head, Block(8, 16, 1), Block(16, 32, 2), *tail)


NORMS = 8


def train(m, x, labels, steps=3):
    optimizer = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(m(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_network_trains_as_before(memory_format, device):
    m = resnet().to(device, memory_format=memory_format)
    x = torch.randn(16, 3, 12, 12, device=device).to(memory_format=memory_format)
    labels = torch.arange(16, device=device) % 10
    copied, exact = copy.deepcopy(m), copy.deepcopy(m).double()
    with bnext.enable():
        with runs(2 * 3 * NORMS):
            losses = train(m, x, labels)
        with runs(NORMS), torch.no_grad():
            m.eval()(x)
        assert torch.equal(train(copy.deepcopy(copied), x, labels), losses)  # a copy behaves alike, bit for bit
    torch.testing.assert_close(losses.double(), train(exact, x.double(), labels), rtol=1e-3, atol=1e-4)
    with runs(0):
        train(copied, x, labels)
    for name, t in copied.state_dict().items():
        torch.testing.assert_close(m.state_dict()[name], t, rtol=1e-2, atol=1e-3, msg=f"{name} is another")


def test_distributed_data_parallel(tmp_path, device):
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        m = resnet().to(device)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(m))
        x, labels = torch.randn(4, 3, 12, 12, device=device), torch.arange(4, device=device)
        with bnext.enable():
            expected = train(m, x, labels, 2)
            with runs(2 * 2 * NORMS):
                assert torch.equal(train(parallel, x, labels, 2), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_other_threads_see_it(device):
    m, x = nn.BatchNorm1d(3, device=device), torch.randn(4, 3, device=device)
    seen = []
    with bnext.enable(), runs(4):
        threads = [threading.Thread(target=lambda: seen.append(copy.deepcopy(m)(x))) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(seen) == 4


# ---- torch's own tests of these


def test_torchs_samples_of_modules(device):
    modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
    tried = 0
    for info in modules.module_db:
        if not info.name.startswith("nn.BatchNorm"):
            continue
        for dtype, training in itertools.product((torch.float32, torch.float64), (True, False)):
            for sample in info.module_inputs_func(info, device, dtype, requires_grad=True, training=training):
                m = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
                m.to(device, dtype).train(training)
                (x,) = sample.forward_input.args
                twin, exact = copy.deepcopy(m), copy.deepcopy(m).double()
                with bnext.enable():
                    (dx,) = torch.autograd.grad(m(x).square().sum(), x)
                wanted = x.detach().double().requires_grad_()
                (dx64,) = torch.autograd.grad(exact(wanted).square().sum(), wanted)
                torch.testing.assert_close(dx.double(), dx64, rtol=1e-4, atol=1e-4)
                twin(x)
                torch.testing.assert_close(m.state_dict(), twin.state_dict())
                tried += 1
    assert tried > 20


def test_torchs_samples_of_operators(device):
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)
    tried, before = 0, bnext.kernels_run()
    for op in (op for op in invocations.op_db if "batch_norm" in op.name):
        for dtype in op.supported_dtypes(device):
            if not dtype.is_floating_point or dtype.itemsize < 2:
                continue
            for sample in op.sample_inputs(device, dtype, requires_grad=False):
                results = []
                for switch in (contextlib.nullcontext(), bnext.enable()):
                    with switch:
                        arguments = copy.deepcopy((sample.args, sample.kwargs))
                        results.append((op(sample.input, *arguments[0], **arguments[1]), arguments[0]))
                tolerance = {} if dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.05}
                torch.testing.assert_close(*results, equal_nan=True, **tolerance)
                tried += 1
    assert tried > 50 and bnext.kernels_run() > before + 50
    for op in (op for op in invocations.op_db if op.name == "nn.functional.batch_norm"):
        for sample in op.error_inputs(device) if op.error_inputs_func else ():
            call = functools.partial(op, sample.sample_input.input, *sample.sample_input.args)
            expected = outcome(lambda call=call, s=sample: call(**s.sample_input.kwargs))
            with bnext.enable():
                assert outcome(lambda call=call, s=sample: call(**s.sample_input.kwargs)) == expected


# ---- the switch


def is_on():
    """Also what the kernels say, which have a flag of their own."""
    before = bnext.kernels_run()
    F.batch_norm(torch.ones(2, 3), None, None, training=True)
    ran = bnext.kernels_run() - before
    assert ran == bnext.is_enabled()
    return bool(ran)


def test_a_call_holds_until_disable():
    bnext.enable()
    bnext.enable()
    assert is_on()
    bnext.disable()
    assert not is_on()
    bnext.disable()  # nothing to end
    assert not is_on()


def test_a_block_ends_with_itself():
    with bnext.enable() as block:
        assert is_on() and isinstance(block, bnext.switch.Enabled)
    assert not is_on()
    with pytest.raises(KeyError), bnext.enable():
        raise KeyError
    assert not is_on()


def test_blocks_nest():
    with bnext.enable():
        with bnext.enable():
            assert is_on()
        assert is_on()
    assert not is_on()


def test_a_block_is_used_again():
    block = bnext.enable()
    with block:
        with block:
            assert is_on()
        assert is_on()
    assert not is_on()
    with block:
        assert is_on()
    assert not is_on()


def test_a_block_within_a_call_leaves_it_on():
    bnext.enable()
    with bnext.enable():
        pass
    assert is_on()
    bnext.disable()


def test_disable_ends_calls_and_not_blocks():
    bnext.enable()
    with bnext.enable():
        bnext.disable()
        assert is_on()
    assert not is_on()


def test_a_call_within_a_block_outlasts_it():
    with bnext.enable():
        bnext.enable()
    assert is_on()
    bnext.disable()


def test_a_block_that_begins_after_disable():
    block = bnext.enable()
    bnext.disable()
    bnext.enable()
    with block:
        assert is_on()
    assert is_on()  # the second call
    bnext.disable()
    assert not is_on()


def test_blocks_of_several_threads_overlap():
    opened, closed = threading.Event(), threading.Event()

    def other():
        with bnext.enable():
            opened.set()
            closed.wait(60)

    thread = threading.Thread(target=other)
    with bnext.enable():
        thread.start()
        assert opened.wait(60)
    assert is_on()  # the other's
    closed.set()
    thread.join()
    assert not is_on()


def test_many_threads_leave_nothing_behind():
    def work():
        for _ in range(200):
            with bnext.enable():
                assert bnext.is_enabled()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not is_on()


# ---- a process of its own


def process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_nothing_is_loaded_or_registered_before_the_first_call():
    """Nor does the first call say that kernels are overridden."""
    output = process(
        "import sys, torch, bnext\n"
        "table = lambda: torch._C._dispatch_dump('aten::native_batch_norm')\n"
        "bnext.disable()\n"
        "assert not bnext.is_enabled() and bnext.kernels_run() == 0 and 'bnext._C' not in sys.modules\n"
        "bnext.BatchNorm1d(3)(torch.ones(2, 3))\n"
        "assert bnext.kernels_run() == 1 and 'enable.cpp' not in table()\n"
        "bnext.enable()\n"
        "assert 'enable.cpp' in table()\n"
    )
    assert output == ""


def test_bnexts_own_layers_are_as_before(device):
    m, x = bnext.BatchNorm2d(3, activation="relu", device=device), torch.randn(4, 3, 5, 5, device=device)
    expected = copy.deepcopy(m)(x)
    with bnext.enable(), runs(1):
        assert torch.equal(m(x), expected)
