"""torch.compile and torch.export."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import bnext


class Block(nn.Module):
    """relu(bn(conv(relu(bn(x)))) + x): every fusion there is."""

    def __init__(self, momentum=0.1, device=None):
        super().__init__()
        self.bn1 = bnext.BatchNorm2d(4, momentum=momentum, activation="relu", device=device)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, device=device)
        self.bn2 = bnext.BatchNorm2d(4, momentum=momentum, activation="relu", device=device)

    def forward(self, x):
        return self.bn2(self.conv(self.bn1(x)), x)


def assert_steps_agree(compiled, eager, inputs):
    for x in inputs:
        grads = []
        for m in (compiled, eager):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = m(leaf)
            y.square().sum().backward()
            grads.append((y, leaf.grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(compiled.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def check_compiled(device, backend, momentum):
    torch._dynamo.reset()
    eager = Block(momentum, device)
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend=backend)
    # The second size makes the batch dynamic.
    inputs = [torch.randn(n, 4, 6, 5, device=device) for n in (2, 3, 5)]
    assert_steps_agree(compiled, eager, inputs)
    assert_steps_agree(compiled, eager, [x.to(memory_format=torch.channels_last) for x in inputs[:1]])
    assert eager.bn1.num_batches_tracked == 4
    compiled.eval(), eager.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs[0]), eager(inputs[0]), rtol=1e-4, atol=1e-4)
    assert_steps_agree(compiled, eager, inputs[:2])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_traced(device, momentum):
    check_compiled(device, "aot_eager", momentum)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
def test_inductor(device, momentum):
    check_compiled(device, "inductor", momentum)


def test_eps_is_read_when_it_is_called(device):
    torch._dynamo.reset()
    layer = bnext.BatchNorm2d(3, activation="relu", device=device).eval()
    x = torch.randn(4, 3, 5, 5, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for eps in (1e-5, 0.5, 2.0):
        layer.eps = eps
        torch.testing.assert_close(compiled(x), (x * (1 + eps) ** -0.5).relu())


def test_eps_assigned_while_traced(device):
    torch._dynamo.reset()
    layer = bnext.BatchNorm2d(3, device=device).eval()
    x = torch.randn(4, 3, 5, 5, device=device)

    def f(x):
        layer.eps = 0.5
        return layer(x) + layer.eps

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x * 1.5**-0.5 + 0.5)
    assert vars(layer)["eps"] == 0.5


def test_function_in_a_graph(device):
    torch._dynamo.reset()
    x = torch.randn(4, 3, 5, device=device)

    def f(x):
        return bnext.functional.batch_norm(x, None, None, training=True, activation="relu") * 2

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="eager")(x), f(x))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_of_an_evaluating_model(device, strict):
    torch._dynamo.reset()
    m = Block(device=device)
    m(torch.randn(4, 4, 6, 5, device=device))
    m.eval()
    x = torch.randn(2, 4, 6, 5, device=device)
    n = torch.export.Dim("n", max=65535)  # on CUDA torch's operator asks whether cuDNN takes so many, in torch.nn too
    program = torch.export.export(m, (x,), dynamic_shapes={"x": {0: n}}, strict=strict)
    more = torch.randn(7, 4, 6, 5, device=device)
    for exported in (program, program.run_decompositions()):
        torch.testing.assert_close(exported.module()(more), m(more))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("aten.") for name in targets) and not any("bnext" in name for name in targets)


@pytest.mark.parametrize("training", [True, False])
def test_draft_export(device, training):
    m = Block(device=device).train(training)
    x = torch.randn(2, 4, 6, 5, device=device)
    program = torch.export.draft_export(m, (x,))
    assert program._report.successful(), program._report
    torch.testing.assert_close(program.module()(x), m(x))
    assert not any("bnext" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(device, training):
    m = Block(device=device).train(training)
    x = torch.randn(2, 4, 6, 5, device=device)
    traced = torch.jit.trace(m, (x,), check_trace=False)
    torch.testing.assert_close(traced(x + 1), m(x + 1))
    assert "bnext::" not in str(traced.inlined_graph)


def test_errors_are_found_while_tracing(device):
    torch._dynamo.reset()
    m = bnext.BatchNorm2d(3, device=device)
    with pytest.raises(Exception, match="should contain 4 elements not 3"):
        torch.compile(m, fullgraph=True, backend="aot_eager")(torch.randn(2, 4, 5, 5, device=device))
    assert m.num_batches_tracked == 0


@pytest.mark.parametrize("activation", [None, "silu"])
def test_compiled_autograd_takes_the_backward(device, activation):
    """In one graph: autograd's node is one that it can trace."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), bnext.BatchNorm2d(6, activation=activation), nn.Flatten(), nn.Linear(6 * 36, 2)]
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(4, 3, 8, 8, device=device)

    def gradients(compiler):
        model.zero_grad()
        loss = model(x).square().sum()
        with torch._dynamo.compiled_autograd._enable(compiler) if compiler else contextlib.nullcontext():
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    compiled = gradients(lambda graph: torch.compile(graph, backend="aot_eager", fullgraph=True))
    for ours, theirs in zip(compiled, gradients(None), strict=True):
        torch.testing.assert_close(ours, theirs)
