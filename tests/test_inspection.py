"""Looking at models that cannot just be copied and run: compiled ones, and those with a process group."""

import threading

import pytest
import torch
from torch import nn

import bnext
from bnext.inspection import uncompiled

# ---- compiled models


#: What torch.compile makes of a model, given the model and how to compile.
COMPILED = {
    "torch.compile": torch.compile,
    "Module.compile": lambda net, **how: net.compile(**how) or net,
    "a part": lambda net, **how: nn.Sequential(net[0], torch.compile(net[1], **how)),
}


def with_graphs(kind, compiled, train):
    """A compiled model that has run, and an input."""
    torch._dynamo.reset()
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4)).train(train), torch.randn(2, 3, 5, 5)
    model = COMPILED[compiled](net, backend="aot_eager")
    model(x)
    return model, x


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("train", [True, False])
def test_explain_knows_what_becomes_of_a_graph(compiled, train):
    model, x = with_graphs(bnext.BatchNorm2d, compiled, train)
    ways = []
    for _ in range(9):  # none of which counts as a compilation, of which Dynamo makes eight
        (route,) = bnext.explain(model, x).values()
        ways.append(route.way)
        assert "torch.compile keeps" in route.why if train else "Inductor" in route.why
    assert ways == ["kernels" if train else "torch"] * 9


def test_explain_tells_parts_that_are_compiled_from_others():
    """Of torch's layers, too, and of one that is called in both."""
    norm, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    model = nn.Sequential(torch.compile(nn.Sequential(norm), backend="aot_eager"), nn.BatchNorm2d(3), norm)
    with bnext.enable():
        assert [route.way for route in bnext.explain(model, x).values()] == ["kernels", "kernels"]
        (route,) = bnext.explain(model[0], x).values()
    assert route.way == "torch" and "torch.compile" in route.why
    assert all("bnext.convert" in route.why for route in bnext.explain(model, x).values())


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("kind", [bnext.BatchNorm2d, nn.BatchNorm2d])
def test_memory_of_a_compiled_model_is_its_layers(compiled, kind):
    model, x = with_graphs(kind, compiled, True)
    report = bnext.memory(model, x)
    assert len(report) == 2 and "" not in report
    assert report.total == bnext.memory(nn.Sequential(nn.Conv2d(3, 4, 1), kind(4)), x).total


def test_compiling_begins_again_when_the_last_thread_is_through():
    """The stance is one for all threads: the second to come ends after the first, and neither leaves it behind."""
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(nn.ReLU(), backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with uncompiled():
            inside.set(), leave.wait(60)

    with uncompiled():
        thread = threading.Thread(target=stay)
        thread.start(), inside.wait(60)
    compiled(torch.ones(2))
    assert not graphs
    leave.set(), thread.join()
    compiled(torch.ones(2))
    assert len(graphs) == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        with pytest.raises(ZeroDivisionError), uncompiled():
            raise ZeroDivisionError
        with pytest.raises(RuntimeError, match="fail_on_recompile"):  # what was there is there again
            compiled(torch.ones(2, dtype=torch.float64))


# ---- process groups


@pytest.fixture
def group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.new_group([0])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, bnext.SyncBatchNorm])
def test_models_with_a_process_group(group, kind):
    """Which cannot be copied; the copy of a layer takes part in the same one."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, process_group=group)).eval(), torch.randn(2, 3, 5, 5)
    expected = net(x)
    converted = bnext.convert(net, inplace=False)
    reverted = bnext.revert(converted, inplace=False)
    assert [type(model[1]) for model in (net, converted, reverted)] == [kind, bnext.SyncBatchNorm, nn.SyncBatchNorm]
    for model in (converted, reverted):
        assert model[1].process_group is group and model[1].running_mean is net[1].running_mean
        torch.testing.assert_close(model(x), expected)
        assert list(bnext.explain(model, x)) == ["1"] and list(bnext.memory(model, x))
