"""Which way a call goes, and that every way computes the same."""

import contextlib
import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import bnext
from bnext.functional import batch_norm

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, device=device)
        self.bn1 = bnext.BatchNorm2d(4, activation="silu", device=device)
        self.bn2 = bnext.BatchNorm2d(4, activation="leaky_relu", activation_param=0.2, device=device)

    def forward(self, x):
        y = self.bn1(self.conv(x))
        return self.bn2(y, y)


def net(device, training=False):
    torch.manual_seed(0)
    model = Net(device)
    for _ in range(2):
        model(torch.randn(4, 3, 6, 5, device=device))
    return model.train(training)


def composed(x, residual, **options):
    """What y + r gives, with torch's sum."""
    return nn.functional.relu(batch_norm(x, None, None, training=True, **options) + residual)


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (3, 1, 1), (), (1, 3, 5, 6), (2, 4, 3, 5, 6)], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_a_residual_is_broadcast_and_promoted(device, dtypes, shape):
    x = torch.randn(4, 3, 5, 6, device=device).to(dtypes[0]).requires_grad_()
    residual = torch.randn(shape, device=device).to(dtypes[1]).requires_grad_()
    y = batch_norm(x, None, None, training=True, activation="relu", residual=residual)
    expected = composed(x, residual)
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, (x, residual), dy) for t in (y, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_residual_is_broadcast_in_a_compiled_step(device):
    torch._dynamo.reset()
    x, residual = torch.randn(4, 3, 5, 6, device=device), torch.randn(3, 1, 1, device=device)
    layer = bnext.BatchNorm2d(3, activation="relu", device=device)
    expected = copy.deepcopy(layer)(x, residual)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, residual), expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_another_dtype(device, momentum):
    results = []
    for kind in (bnext.BatchNorm2d, nn.BatchNorm2d):
        m = kind(3, momentum=momentum, device=device)
        m.num_batches_tracked = m.num_batches_tracked.float()
        for i in range(3):
            torch.manual_seed(i)
            y = m(torch.randn(4, 3, 5, 5, device=device))
        results.append([y, *m.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_explain(device):
    model = nn.Sequential(bnext.BatchNorm2d(3, device=device), nn.BatchNorm2d(3, device=device)).train()
    x = torch.randn(2, 3, 4, 4, device=device)
    before = copy.deepcopy(model.state_dict())
    found = bnext.explain(model, x)
    assert [route.way for route in found.values()] == ["kernels", "torch"] and list(found) == ["0", "1"]
    assert "bnext.convert" in str(found).splitlines()[1]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with bnext.enable():
        assert [route.way for route in bnext.explain(model, x).values()] == ["kernels", "kernels"]
    layer = bnext.BatchNorm2d(3, device=device)
    assert bnext.explain(layer, x, x[..., :1])[""].way == "sum"
    layer.num_batches_tracked = layer.num_batches_tracked.float()
    assert bnext.explain(layer, x)[""].way == "torch"
    ways = []
    torch.func.grad(lambda x: ways.append(bnext.routes.of_call(x, *[None] * 6).way) or x.sum())(x)
    assert ways == ["function"]


class Elsewhere(nn.BatchNorm2d):
    """By other operators, as nn.SyncBatchNorm where several processes take part."""

    def forward(self, x):
        return x - x.mean((0, 2, 3), keepdim=True)


#: Layers of torch, what they are called with, and whether `bnext.enable` reaches that.
REACHED = {
    "training": (nn.BatchNorm2d(3), torch.ones(2, 3, 2, 2), True),
    "evaluation": (nn.BatchNorm2d(3).eval(), torch.ones(2, 3, 2, 2), True),
    "one process": (nn.SyncBatchNorm(3).eval(), torch.ones(2, 3, 2, 2), True),
    "frozen": (bnext.revert(bnext.nn.FrozenBatchNorm2d(3)), torch.ones(2, 3, 2, 2), True),
    "no values": (nn.BatchNorm2d(3), torch.ones(0, 3, 2, 2), False),
    "meta": (nn.BatchNorm2d(3, device="meta"), torch.ones(2, 3, 2, 2, device="meta"), False),
    "other operators": (Elsewhere(3), torch.ones(2, 3, 2, 2), False),
}


@pytest.mark.parametrize("case", REACHED)
def test_explain_says_what_enable_reaches(case):
    layer, x, reached = REACHED[case]
    with bnext.enable():
        before = bnext.kernels_run()
        copy.deepcopy(layer)(x)
        assert bnext.kernels_run() - before == reached
        found = bnext.explain(layer, x)
    assert found[""].way == ("kernels" if reached else "torch") and "bnext.enable()" in found[""].why
    assert bnext.explain(layer, x)[""].way == "torch" and "bnext.convert" in bnext.explain(layer, x)[""].why


def test_explain_knows_a_forward_that_calls_the_kernels():
    class Ours(nn.BatchNorm2d):
        def forward(self, x):
            return batch_norm(x, None, None, training=True)

    assert bnext.explain(Ours(3), torch.ones(2, 3, 2, 2))[""] == ("kernels", "its forward calls them")


def test_explain_tells_of_the_last_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, *inputs):
            return [self.norm(input) for input in inputs]

    x = torch.ones(2, 3, 2, 2)
    with bnext.enable():
        assert bnext.explain(Twice(), x, x[:0])["norm"].way == "torch"
        assert bnext.explain(Twice(), x[:0], x)["norm"].way == "kernels"


@pytest.mark.parametrize("enabled", [True, False])
def test_explain_in_a_compiled_graph(enabled):
    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(nn.BatchNorm2d(3)), backend="aot_eager", fullgraph=True)
    with bnext.enable() if enabled else contextlib.nullcontext():
        (route,) = bnext.explain(model, torch.randn(2, 3, 4, 4)).values()
    assert route.way == "torch" and ("torch.compile" if enabled else "bnext.convert") in route.why


