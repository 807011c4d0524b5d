"""convert, revert, and what tools that know torch.nn's batch norm do with our layers."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils import mkldnn

import bnext
from bnext import torch_layers
from bnext.conversion import Report

KINDS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 1)
        self.bn1 = nn.BatchNorm2d(3)
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, momentum=None), nn.ReLU())
        self.again = self.bn1  # registered twice

    def forward(self, x):
        return self.again(self.branch(self.bn1(self.conv1(x))))


def step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("inplace", [True, False])
def test_convert_keeps_everything(inplace):
    model = Block().double()
    model.bn1.weight.requires_grad_(False)
    model.branch[1].eval()
    twin = copy.deepcopy(model)
    calls = []
    model.bn1.register_forward_hook(lambda *args: calls.append(1))
    identities = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    report = Report()
    converted = bnext.convert(model, inplace=inplace, report=report)
    assert (converted is model) == inplace
    assert type(model.bn1) is (bnext.BatchNorm2d if inplace else nn.BatchNorm2d)
    assert {name: id(t) for name, t in converted.state_dict(keep_vars=True).items()} == identities
    assert converted.again is converted.bn1 and type(converted.bn1) is bnext.BatchNorm2d
    assert converted.bn1.training and not converted.branch[1].training
    assert not converted.bn1.weight.requires_grad and converted.branch[1].momentum is None
    assert report == dict.fromkeys(("bn1", "branch.1"), "torch.nn.BatchNorm2d -> bnext.BatchNorm2d")
    assert not report.unconverted and "bn1" in str(report)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for ours, theirs in zip(step(converted, x), step(twin, x), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    assert calls
    pickle.loads(pickle.dumps(bnext.convert(Block())))


@pytest.mark.parametrize("kind", KINDS)
def test_convert_and_revert_each_kind(kind):
    layer = kind(3)
    assert type(bnext.convert(layer)) is getattr(bnext, kind.__name__)
    before = dict(layer.__dict__)
    assert type(bnext.revert(layer)) is kind
    assert layer.__dict__.keys() == kind(3).__dict__.keys() and before.keys() >= layer.__dict__.keys()
    assert bnext.revert(getattr(bnext, kind.__name__)(3)).__dict__.keys() == kind(3).__dict__.keys()
    lazy = getattr(nn, f"Lazy{kind.__name__}")()
    assert type(bnext.convert(lazy)) is getattr(bnext, f"Lazy{kind.__name__}")


def test_what_cannot_be_converted_is_named():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Same(nn.BatchNorm2d):
        pass

    parametrized = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.Sequential(Own(3), Same(3), parametrized, nn.InstanceNorm2d(3))
    report = Report()
    bnext.convert(model, report=report)
    assert type(model[0]) is Own and type(model[1]) is bnext.BatchNorm2d
    assert list(report) == ["1"] and list(report.unconverted) == ["0", "2"]
    assert "its own forward" in report.unconverted["0"] and "parametrized" in report.unconverted["2"]
    fresh = nn.Sequential(nn.BatchNorm2d(3), Own(3))
    with pytest.raises(ValueError, match=r"1: .*Own has its own forward"):
        bnext.convert(fresh, strict=True)
    assert type(fresh[0]) is nn.BatchNorm2d


def redefining(name, value, base):
    """A layer of a class derived from `base`, whose constructor not every such class lets through."""
    kind = type("Redefining", (base,), {name: value})
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    vars(layer).update(momentum=0.1, eps=1e-5)  # behind a property of the same name
    return layer


#: What a subclass may redefine so that another class in its place would compute, or save, something else.
REDEFINED = {
    "weight": property(lambda self: torch.full((3,), 2.0)),
    "bias": None,  # hides the parameter
    "running_mean": property(lambda self: torch.ones(3)),
    "running_var": property(lambda self: torch.ones(3)),
    "num_batches_tracked": property(lambda self: None),
    "momentum": property(lambda self: 0.5, lambda self, value: None),
    "eps": property(lambda self: 0.5, lambda self, value: None),
    "training": property(lambda self: True, lambda self, value: None),
    "track_running_stats": property(lambda self: True, lambda self, value: None),
    "reset_parameters": lambda self: None,
    "reset_running_stats": lambda self: None,
    "eval": lambda self: self,
    "_apply": lambda self, fn, recurse=True: self,
    "get_extra_state": lambda self: "kept",
    "set_extra_state": lambda self, state: None,
    "state_dict": lambda self, *args, **keywords: {},
    "load_state_dict": lambda self, *args, **keywords: None,
    "_save_to_state_dict": lambda self, destination, prefix, keep_vars: None,
    "__getattr__": lambda self, name: nn.BatchNorm2d.__getattr__(self, name),
    "__setattr__": lambda self, name, value: nn.BatchNorm2d.__setattr__(self, name, value),
}


@pytest.mark.parametrize("name", REDEFINED)
def test_what_a_subclass_redefines_is_not_lost(name):
    """Of torch's layers, of lazy and of frozen ones; and of bnext's, where they are synchronised."""
    for base in (
        nn.BatchNorm2d,
        nn.LazyBatchNorm2d,
        torch_layers.TorchBatchNorm2d,
        torch_layers.TorchFrozenBatchNorm2d,
    ):
        layer, report = redefining(name, REDEFINED[name], base), Report()
        bnext.convert(nn.Sequential(layer), report=report)
        assert isinstance(layer, base) and report.unconverted["0"].endswith(f".Redefining has its own {name}")
    for base in (nn.BatchNorm2d, bnext.BatchNorm2d):
        layer = redefining(name, REDEFINED[name], base)
        with pytest.raises(TypeError, match=f"0: .*Redefining has its own {name}"):
            bnext.convert_sync_batchnorm(nn.Sequential(layer))


def test_a_setting_of_a_subclass_of_ours_is_not_lost():
    with pytest.raises(TypeError, match="0: .*Redefining has its own frozen"):
        bnext.convert_sync_batchnorm(nn.Sequential(redefining("frozen", True, bnext.BatchNorm2d)))


def test_what_a_subclass_redefines_without_effect_is_converted():
    class Same(nn.BatchNorm2d):
        momentum, eps, activation = 0.5, 0.5, "prelu"  # the layer's own come before these; the last one nobody reads
        reset_parameters, forward = nn.BatchNorm2d.reset_parameters, nn.BatchNorm2d.forward

        def __init__(self, features):
            super().__init__(features, momentum=0.2)
            self.register_state_dict_post_hook(lambda layer, state, prefix, _: state.update({prefix + "more": 1}))

        def extra_repr(self):
            return "same"

        def helper(self):
            return 1

    layer = bnext.convert(nn.Sequential(Same(3)), strict=True)[0]
    assert type(layer) is bnext.BatchNorm2d and layer.momentum == 0.2 and layer.eps == 1e-5
    assert layer.activation is None and layer.state_dict()["more"] == 1


@pytest.mark.parametrize(
    "attribute", [{"frozen": True}, {"activation": "prelu"}, {"activation": nn.ReLU()}, {"unbiased": True}], ids=str
)
def test_attributes_that_mean_something_to_our_layers_alone(attribute):
    """Of somebody else, on a layer that was never bnext's; those that a reverted layer has are ours."""
    ((name, value),) = attribute.items()
    foreign, report = nn.BatchNorm2d(3), Report()
    setattr(foreign, name, value)
    model = nn.Sequential(nn.BatchNorm2d(3), foreign)
    bnext.convert(model, report=report)
    assert type(foreign) is nn.BatchNorm2d and getattr(foreign, name) is value and list(report) == ["0"]
    assert f"it has an attribute {name} of its own" in report.unconverted["1"]
    with pytest.raises(TypeError, match=f"1: it has an attribute {name} of its own"):
        bnext.convert_sync_batchnorm(model)
    layer = bnext.BatchNorm2d(3)
    layer.frozen = True
    for reverted in (bnext.revert(layer), bnext.revert(bnext.BatchNorm2d(3))):
        assert type(bnext.convert(nn.Sequential(reverted), strict=True)[0]) is bnext.BatchNorm2d


