"""What bad input gets: an error of torch.nn's type that names the argument, says what was expected
and what came, and leaves every buffer as it was."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bnext
from bnext.functional import batch_norm


def assert_refused(m, error, message, *args):
    before = {name: t.clone() for name, t in m.state_dict().items()}
    with pytest.raises(error, match=message):
        m(*args)
    assert all(torch.equal(t, before[name]) for name, t in m.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "shape", "error", "message"),
    [
        ("BatchNorm2d", (2, 3, 4), ValueError, r"expected 4D input \(got 3D input\)"),
        ("BatchNorm2d", (2, 3, 4, 4, 4), ValueError, r"expected 4D input \(got 5D input\)"),
        ("BatchNorm1d", (3,), ValueError, r"expected 2D or 3D input \(got 1D input\)"),
        ("BatchNorm3d", (2, 3, 4, 4), ValueError, r"expected 5D input \(got 4D input\)"),
        ("BatchNorm2d", (2, 4, 5, 5), RuntimeError, r"(weight|running_mean) should contain 4 elements not 3"),
        ("BatchNorm1d", (1, 3), ValueError, "Expected more than 1 value per channel when training, got input size"),
        ("BatchNorm2d", (1, 3, 1, 1), ValueError, r"more than 1 value per channel .* torch.Size\(\[1, 3, 1, 1\]\)"),
    ],
)
def test_shapes_get_the_error_of_torch(device, kind, shape, error, message):
    x = torch.randn(shape, device=device)
    assert_refused(getattr(bnext, kind)(3, device=device), error, message, x)
    with pytest.raises(error, match=message):
        getattr(nn, kind)(3, device=device)(x)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_cannot_be_normalized(device, dtype, options):
    x = torch.ones(2, 3, 4, 4, device=device).to(dtype)
    name = str(dtype).removeprefix("torch.")
    m = bnext.BatchNorm2d(3, device=device, **options)
    assert_refused(m, NotImplementedError, f"input should be float32, float64, float16 or bfloat16, not {name}", x)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype", "expected"),
    [
        (torch.float64, torch.float32, "float64"),
        (torch.float32, torch.float64, "float32"),
        (torch.float16, torch.bfloat16, "float16 or float32"),
        (torch.bfloat16, torch.float64, "bfloat16 or float32"),
    ],
    ids=str,
)
def test_dtypes_that_do_not_match(device, dtype, parameter_dtype, expected):
    x = torch.randn(2, 3, 4, 4, device=device).to(dtype)
    whole = bnext.BatchNorm2d(3, dtype=parameter_dtype, device=device)
    came = str(parameter_dtype).removeprefix("torch.")
    for m in (whole, whole.eval()):
        assert_refused(m, RuntimeError, f"weight should be {expected} .* not {came}", x)
    bare = bnext.BatchNorm2d(3, affine=False, dtype=parameter_dtype, device=device)
    for m in (bare, bare.eval()):
        assert_refused(m, RuntimeError, f"running_mean should be {expected} .* not {came}", x)


def arguments(device, **changed):
    vector = {
        "running_mean": torch.zeros(3, device=device),
        "running_var": torch.ones(3, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.zeros(3, device=device),
    }
    counter = {"num_batches_tracked": torch.zeros((), dtype=torch.int64, device=device)}
    options = {"training": True}
    return {"input": torch.randn(2, 3, 4, 4, device=device), **vector, **counter, **options, **changed}


WRONG = [
    (RuntimeError, r"{} should contain 3 elements not 4", ("weight", "bias", "running_mean", "running_var"), torch.ones(4)),
    (RuntimeError, r"{} should be float32 .* not float16", ("weight", "bias", "running_mean", "running_var"), torch.ones(3).half()),
    (ValueError, r"running_mean and running_var must either both be None", ("running_mean", "running_var"), None),
    (RuntimeError, r"residual should have the shape of input, \[2, 3, 4, 4\], or broadcast with it, not \[2, 3, 4\]", ("residual",), torch.ones(2, 3, 4)),
    (NotImplementedError, r"residual should be a dense tensor, not Sparse", ("residual",), torch.ones(2, 3, 4, 4).to_sparse()),
    (RuntimeError, r"num_batches_tracked should contain 1 element not 3", ("num_batches_tracked",), torch.ones(3).long()),
    (ValueError, r"activation should be None, 'relu', .* not 'swish'", ("activation",), "swish"),
    (ValueError, r"activation should be None, 'relu', .* not GELU", ("activation",), nn.GELU()),
    (ValueError, r"eps must be positive during training", ("eps",), 0.0),
    (ValueError, r"eps must be positive in float32 during training, but got 1e-46", ("eps",), 1e-46),
    (IndexError, r"at least 2 dimensions.*got 1D", ("input",), torch.ones(3)),
    (IndexError, r"at least 2 dimensions.*got 0D", ("input",), torch.ones(())),
    (TypeError, r"argument '{}' must be Tensor or None, not list", ("weight", "bias", "running_mean", "residual", "num_batches_tracked"), [1, 2, 3]),
    (TypeError, r"argument 'input' must be Tensor, not list", ("input",), [1, 2, 3]),
    (TypeError, r"argument '{}' must be bool, not NoneType", ("training", "unbiased"), None),
    (TypeError, r"argument 'training' must be bool, not int", ("training",), 1),
    (TypeError, r"argument '{}' must be float or int.*, not str", ("momentum", "eps"), "much"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "name", "value"), [(e, m, name, v) for e, m, names, v in WRONG for name in names]
)
def test_wrong_arguments(device, error, message, name, value):
    value = value.to(device) if isinstance(value, torch.Tensor) else value
    args = arguments(device, **{name: value})
    before = {k: t.clone() for k, t in args.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(error, match=message.format(name)):
        batch_norm(**args)
    for k, t in before.items():
        assert torch.equal(args[k].to_dense(), t.to_dense()), k


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked", "residual"])
def test_wrong_device(device, name):
    elsewhere = "meta" if device == "cpu" else "cpu"
    args = arguments(device)
    args[name] = torch.empty_like(args.get(name, args["input"]), device=elsewhere)
    with pytest.raises(RuntimeError, match=f"{name} is on {elsewhere}, but input is on {device}"):
        batch_norm(**args)
    assert name == "num_batches_tracked" or args["num_batches_tracked"] == 0


def test_cpu_tensor_to_a_module_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    m = bnext.BatchNorm2d(3, device="cuda")
    assert_refused(m, RuntimeError, "weight is on cuda:0, but input is on cpu", torch.randn(2, 3, 4, 4))


def test_dtypes_of_weight_and_bias_must_agree(device):
    x = torch.randn(2, 3, 4, 4, device=device).half()
    args = arguments(device, input=x, bias=torch.zeros(3, device=device).half())
    with pytest.raises(RuntimeError, match="bias should have the dtype of weight, float32, not float16"):
        batch_norm(**args)
    args = arguments(device, input=x, running_var=torch.ones(3, device=device).half())
    with pytest.raises(RuntimeError, match="running_var should have the dtype of running_mean, float32, not float16"):
        batch_norm(**args)


def test_evaluation_needs_running_statistics(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    for f in (batch_norm, nn.functional.batch_norm):
        with pytest.raises(RuntimeError, match="running_mean must be defined in evaluation mode"):
            f(x, None, None)


def test_cumulative_average_needs_a_counter(device):
    args = arguments(device, momentum=None, num_batches_tracked=None)
    with pytest.raises(ValueError, match="momentum=None .* needs num_batches_tracked"):
        batch_norm(**args)


def test_running_statistics_cannot_require_gradients(device):
    args = arguments(device)
    args["running_mean"].requires_grad_()
    with pytest.raises(RuntimeError, match="cannot require gradients"):
        batch_norm(**args)


def test_inference_buffers_are_not_updated_outside_inference_mode(device):
    with torch.inference_mode():
        m = bnext.BatchNorm2d(3, affine=False, device=device)
    x = torch.randn(2, 3, 4, 4, device=device)
    assert_refused(m, RuntimeError, "running_mean is an inference tensor", x)
    m.eval()(x)
    with torch.inference_mode():
        m.train()(x)


def test_sparse_input(device):
    with pytest.raises(NotImplementedError, match="input should be a dense tensor, not Sparse"):
        batch_norm(torch.ones(2, 3, 4, 4, device=device).to_sparse(), None, None, training=True)


def test_residual_of_a_layer(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    for m in (bnext.BatchNorm2d(3, device=device), bnext.BatchNorm2d(3, device=device).eval()):
        assert_refused(m, RuntimeError, "residual should have the shape of input, .* or broadcast", x, x[..., :3])


@pytest.mark.parametrize("shape", [(0,), (3,), ()])
def test_few_dimensions_get_the_class_of_torch(shape):
    results = []
    for f in (batch_norm, nn.functional.batch_norm):
        try:
            results.append(f(torch.ones(shape), None, None, training=True).shape)
        except Exception as error:
            results.append(type(error))
    assert results[0] == results[1]


RUN_ONE_LAYER = """
import torch, bnext
layer = bnext.BatchNorm2d(3)
for attempt in range(2):
    try:
        layer(torch.randn(2, 3, 4, 4))
    except Exception as error:
        print(error, layer.num_batches_tracked.item())