def test_torch_fx_keeps_the_layers(device):
    model = net(device)
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["conv", "bn1", "bn2"]
    x = torch.randn(2, 3, 6, 5, device=device)
    assert torch.equal(traced(x), model(x))
    fx.passes.shape_prop.ShapeProp(traced).propagate(x)
    assert all(
        node.meta["tensor_meta"].shape == (2, 4, 6, 5) for node in traced.graph.nodes if node.op == "call_module"
    )
    assert torch.equal(fx.Interpreter(traced).run(x), model(x))

    class Wrapped(nn.Module):
        def forward(self, x):
            return batch_norm(x, None, None, training=True) + 1

    graph = fx.symbolic_trace(Wrapped()).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"][0] is batch_norm


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_torchscript(device, training):
    model = net(device, training)
    twin = copy.deepcopy(model)
    scripted = torch.jit.script(model)
    x = torch.randn(2, 3, 6, 5, device=device)
    torch.testing.assert_close(scripted(x), twin(x))
    for (name, a), b in zip(scripted.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert "bnext::" not in str(scripted.inlined_graph)

    class Own(bnext.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    assert torch.equal(torch.jit.script(Own(3))(x), x * 2)
    if not training:
        frozen = torch.jit.freeze(scripted)
        torch.testing.assert_close(frozen(x), twin(x), rtol=1e-4, atol=1e-5)


LOAD = """
import io, sys, torch
sys.modules["bnext"] = None  # importing it is an error
x = torch.load(sys.argv[1] + "/x.pt")
for name, load in (("program.pt2", lambda p: torch.export.load(p).module()), ("script.pt", torch.jit.load)):
    y = load(sys.argv[1] + "/" + name)(x)
    torch.testing.assert_close(y, torch.load(sys.argv[1] + "/y.pt"), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_saved_programs_run_without_bnext(tmp_path):
    model = net("cpu")
    x = torch.randn(2, 3, 6, 5)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    torch.jit.save(torch.jit.script(model), str(tmp_path / "script.pt"))
    torch.save(x, tmp_path / "x.pt"), torch.save(model(x).detach(), tmp_path / "y.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, cwd=tmp_path)


CALL_FIRST = """
import sys, torch, bnext
assert "bnext._C" not in sys.modules
program = torch.export.load(sys.argv[1])
scripted = torch.jit.load(sys.argv[2])
assert "bnext._C" not in sys.modules
x = torch.ones(4, 3)
print(scripted(x).sum().item(), program.module()(x)[1].tolist())
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_are_known_before_they_are_loaded(tmp_path):
    """Programs that name bnext's operators load in a fresh process after `import bnext` alone."""

    class Stage(nn.Module):
        def forward(self, x):
            return bnext.ops.batch_norm_stats(x)

    @torch.jit.script
    def normalized(x):
        return torch.ops.bnext.batch_norm(x, None, None, None, None, None, None, True, 0.1, 1e-5)

    torch.export.save(torch.export.export(Stage(), (torch.ones(4, 3),)), tmp_path / "stage.pt2")
    normalized.save(str(tmp_path / "script.pt"))
    done = subprocess.run(
        [sys.executable, "-c", CALL_FIRST, str(tmp_path / "stage.pt2"), str(tmp_path / "script.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.0 [0.0, 0.0, 0.0]\n"


def test_stages_refuse_gradients_instead_of_losing_them(device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    mean, _ = bnext.ops.batch_norm_stats(x)
    with pytest.raises(RuntimeError, match="not implemented"):
        mean.sum().backward()


def test_mkldnn_tensors_in_evaluation():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no MKL-DNN")
    m = bnext.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(m(x.to_mkldnn()).to_dense(), m(x))


def test_distributed_tensors(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        x = torch.randn(4, 3, 5, 5)
        m = bnext.BatchNorm2d(3, activation="relu", affine=False, track_running_stats=False)
        try:
            expected = nn.functional.batch_norm(
                distribute_tensor(x, mesh, [Shard(0)]), None, None, training=True
            ).relu()
        except Exception as error:
            with pytest.raises(type(error)):
                m(distribute_tensor(x, mesh, [Shard(0)]))
        else:
            assert torch.equal(m(distribute_tensor(x, mesh, [Shard(0)])).full_tensor(), expected.full_tensor())
    finally:
        torch.distributed.destroy_process_group()


def test_the_profiler_links_backward_to_forward(device):
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    m = bnext.BatchNorm2d(3, device=device)
    with torch.profiler.profile() as profile:
        m(x).sum().backward()
    forward = [e for e in profile.events() if e.name == "bnext::batch_norm"]
    backward = [e for e in profile.events() if "BnextBatchNormBackward" in e.name]
    assert forward and forward[0].sequence_nr >= 0
    assert forward[0].sequence_nr in {e.sequence_nr for e in backward}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.filterwarnings("ignore")
def test_onnx(exporter, library):
    onnx, reference = library("onnx"), library("onnx.reference")
    library("onnxscript")

    model = net("cpu")
    x = torch.randn(2, 3, 6, 5)
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=exporter == "dynamo", input_names=["x"], verbose=False)
    graph = onnx.load_from_string(buffer.getvalue())
    assert {node.domain for node in graph.graph.node} <= {
        "",
        "pkg.onnxscript.torch_lib",
        "pkg.onnxscript.torch_lib.common",
    }
    (y,) = reference.ReferenceEvaluator(graph).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = net("cpu")
    x = torch.randn(2, 3, 6, 5)
    program = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_quantization_of_an_exported_program_folds(library):
    steps = library("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = library("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bnext.BatchNorm2d(4, activation="relu")).eval()
    x = torch.randn(2, 3, 8, 8)
    quantizer = quantizers.X86InductorQuantizer()
    quantizer.set_global(quantizers.get_default_x86_inductor_quantization_config())
    prepared = steps.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    quantized = steps.convert_pt2e(prepared)
    assert not any("norm" in str(node.target) for node in quantized.graph.nodes)
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.1)