@pytest.mark.parametrize("name", ["forward", "_check_input_dim", "train"])
def test_a_method_set_on_the_layer_is_not_taken_to_another_class(name):
    """As accelerate sets them: they go on calling the old class."""
    layer, reverted = nn.BatchNorm2d(3), bnext.BatchNorm2d(3)
    for norm in (layer, reverted):
        setattr(norm, name, functools.partial(getattr(norm, name)))
    report, model = Report(), nn.Sequential(nn.BatchNorm2d(3), layer)
    bnext.convert(model, report=report)
    assert type(layer) is nn.BatchNorm2d and list(report) == ["0"]
    assert f"it has its own {name}, set on the layer" in report.unconverted["1"]
    with pytest.raises(ValueError, match=f"1: it has its own {name}"):
        bnext.convert(model, strict=True)
    for norm in (layer, reverted):
        with pytest.raises(TypeError, match=f"1: it has its own {name}"):
            bnext.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), norm))
    model = nn.Sequential(bnext.BatchNorm2d(3), reverted)
    with pytest.raises(ValueError, match=f"bnext.revert: 1 is .* it has its own {name}, .*: revert the model before"):
        bnext.revert(model)
    assert type(model[0]) is type(reverted) is bnext.BatchNorm2d


@pytest.mark.parametrize("training", [True, False])
def test_revert_round_trip_is_bitwise_equal(training):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        bnext.BatchNorm2d(4, activation="silu"),
        bnext.BatchNorm2d(4, activation="leaky_relu", activation_param=0.3),
        bnext.BatchNorm2d(4),
    ).train(training)
    x = torch.randn(4, 3, 6, 6)
    twin = copy.deepcopy(model)
    expected = twin(x)
    reverted = bnext.revert(model, inplace=False)
    assert list(reverted.state_dict()) == list(model.state_dict())
    assert [type(m) for m in reverted[1:]] == [torch_layers.TorchBatchNorm2d] * 2 + [nn.BatchNorm2d]
    torch.testing.assert_close(copy.deepcopy(reverted)(x), expected)
    restored = bnext.convert(reverted)
    assert [repr(m) for m in restored] == [repr(m) for m in model]
    assert torch.equal(restored(x), expected)