"""


@pytest.mark.parametrize("choice", ["nonsense"])
def test_unknown_instruction_set(choice):
    """BNEXT_CPU is read once in a process, at the first call; each call fails, and changes nothing."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "BNEXT_CPU": choice, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", RUN_ONE_LAYER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    choices = (
        "'portable' or 'neon'" if platform.machine() == "aarch64" else "'portable', 'avx2', 'avx512' or 'avx512_bf16'"
    )
    assert done.stdout == 2 * f"BNEXT_CPU should be {choices}, not '{choice}' 0\n"


@pytest.mark.parametrize("choice", ["", "portable"])
def test_known_instruction_set(choice):
    root = Path(__file__).parent.parent
    environment = {**os.environ, "BNEXT_CPU": choice, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", RUN_ONE_LAYER], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_expanded_statistics_are_refused_before_they_are_updated(device):
    """Each channel has a value to be updated; of memory that channels share, none would be that of any."""
    mean, counter = torch.zeros(3, device=device), torch.tensor(0, device=device)
    var = torch.ones(1, device=device).expand(3)
    x = torch.randn(4, 3, 5, 5, device=device)
    with pytest.raises(RuntimeError, match="running_var should have memory for each of its elements"):
        batch_norm(x, mean, var, training=True, num_batches_tracked=counter)
    assert not mean.any() and counter == 0
    strided = torch.ones(3, 2, device=device)[:, 0]
    batch_norm(x, mean, strided, training=True, num_batches_tracked=counter)
    assert counter == 1 and (strided != 1).all()


@pytest.mark.parametrize("name", ["input", "residual"])
def test_inference_tensors_are_refused_before_the_statistics_move(device, name):
    with torch.inference_mode():
        tensors = {"input": torch.randn(4, 3, 5, 5, device=device), "residual": torch.randn(4, 3, 5, 5, device=device)}
    tensors |= {other: t.clone() for other, t in tensors.items() if other != name}
    m = bnext.BatchNorm2d(3, activation="silu", device=device)
    message = f"{name} is an inference tensor, which cannot be saved for backward"
    assert_refused(m, RuntimeError, message, tensors["input"], tensors["residual"])


def test_a_residual_that_the_activation_does_not_take_changes_nothing(device):
    residual = torch.ones(4, 3, 5, 5, dtype=torch.complex64, device=device)
    m = bnext.BatchNorm2d(3, activation="relu", device=device)
    assert_refused(m, (NotImplementedError, RuntimeError), "complex", torch.randn(4, 3, 5, 5, device=device), residual)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.quint8], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_residual_that_does_not_promote_changes_nothing(dtype):
    residual = torch.ones(4, 3, 5, 5)
    is_quantized = dtype == torch.quint8
    residual = torch.quantize_per_tensor(residual, 0.1, 0, dtype) if is_quantized else residual.to(dtype)
    assert_refused(bnext.BatchNorm2d(3), RuntimeError, None, torch.randn(4, 3, 5, 5), residual)