def test_what_cannot_be_reverted_is_an_error():
    class Own(bnext.BatchNorm2d):
        pass

    for layer in (Own(3), bnext.LazyBatchNorm2d(activation="relu")):
        model = nn.Sequential(bnext.BatchNorm2d(3), layer)
        with pytest.raises(ValueError, match=r"bnext.revert: 1 is .* which torch has nothing for"):
            bnext.revert(model)
        assert type(model[0]) is bnext.BatchNorm2d
    graph = torch.fx.symbolic_trace(nn.Sequential(fused_layer(), Own(3)))
    with pytest.raises(ValueError, match="which torch has nothing for"):
        bnext.revert(graph)
    assert [type(m) for m in graph.children()] == [bnext.BatchNorm2d, Own]
    assert type(bnext.revert(bnext.LazyBatchNorm2d())) is nn.LazyBatchNorm2d


def test_reverted_layers_are_leaves_of_torch_fx():
    model = bnext.revert(nn.Sequential(nn.Conv2d(3, 3, 1), fused_layer()))
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_reverted_layers_script_with_a_residual():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bnext.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.bn(x, x)

    model = Net()
    x = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.jit.script(bnext.revert(model))(x), expected)


@pytest.mark.parametrize("layer", [bnext.nn.BatchNormAct2d, bnext.nn.FrozenBatchNorm2d])
def test_reverted_layers_with_children_script(layer):
    model, x = layer(3, act=nn.SiLU()).eval(), torch.randn(2, 3, 4, 4)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(bnext.revert(model))(x), expected)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), bnext.BatchNorm2d(3, activation="relu")
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.block.add_module("bn", bnext.BatchNorm2d(3, activation="leaky_relu", activation_param=0.3))

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.block.bn(self.block[0](y), residual=y)


def trained(model):
    torch.manual_seed(0)
    for _ in range(2):
        model(torch.randn(4, 3, 5, 5))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("first", [bnext.revert, bnext.convert], ids=["of reverted layers", "of ours"])
def test_reverting_a_graph_takes_the_activations_out(training, first):
    model = first(trained(Residual())).train(training)
    kinds = [type(model.bn1), type(model.block.bn)]
    twin = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(model)
    shared = bnext.revert(graph, inplace=False)
    assert bnext.revert(graph) is graph
    assert type(graph.bn1) is type(graph.block.bn) is type(shared.bn1) is nn.BatchNorm2d
    assert vars(graph.bn1).keys() == vars(nn.BatchNorm2d(3)).keys()
    assert repr(graph.bn1_activation) == "ReLU()"
    assert repr(graph.block.bn_activation) == "LeakyReLU(negative_slope=0.3)"
    assert all(module.training == training for module in (graph.bn1, graph.bn1_activation, shared.bn1))
    names = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    for reverted in (graph, shared):
        assert {name: id(t) for name, t in reverted.state_dict(keep_vars=True).items()} == names
    # The model that was traced, whose layers they were, goes on as before.
    assert [type(model.bn1), type(model.block.bn)] == kinds and model.bn1.activation == "relu"
    x = torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(twin)(x)
    for reverted in (copy.deepcopy(graph), copy.deepcopy(model), bnext.fuse(copy.deepcopy(graph))):
        torch.testing.assert_close(reverted(x), expected)
        assert [*reverted.state_dict()] == [*twin.state_dict()]


def test_tools_of_torch_take_a_reverted_graph():
    model = trained(Residual()).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    graph = bnext.revert(torch.fx.symbolic_trace(model))
    from torch.ao.quantization import fuse_modules
    from torch.fx.experimental.optimization import fuse

    folded = fuse_modules(graph, [["conv1", "bn1", "bn1_activation"], ["block.0", "block.bn"]])
    assert type(folded.bn1) is type(folded.block.bn) is nn.Identity
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(graph))
    assert type(synchronised.bn1) is nn.SyncBatchNorm
    for result in (folded, synchronised, fuse(graph)):
        torch.testing.assert_close(result(x), expected, rtol=1e-4, atol=1e-5)


def test_what_a_fused_model_reverts_to_is_of_torchs_layers():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())
    twin, x = copy.deepcopy(model), torch.randn(4, 3, 5, 5)
    reverted = bnext.revert(bnext.fuse(model))
    assert [type(m) for m in reverted.children()] == [nn.Conv2d, nn.BatchNorm2d, nn.SiLU]
    torch.testing.assert_close(reverted(x), twin(x))


def hooked_graph(register, call=lambda bn, x: bn(x)):
    graph = graph_around(fused_layer(), call)
    getattr(graph.leaf, register)(lambda *args: None)
    return graph


class Again(nn.Module):
    """One layer, called thrice, in a module that has another one of the name that its activation would get."""

    def __init__(self):
        super().__init__()
        self.bn = bnext.BatchNorm2d(3, activation="silu")
        self.bn_activation = nn.Tanh()

    def forward(self, x):
        return self.bn_activation(self.bn(self.bn(self.bn(x), x)))


def test_reverting_a_graph_that_calls_a_layer_again():
    model = trained(Again()).eval()
    graph = torch.fx.symbolic_trace(model)
    graph.add_submodule("same", graph.bn)
    next(node for node in graph.graph.nodes if node.target == "bn").target = "same"
    x = torch.randn(4, 3, 5, 5)
    reverted = bnext.revert(graph)
    assert reverted.bn is reverted.same and type(reverted.bn) is nn.BatchNorm2d
    assert type(reverted.bn_activation) is nn.Tanh
    torch.testing.assert_close(reverted(x), model(x))