def counters_that_cannot_be_written():
    with torch.inference_mode():
        inference = torch.tensor(0, dtype=torch.int32)
    yield "bool", torch.tensor(False)
    yield "inference", inference
    yield "expanded", torch.zeros(1).expand(2)
    yield "requires grad", torch.tensor(0.0, requires_grad=True)


@pytest.mark.parametrize("counter", [pytest.param(t, id=name) for name, t in counters_that_cannot_be_written()])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_that_cannot_be_written_is_found_before_the_statistics_move(counter, momentum):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError):
        batch_norm(torch.randn(4, 3), mean, var, training=True, momentum=momentum, num_batches_tracked=counter)
    assert not mean.any() and (var == 1).all()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_call_that_torch_refuses_changes_nothing(device, momentum, unbiased):
    """A counter of another dtype leads to torch's operators."""
    m = bnext.BatchNorm2d(3, momentum=momentum, unbiased=unbiased, device=device)
    m.num_batches_tracked = torch.tensor(0, dtype=torch.int32, device=device)
    assert_refused(m, RuntimeError, None, torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device))
    assert_refused(m, ValueError, "Expected more than 1 value", torch.randn(1, 3, 1, 1, device=device))


@pytest.mark.parametrize("name", ["input", "weight", "running_mean"])
def test_tensors_that_are_not_dense(name):
    tensors = {"input": torch.randn(4, 3, 5, 5), "running_mean": torch.zeros(3), "weight": torch.ones(3)}
    tensors[name] = tensors[name].to_sparse()
    with pytest.raises((NotImplementedError, RuntimeError), match="sparse|dense"):
        batch_norm(tensors["input"], tensors["running_mean"], torch.ones(3), tensors["weight"])
    with pytest.raises(
        NotImplementedError, match="bnext::batch_norm_stats has kernels for dense tensors, not for sparse"
    ):
        torch.ops.bnext.batch_norm_stats(torch.randn(4, 3).to_sparse())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_input():
    x = torch.quantize_per_tensor(torch.randn(4, 3, 5, 5), 0.1, 0, torch.quint8)
    with pytest.raises(NotImplementedError, match="quantized|quint8|QUInt8"):
        bnext.BatchNorm2d(3)(x)


def test_a_type_error_of_a_hook_keeps_its_place(device):
    """Only those of arguments are told in other words."""

    def pack(t):
        raise TypeError("a fault of mine")

    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, pytest.raises(TypeError, match="a fault of mine") as caught:
        bnext.BatchNorm2d(3, device=device)(x)
    assert any(entry.name == "pack" for entry in caught.traceback)