class Inside(nn.Module):
    """A leaf of the graph below, which calls the layer by its own code."""

    def __init__(self):
        super().__init__()
        self.bn = bnext.BatchNorm2d(3, activation="relu")

    def forward(self, x):
        return self.bn(x)


def graph_around(leaf, call):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = leaf

        def forward(self, x):
            return call(self.leaf, x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return m is leaf or super().is_leaf_module(m, name)

    outer = Outer()
    return torch.fx.GraphModule(outer, Tracer().trace(outer))


KEPT = {
    "forward hook": lambda: hooked_graph("register_forward_hook"),
    "backward hook": lambda: hooked_graph("register_full_backward_pre_hook"),
    "called by a leaf": lambda: graph_around(Inside(), lambda leaf, x: leaf(leaf.bn(x))),
    "called in another way": lambda: graph_around(fused_layer(), lambda leaf, x: leaf(input=x)),
    "sum seen": lambda: hooked_graph("register_forward_pre_hook", lambda bn, x: bn(x, x)),
}


@pytest.mark.parametrize("case", KEPT)
def test_reverting_a_graph_leaves_an_activation_that_is_seen_or_called_elsewhere(case):
    graph = KEPT[case]().eval()
    x = torch.randn(4, 3, 5, 5)
    expected = graph(x)
    reverted = bnext.revert(graph)
    kinds = [type(m) for m in reverted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kinds == [torch_layers.TorchBatchNorm2d]
    torch.testing.assert_close(reverted(x), expected)


def test_reverting_a_graph_leaves_a_hook_that_sees_the_input():
    reverted = bnext.revert(hooked_graph("register_forward_pre_hook"))
    assert type(reverted.leaf) is nn.BatchNorm2d and len(reverted.leaf._forward_pre_hooks) == 1


def test_reverting_a_graph_keeps_what_else_torch_does_not_have():
    model = nn.Sequential(bnext.BatchNorm2d(3, activation="relu"), bnext.BatchNorm2d(3, activation="relu", decay=0.9))
    bnext.freeze(model[0])
    graph = bnext.revert(torch.fx.symbolic_trace(model))
    norms = [m for m in graph.children() if isinstance(m, nn.BatchNorm2d)]
    assert [type(m) for m in norms] == [torch_layers.TorchBatchNorm2d] * 2
    assert norms[0].frozen and not norms[1].unbiased and all(m.activation is None for m in norms)


def fused_layer():
    return bnext.BatchNorm2d(3, activation="relu")


def synchronise(layer):
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0]


TOOLS = {
    "sync": lambda as_is: synchronise(as_is(fused_layer())),
    "conv": lambda as_is: nn.utils.fuse_conv_bn_eval(nn.Conv2d(3, 3, 1).eval(), as_is(fused_layer().eval())),
    "linear": lambda as_is: nn.utils.fuse_linear_bn_eval(
        nn.Linear(3, 3).eval(), as_is(bnext.BatchNorm1d(3, activation="relu").eval())
    ),
    "mkldnn": lambda as_is: mkldnn.to_mkldnn(as_is(fused_layer().eval())),
}


@pytest.mark.parametrize("as_is", [lambda layer: layer, bnext.revert], ids=["ours", "reverted"])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_of_torch_do_not_drop_the_activation(tool, as_is):
    message = r"would drop activation='relu' of (Torch)?BatchNorm.*bnext\.revert\(torch\.fx\.symbolic_trace\(model\)\)"
    with pytest.raises(RuntimeError, match=message):
        TOOLS[tool](as_is)


@pytest.mark.parametrize("as_is", [lambda layer: layer, bnext.revert], ids=["ours", "reverted"])
@pytest.mark.parametrize("own", [{"frozen": True}, {"unbiased": False}, {"ghost_batch_size": 2}], ids=str)
def test_tools_of_torch_do_not_drop_what_else_a_layer_has(own, as_is):
    layer = bnext.BatchNorm2d(3)
    vars(layer).update(own)
    layer = as_is(layer)
    ((name, value),) = own.items()
    with pytest.raises(RuntimeError, match=f"would drop {name}={value} of .*use bnext.convert_sync_batchnorm"):
        synchronise(layer)
    conv, x = nn.Conv2d(3, 3, 1).eval(), torch.randn(2, 3, 5, 5)  # evaluation has nothing of it
    layer.running_mean.normal_()
    expected = layer.eval()(conv(x))
    torch.testing.assert_close(nn.utils.fuse_conv_bn_eval(conv, layer)(x), expected, rtol=1e-4, atol=1e-5)
    assert type(synchronise(as_is(bnext.BatchNorm2d(3)))) is nn.SyncBatchNorm


@pytest.mark.parametrize("as_is", [lambda layer: layer, bnext.revert], ids=["ours", "reverted"])
@pytest.mark.parametrize(
    "children", [{"act": nn.ReLU()}, {"act": nn.GELU()}, {"drop": nn.Dropout(0.5)}, {}], ids=lambda c: "".join(c) or "-"
)
def test_tools_of_torch_do_not_drop_children(children, as_is):
    def layer():
        return as_is(bnext.nn.BatchNormAct2d(3, **children).eval())

    def fold():
        return nn.utils.fuse_conv_bn_eval(nn.Conv2d(3, 3, 1).eval(), layer())

    if not children:
        synchronise(layer()), fold()
        return
    ((name, child),) = children.items()
    for tool in (lambda: synchronise(layer()), *((fold,) if name == "act" else ())):
        with pytest.raises(RuntimeError) as caught:
            tool()
        assert f"would drop {name}={child!r} of" in str(caught.value)
    if name == "drop":  # which does nothing in evaluation
        fold()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_reverted_layer_reads_its_own_eps():
    """In every way to run it: eager, compiled, scripted, and copied."""
    layer = bnext.revert(bnext.BatchNorm2d(3, eps=0.5, activation="relu", unbiased=False)).eval()
    x = torch.randn(4, 3, 5, 5)
    expected = (x / 1.5**0.5).relu()

    def variance(x):
        return x.var((0, 2, 3), correction=0, keepdim=True)

    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for run in (layer, compiled, torch.jit.script(copy.deepcopy(layer)), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(run(x), expected)
    synchronised = bnext.revert(bnext.SyncBatchNorm(3, eps=0.5, activation="relu"))  # by torch's own forward
    torch.testing.assert_close(synchronised(x), ((x - x.mean((0, 2, 3), True)) / (variance(x) + 0.5).sqrt()).relu())
    assert layer.eps == vars(layer)["eps"] == 0.5
    layer.eps = 0.25
    torch.testing.assert_close(layer(x), (x / 1.25**0.5).relu())


def test_tools_of_torch_take_layers_without_activation():
    conv, bn = nn.Conv2d(3, 3, 1).eval(), bnext.BatchNorm2d(3)
    bn(torch.randn(4, 3, 5, 5))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(nn.utils.fuse_conv_bn_eval(conv, bn.eval())(x), bn(conv(x)), rtol=1e-4, atol=1e-5)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(bn)) is nn.SyncBatchNorm


def test_eager_quantization_says_that_it_does_not_know_the_layer():
    from torch.ao.quantization import fuse_modules

    model = nn.Sequential(nn.Conv2d(3, 3, 1), bnext.BatchNorm2d(3)).eval()
    with pytest.raises((NotImplementedError, AssertionError), match="fuser"):
        fuse_modules(model, [["0", "1"]])
    folded = fuse_modules(bnext.revert(model), [["0", "1"]])
    assert type(folded[1]) is nn.Identity


def test_tools_of_timm(library):
    timm, layers = library("timm"), library("timm.layers")
    for tool in (layers.convert_sync_batchnorm, layers.freeze_batch_norm_2d):
        with pytest.raises(RuntimeError, match="would drop activation"):
            tool(nn.Sequential(fused_layer()))
    # timm maps norm_layer by the name of its class, to a class of its own: convert the model instead.
    model = timm.create_model("mobilenetv2_035", norm_layer=bnext.BatchNorm2d)
    assert not any(isinstance(m, bnext.BatchNorm2d) for m in model.modules())
    bnext.convert(model, strict=True)
    assert any(isinstance(m, bnext.BatchNorm2d) for m in model.modules())


def test_lightning_does_not_drop_the_activation(library):
    layer_sync = library("lightning.pytorch.plugins.layer_sync")
    with pytest.raises(RuntimeError, match="would drop activation"):
        layer_sync.TorchSyncBatchNorm().apply(nn.Sequential(fused_layer()))


NETWORKS = [
    "resnet18",
    "resnet50",
    "mobilenetv2_050",
    "efficientnet_b0",
    "densenet121",
    "regnetx_002",
    "vgg11_bn",
    "repvgg_a0",
    "hrnet_w18_small",
    "dla34",
    "ghostnet_050",
    "mixnet_s",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm(name, library):
    timm = library("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double()
    model.eval()  # no dropout: batch norm alone trains
    twin = copy.deepcopy(model)
    report = Report()
    bnext.convert(model, report=report, strict=True)
    expected = [n for n, m in twin.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert list(report) == expected and len(expected) > 5
    assert list(model.state_dict()) == list(twin.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    for m in (model, twin):
        for layer in m.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.train()
    results = []
    for m in (model, twin):
        y = m(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in m.parameters()), *m.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_timm_layers_keep_activation_and_drop(library):
    layers = library("timm.layers")
    for act in (nn.ReLU, nn.SiLU, nn.GELU, None):
        for drop in (None, lambda: nn.Dropout(0.5)):
            layer = layers.BatchNormAct2d(3, act_layer=act, apply_act=act is not None, drop_layer=drop)
            twin = copy.deepcopy(layer)
            bnext.convert(layer)
            assert list(dict(layer.named_children())) == ["drop", "act"]
            x = torch.randn(4, 3, 5, 5)
            results = []
            for m in (layer, twin):
                torch.manual_seed(1)
                results.append(m(x))
            torch.testing.assert_close(*results)
            assert (layer.activation is not None) == (act in (nn.ReLU, nn.SiLU) and drop is None)
            layer.act = twin.act = nn.Tanh()  # replaced later
            torch.testing.assert_close(layer.eval()(x), twin.eval()(x))
            torch.testing.assert_close(bnext.revert(layer)(x), twin(x))


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_frozen_layers(source, library):
    if source == "torchvision":
        layer = library("torchvision").ops.FrozenBatchNorm2d(3)
    else:
        layer = library("timm.layers").FrozenBatchNormAct2d(3)
        layer.drop, layer.act = nn.Identity(), nn.ReLU()
    layer.running_mean.normal_(), layer.weight.uniform_()
    twin = copy.deepcopy(layer)
    bnext.convert(layer)
    assert type(layer) is bnext.nn.FrozenBatchNorm2d
    assert list(layer.state_dict()) == list(twin.state_dict())
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y, expected = layer.train()(x), twin(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)))
    torch.testing.assert_close(bnext.revert(layer)(x), expected)


@pytest.mark.parametrize("as_is", [lambda layer: layer, bnext.revert], ids=["ours", "reverted"])
def test_frozen_layers_load_what_was_saved_before_they_were(as_is):
    """A checkpoint of a `nn.BatchNorm2d`, whose counter a frozen layer has no use for."""
    layer = nn.BatchNorm2d(3)
    layer(torch.randn(2, 3, 4, 4))
    model, checkpoint = nn.Sequential(as_is(bnext.nn.FrozenBatchNorm2d(3))), nn.Sequential(layer).state_dict()
    model.load_state_dict(checkpoint)
    assert len(checkpoint) == 5 and list(model.state_dict()) == [name for name in checkpoint if "batches" not in name]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), layer.eval()(x))
