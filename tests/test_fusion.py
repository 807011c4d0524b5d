"""bnext.fuse: what it finds, what it leaves, and that results and gradients agree."""

import copy
import operator
import types

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import bnext
from bnext.graph_values import _FRESH
from bnext.recomputation import is_recomputed


class Chain(nn.Module):
    """bn, then f of its result and the input."""

    def __init__(self, f, act=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.act = act
        self.f = f

    def forward(self, x):
        return self.f(self, self.bn(self.conv(x)), x)


def added_in_place(m, y, x):
    y += x
    return m.act(y)


ACTIVATIONS = {
    "module": (lambda m, y, x: m.act(y), nn.ReLU(inplace=True), "relu"),
    "silu": (lambda m, y, x: m.act(y), nn.SiLU(), "silu"),
    "slope": (lambda m, y, x: m.act(y), nn.LeakyReLU(0.3), "leaky_relu"),
    "function": (lambda m, y, x: F.relu(y), None, "relu"),
    "function in place": (lambda m, y, x: F.relu(y, inplace=True), None, "relu"),
    "leaky function": (lambda m, y, x: F.leaky_relu(y, 0.3), None, "leaky_relu"),
    "leaky keyword": (lambda m, y, x: F.leaky_relu(y, negative_slope=0.3), None, "leaky_relu"),
    "torch.relu_": (lambda m, y, x: torch.relu_(y), None, "relu"),
    "method": (lambda m, y, x: y.relu(), None, "relu"),
    "method in place": (lambda m, y, x: y.sigmoid_(), None, "sigmoid"),
}
SUMS = {
    "y + x": (lambda m, y, x: m.act(y + x), nn.ReLU(), "relu"),
    "x + y": (lambda m, y, x: m.act(x + y), nn.ReLU(), "relu"),
    "y += x": (added_in_place, nn.ReLU(inplace=True), "relu"),
    "torch.add": (lambda m, y, x: F.hardswish(torch.add(x, y)), None, "hardswish"),
    "add_": (lambda m, y, x: torch.tanh(y.add_(x)), None, "tanh"),
}


def added_to_the_input(m, y, x):
    x = x * 1
    z = F.relu(x.add_(y))
    return z + x  # which has changed


LEFT = {
    "added to the other": (added_to_the_input, None, None),
    "used twice": (lambda m, y, x: F.relu(y) + y, None, None),
    "scaled sum": (lambda m, y, x: F.relu(torch.add(y, x, alpha=2)), None, None),
    "a number": (lambda m, y, x: F.relu(y + 1.0), None, None),
    "unknown": (lambda m, y, x: F.gelu(y), None, None),
    "sum used twice": (lambda m, y, x: (lambda z: F.relu(z) + z)(y + x), None, None),
    "operand used twice": (lambda m, y, x: F.relu(y + x) + y, None, None),
    "called twice": (lambda m, y, x: F.relu(m.bn(y)), None, None),
}


def assert_same_step(ours, theirs, x, names=True):
    results = []
    for m in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [*ACTIVATIONS, *SUMS, *LEFT])
def test_patterns(case, training):
    f, act, expected = {**ACTIVATIONS, **SUMS, **LEFT}[case]
    torch.manual_seed(0)
    model = Chain(f, act).double().train(training)
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model)
    assert fused.bn.activation == expected and fused.training == training
    calls = [n for n in fused.graph.nodes if n.op == "call_module" and n.target == "bn"]
    if expected is not None:
        assert len(calls[0].args) == 1 + (case in SUMS)
        assert len(list(fused.graph.nodes)) == 4  # x, conv, bn, output
    assert_same_step(fused, twin, torch.randn(4, 3, 5, 5, dtype=torch.float64))


class Downsampled(nn.Module):
    """Two batch norms meet in a sum: the one that comes later takes it in."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn1(x) + self.bn2(x * 2))


def test_a_sum_of_two_batch_norms():
    model = Downsampled().double()
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model)
    assert (fused.bn1.activation, fused.bn2.activation) == (None, "relu")
    assert_same_step(fused, twin, torch.randn(4, 3, 5, 5, dtype=torch.float64))


class Block(nn.Module):
    """f of the model and its arguments."""

    def __init__(self, f):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.act, self.in_place = nn.SiLU(), nn.ReLU(inplace=True)
        self.f = f

    def forward(self, x):
        return self.f(self, x)


def assert_same_result(fused, model, *args):
    """Without a graph, since autograd refuses tensors that changed after it kept them."""
    results = []
    for m in (fused, model):
        torch.manual_seed(0)
        with torch.no_grad():
            y = m(*copy.deepcopy(args))
        results.append([y, m.state_dict()])
    torch.testing.assert_close(*results)


def fused_of(model, *args, **options):
    """What fuse makes of the model, which computes the same."""
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model, **options)
    assert_same_result(fused, twin, *args)
    return fused


X = torch.linspace(-2, 3, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5).sin()


@fx.wrap
def unknown_function(x):
    return x.mul_(2)


class Unknown(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class UnknownAreLeaves(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Unknown) or super().is_leaf_module(m, module_qualified_name)


def doubled(module, args):
    args[0].mul_(2)


def block_with_writers(f):
    model = Block(f)
    model.identity, model.unknown, model.hooked = nn.Identity(), Unknown(), nn.Conv2d(3, 3, 1)
    model.hooked.register_forward_pre_hook(doubled)
    model.replaced = nn.Conv2d(3, 3, 1)
    model.replaced.forward = model.unknown.forward
    return model


# what changes t; x is no part of it
WRITES = {
    "layer": lambda m, t, x: m.in_place(t),
    "method": lambda m, t, x: t.mul_(2),
    "function": lambda m, t, x: torch.relu_(t),
    "keyword": lambda m, t, x: F.elu(t, inplace=True),
    "position": lambda m, t, x: F.elu(t, 1.0, True),
    "out": lambda m, t, x: torch.mul(x, 2, out=t),
    "operator of torch": lambda m, t, x: torch.ops.aten.relu_(t),
    "view": lambda m, t, x: t.flatten(2).mul_(2),
    "element of a tuple": lambda m, t, x: t.chunk(2)[1].mul_(2),
    "element of a sum of tuples": lambda m, t, x: (t.chunk(2) + x.chunk(2))[1].mul_(2),
    "identity": lambda m, t, x: m.identity(t).mul_(2),
    "unknown function": lambda m, t, x: unknown_function(t),
    "unknown layer": lambda m, t, x: m.unknown(t),
    "layer with a hook": lambda m, t, x: m.hooked(t),
    "layer with a forward set on it": lambda m, t, x: m.replaced(t),
}


def input_changes(write):
    def f(m, x):
        t = m.conv(x)
        y = m.bn(t)
        write(m, t, x)
        return m.act(y) + t

    return f


def input_changes_before_a_sum(write):
    def f(m, x):
        t = m.conv(x)
        y = m.bn(t)
        write(m, t, x)
        return m.act(y + m.other(x)) + t

    return f


def residual_changes(write):
    def f(m, x):
        t = m.conv(x)
        y = m.bn(m.other(x)) + t
        write(m, t, x)
        return m.act(y) + t

    return f


@pytest.mark.parametrize("what", [input_changes, input_changes_before_a_sum, residual_changes])
@pytest.mark.parametrize("write", WRITES)
def test_no_call_moves_past_a_write_into_what_it_reads(write, what):
    model = block_with_writers(what(WRITES[write]))
    assert fused_of(model, X, tracer=UnknownAreLeaves()).bn.activation is None


@pytest.mark.parametrize("write", WRITES)
def test_a_call_moves_past_a_write_into_another_tensor(write):
    def f(m, x):
        t = m.conv(x)
        y = m.bn(m.other(x)) + F.relu(t)
        WRITES[write](m, t, F.relu(t))
        return m.act(y) + t

    assert fused_of(block_with_writers(f), X, tracer=UnknownAreLeaves()).bn.activation == "silu"


def test_no_call_moves_past_a_write_by_another_name():
    def result_of_a_write(m, x):
        t = m.conv(x)
        same = F.relu(t, inplace=True)
        y = m.bn(t)
        same.mul_(2)
        return m.act(y) + t

    def view_of_what_is_fused(m, x):
        t = m.act(m.first(x))
        view = t.flatten(2)
        y = m.bn(t)
        view.relu_()
        return m.act(y) + t

    assert fused_of(Block(result_of_a_write), X).bn.activation is None
    model = Block(view_of_what_is_fused)
    model.first = nn.BatchNorm2d(3)
    fused = fused_of(model, X)
    assert (fused.first.activation, fused.bn.activation) == ("silu", None)


def test_operators_in_place_write():
    """A graph may have them, though the tracer of torch 2.13 and 2.14 records `t += 2` as `t + 2`."""

    class InPlace(fx.Tracer):
        def trace(self, root, concrete_args=None):
            graph = super().trace(root, concrete_args)
            for node in graph.nodes:
                if node.op == "call_function" and node.args[1:] == (2,):
                    node.target = operator.iadd
            return graph

    assert bnext.fuse(Block(input_changes(lambda m, t, x: t + 2)), tracer=InPlace()).bn.activation is None
    assert bnext.fuse(Block(input_changes(lambda m, t, x: t + 3)), tracer=InPlace()).bn.activation == "silu"


def test_a_sum_in_place_with_the_input():
    assert fused_of(Block(lambda m, x: m.act(m.bn(x).add_(x))), X).bn.activation == "silu"


def test_the_second_of_two_activations_stays():
    fused = fused_of(Block(lambda m, x: m.act(m.act(m.bn(x)))), X)
    assert fused.bn.activation == "silu" and [n.target for n in fused.graph.nodes] == ["x", "bn", "act", "output"]


def test_a_layer_with_two_names():
    class LastName(fx.Tracer):
        def path_of_module(self, mod):
            return [name for name, m in self.root.named_modules(remove_duplicate=False) if m is mod][-1]

    model = Block(lambda m, x: m.act(m.bn(x)))
    model.same = model.bn
    expected = model(X)
    fused = bnext.fuse(model, tracer=LastName())
    assert fused.same.activation == "silu"
    torch.testing.assert_close(fused(X), expected)


def test_a_residual_may_change_before_the_sum():
    """As in a branch that ends in an activation in place, beside the batch norm."""

    def f(m, x):
        y = m.bn(m.conv(x))
        return m.act(y + F.elu(m.other(x), inplace=True))

    assert fused_of(Block(f), X).bn.activation == "silu"


def test_arguments_may_be_the_same_tensor():
    class Two(Block):
        def forward(self, x, z):
            y = self.bn(x)
            z.relu_()
            return self.act(y)

    model = Two(None)
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model)
    x, z = X.clone(), X.clone()
    torch.testing.assert_close(fused(x, x), twin(z, z))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked", "weight", "bias"])
def test_a_layer_whose_tensors_the_graph_reads_is_left(name):
    def f(m, x):
        y = m.bn(x)
        read = torch.add(getattr(m.bn, name), x.mean())
        return m.act(y) + read.sum()

    assert fused_of(Block(f), X).bn.activation is None


def test_a_layer_that_something_else_runs_is_left():
    class Holder(Unknown):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    for options in ({}, {"affine": False, "track_running_stats": False}):
        model = Block(lambda m, x: m.act(m.bn(m.conv(x))) + m.holder(x))
        model.bn = nn.BatchNorm2d(3, **options)
        model.holder = Holder(model.bn)
        assert fused_of(model, X, tracer=UnknownAreLeaves()).bn.activation is None
    model = Block(lambda m, x: m.act(m.bn(m.conv(x)) + m.twin(x)))  # which updates the same statistics
    model.twin = nn.BatchNorm2d(3)
    model.twin.running_mean = model.bn.running_mean
    fused = fused_of(model, X)
    assert fused.bn.activation is None and fused.twin.activation is None


def test_what_returns_new_memory():
    x, one = torch.ones(1, 2, 1, 1), torch.ones(1)
    calls = [
        *((f, (x, x)) for f in (torch.add, torch.sub, torch.mul, torch.div, torch.matmul)),
        *((f, (x,)) for f in (torch.neg, torch.clone, torch.mean, torch.sum, torch.relu, torch.sigmoid, torch.tanh)),
        *((f, (x,)) for f in (F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.elu, F.hardswish, F.hardsigmoid)),
        *((f, ([x],)) for f in (torch.cat, torch.stack)),
        *((f, (x, 1)) for f in (F.softmax, torch.mean, torch.sum, F.max_pool2d, F.avg_pool2d)),
        *((f, (x, 1)) for f in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)),
        (F.linear, (one, torch.ones(1, 1))),
        *((f, (x, torch.ones(2, 2, 1, 1))) for f in (F.conv2d, F.conv_transpose2d)),
        (F.batch_norm, (x, torch.zeros(2), torch.ones(2))),
        (F.layer_norm, (x, (1,))),
        (F.group_norm, (x.expand(2, 2, 1, 1), 1)),
    ]
    for f, args in calls:
        assert _FRESH.fullmatch(f.__name__), f
        given = args[0][0] if isinstance(args[0], list) else args[0]
        assert f(*args).untyped_storage().data_ptr() != given.untyped_storage().data_ptr(), f


def test_a_failure_leaves_the_model_as_it_computes(monkeypatch):
    model = Block(lambda m, x: m.act(m.bn(m.conv(x))))
    twin = copy.deepcopy(model)

    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(fx, "GraphModule", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        bnext.fuse(model)
    assert_same_result(model, twin, X)


@fx.wrap
def scale_of(x):
    return 0.5


class Residual(Block):
    """act(bn(conv(x)) + f(x, a))"""

    def forward(self, x, a):
        return self.act(self.bn(self.conv(x)) + self.f(x, a))


class Annotated(Residual):
    def forward(self, x, a: float):
        return super().forward(x, a)


class MaybeNumber(Residual):
    def forward(self, x, a: torch.Tensor | float):
        return super().forward(x, a)


class Defaulted(Residual):
    def forward(self, x, a: torch.Tensor = 0.5):
        return super().forward(x, a)


class Tensors(Residual):
    def forward(self, x, a: torch.Tensor):
        return super().forward(x, a)


class NamedTensors(Residual):
    def forward(self, x, a: "torch.Tensor | None" = None):
        return super().forward(x, a)


SCALE = types.SimpleNamespace(scale=0.5, image=X)
NUMBERS = {
    "argument": (Residual, lambda x, a: a, 0.5),
    "annotated": (Annotated, lambda x, a: a, 0.5),
    "annotated as both": (MaybeNumber, lambda x, a: a, 0.5),
    "default": (Defaulted, lambda x, a: a, 0.5),
    "of arithmetic": (Residual, lambda x, a: 2 * a + 1, 0.5),
    "element": (Residual, lambda x, a: a[1], (X, 0.5)),
    "value": (Residual, lambda x, a: a.get("scale"), {"scale": 0.5}),
    "value of what has methods": (Residual, lambda x, a: (a.keys(), a["scale"])[1], {"scale": 0.5}),
    "factor": (Residual, lambda x, a: (x.mul(a), a)[1], 0.5),
    "attribute": (Residual, lambda x, a: a.scale, SCALE),
    "size": (Residual, lambda x, a: x.size(0), None),
    "shape": (Residual, lambda x, a: x.shape[2] // 2 + 1, None),
    "ndim": (Residual, lambda x, a: x.ndim, None),
    "element size": (Residual, lambda x, a: x.element_size(), None),
    "question": (Residual, lambda x, a: torch.is_floating_point(x), None),
    "item": (Residual, lambda x, a: x.mean().item(), None),
    "numel": (Residual, lambda x, a: torch.numel(x), None),
    "function": (Residual, lambda x, a: scale_of(x), None),
}
TENSORS = {
    "annotated": (Tensors, lambda x, a: a, X),
    "annotated by a string": (NamedTensors, lambda x, a: a, X),
    "of arithmetic": (Tensors, lambda x, a: 2 * a + 1, X),
    "given to a layer": (Residual, lambda x, a: x, None),
    "given to a function": (Residual, lambda x, a: (F.relu(a), a)[1], X),
    "given to a method": (Residual, lambda x, a: (a.relu(), a)[1], X),
    "of a size": (Residual, lambda x, a: x * x.size(0), None),
    "transposed": (Residual, lambda x, a: x.mT, None),
    "chunk": (Residual, lambda x, a: x.chunk(1)[0], None),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_is_no_residual(case):
    kind, f, a = NUMBERS[case]
    assert fused_of(kind(f), X, a).bn.activation is None


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_is_a_residual(case):
    kind, f, a = TENSORS[case]
    assert fused_of(kind(f), X, a).bn.activation == "silu"


def test_a_sum_with_itself_is_left():
    def f(m, x):
        y = m.bn(x)
        return m.act(y + y)

    assert fused_of(Block(f), X).bn.activation is None


# activations that follow a batch norm; those that have a sum between; batch norms
NETWORKS = {
    "resnet18": (17, 8, 20),
    "resnet50": (49, 16, 53),
    "mobilenet_v2": (35, 0, 52),
    "efficientnet_b0": (33, 0, 49),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_site_of_a_network_is_found(name, library):
    torchvision = library("torchvision")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).double().eval()
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model)
    norms = [m for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    nodes = [
        n
        for n in fused.graph.nodes
        if n.op == "call_module" and isinstance(fused.get_submodule(n.target), nn.BatchNorm2d)
    ]
    found = sum(m.activation is not None for m in norms), sum(len(n.args) == 2 for n in nodes), len(norms)
    assert found == NETWORKS[name]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fused(x), twin(x))
    for m in (fused, twin):
        for layer in m.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
    assert_same_step(fused, twin, x)


def test_every_module_keeps_its_mode():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()), nn.BatchNorm2d(3))
    model[0].eval()  # a backbone
    model[0][2].train()
    modes = {name: module.training for name, module in model.named_modules()}
    fused = bnext.fuse(model)
    assert fused.get_submodule("0.1").activation == "relu"
    for name, module in fused.named_modules():
        assert module.training == modes[name], name
    assert {name: module.training for name, module in model.named_modules()} == modes
    before = fused.get_submodule("0.1").running_mean.clone()
    fused(torch.randn(4, 3, 5, 5))
    assert torch.equal(fused.get_submodule("0.1").running_mean, before)


HOOKS = {
    "register_forward_hook": (lambda *args, **kwargs: None, {"with_kwargs": True, "always_call": True}),
    "register_full_backward_hook": (lambda *args: None, {}),
    "register_full_backward_pre_hook": (lambda *args: None, {}),
    "register_backward_hook": (lambda *args: None, {}),
    "register_forward_pre_hook": (lambda *args: None, {}),
}


@pytest.mark.parametrize("converted", [False, True], ids=["", "converted"])
@pytest.mark.parametrize("summed", [False, True], ids=["", "sum"])
@pytest.mark.parametrize("of", ["bn", "act"])
@pytest.mark.parametrize("register", HOOKS)
def test_what_a_hook_sees_is_not_fused(register, of, summed, converted):
    hook, options = HOOKS[register]
    model = Chain(lambda m, y, x: m.act(y + x if summed else y), nn.ReLU())
    if converted:
        bnext.convert(model)
    getattr(getattr(model, of), register)(hook, **options)
    # What comes into a batch norm stays the same, unless a residual joins it.
    fusible = (register, of, summed) == ("register_forward_pre_hook", "bn", False)
    assert (bnext.fuse(model).bn.activation == "relu") == fusible


def test_hooks_of_state_dicts_see_no_tensor_that_fusion_changes():
    model = Chain(lambda m, y, x: m.act(y), nn.ReLU())
    model.bn.register_state_dict_post_hook(lambda *args: None)
    model.bn.register_load_state_dict_pre_hook(lambda *args: None)
    assert bnext.fuse(model).bn.activation == "relu"


def test_a_forward_set_on_a_layer_goes_on_running():
    for kind in (nn.BatchNorm2d, bnext.BatchNorm2d):
        model = Chain(lambda m, y, x: m.act(y + x), nn.ReLU())
        model.bn, calls = kind(3), []
        forward = model.bn.forward
        model.bn.forward = lambda x, forward=forward, calls=calls: calls.append(1) or forward(x)
        fused = bnext.fuse(model)
        assert type(fused.bn) is kind and getattr(fused.bn, "activation", None) is None
        calls.clear()
        fused(torch.randn(4, 3, 5, 5))
        assert calls == [1]


def test_a_hook_goes_on_seeing_the_normalized_values():
    model = Chain(lambda m, y, x: m.act(y), nn.ReLU())
    seen = []
    model.bn.register_forward_hook(lambda module, args, output: seen.append(output.min().item()))
    fused = bnext.fuse(model)
    assert fused.bn.activation is None
    fused(torch.randn(4, 3, 5, 5))
    assert seen[0] < 0


def test_a_hook_of_our_layers_runs_once_a_call():
    for layer in (
        bnext.BatchNorm2d(3),
        bnext.nn.FrozenBatchNorm2d(3),
        bnext.revert(bnext.BatchNorm2d(3, activation="relu")),
        bnext.revert(bnext.nn.FrozenBatchNorm2d(3)),
    ):
        model, calls = nn.Sequential(layer, nn.SiLU()), []
        layer.register_forward_hook(lambda module, args, output, calls=calls: calls.append(type(output)) or output * 2)
        fused = fused_of(model, X)
        assert calls == [torch.Tensor] * 2  # of fused and of the model
        assert [n.target for n in fused.graph.nodes][1:] == ["0", "1", "output"]


class Doubled(bnext.BatchNorm2d):
    def forward(self, input, residual=None):
        return 2 * super().forward(input, residual)


class DoubledFrozen(bnext.nn.FrozenBatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_our_layers_do_behind_the_kernels_is_done_once():
    layers = bnext.nn
    dropped = {"act": nn.SiLU(), "drop": nn.Dropout(0.5)}
    for layer in (
        layers.BatchNormAct2d(3, act=nn.GELU()),
        layers.BatchNormAct2d(3, **dropped),
        layers.FrozenBatchNorm2d(3, act=nn.GELU()),
        bnext.revert(layers.BatchNormAct2d(3, **dropped)),
        bnext.revert(layers.FrozenBatchNorm2d(3, **dropped)),
        Doubled(3),
        DoubledFrozen(3),
    ):
        for training in (True, False):
            fused = fused_of(nn.Sequential(copy.deepcopy(layer), nn.ReLU()).train(training), X)
            assert [n.target for n in fused.graph.nodes][1] == "0"  # a call


# ---- batch norms of other classes


class OwnForward(nn.BatchNorm2d):
    """What convert leaves: its own forward reads its mode."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return F.gelu(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps))


class FrozenLikeTorchvision(nn.Module):
    """What convert knows without torchvision."""

    def __init__(self, features):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(features) + 0.5)

    def forward(self, x):
        weight, bias, mean, var = (b.reshape(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


FrozenLikeTorchvision.__module__, FrozenLikeTorchvision.__name__ = "torchvision.ops.misc", "FrozenBatchNorm2d"


class OwnFrozenForward(FrozenLikeTorchvision):
    def forward(self, x):
        return 2 * super().forward(x)


def assert_same_in_both_modes(fused, model, *args):
    """Whatever the mode was when `model` was fused."""
    for training in (True, False, True):
        assert_same_result(fused.train(training), model.train(training), *args)


OTHERS = {
    OwnForward: OwnForward,
    FrozenLikeTorchvision: bnext.nn.FrozenBatchNorm2d,
    OwnFrozenForward: OwnFrozenForward,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracer", [None, UnknownAreLeaves()], ids=["", "own tracer"])
@pytest.mark.parametrize("kind", OTHERS)
def test_batch_norms_of_other_classes_are_calls(kind, tracer, training):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), kind(3), nn.ReLU()).train(training)
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model, tracer=tracer)
    assert type(fused.get_submodule("1")) is OTHERS[kind]
    assert [n.target for n in fused.graph.nodes][1:] == ["0", "1", "2", "output"]
    assert list(fused.state_dict()) == list(twin.state_dict())
    assert_same_in_both_modes(fused, twin, X)


def test_the_layers_of_timm_are_found(library):
    timm = library("timm")
    model = timm.create_model("efficientnet_b0", num_classes=5, drop_path_rate=0.2).double()
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model)
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49 and sum(m.activation is not None for m in norms) == 33
    assert all(type(m).__module__ == "bnext.nn" for m in norms)
    assert list(fused.state_dict()) == list(twin.state_dict())
    assert_same_in_both_modes(fused, twin, torch.randn(2, 3, 64, 64, dtype=torch.float64))


# ---- modes


class DropPath(nn.Module):
    def forward(self, x):
        return x * torch.bernoulli(torch.full_like(x[:, :1], 0.5)) if self.training else x


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class ConstantOfMode(nn.Module):
    def forward(self, x):
        return x * torch.tensor(2.0 if self.training else 3.0)


class Relu(nn.Module):
    """The same in both modes."""

    def forward(self, x, y):
        return F.relu(x + y)


class DependsOnMode(nn.Module):
    """Batch norms around f, each with its own of these modules."""

    def __init__(self, kind):
        super().__init__()
        self.bn, self.bn2, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), Relu()
        self.one, self.other = kind(), nn.Sequential(kind(), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        y = F.relu(self.bn(x))
        return self.relu(self.bn2(self.other(self.one(y))), y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [DropPath, FunctionalDropout, ConstantOfMode])
def test_what_depends_on_the_mode_goes_on_doing_so(kind, training):
    model = DependsOnMode(kind).train(training)
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model)
    assert (fused.bn.activation, fused.bn2.activation) == ("relu", "relu")
    assert [n.target for n in fused.graph.nodes] == ["x", "bn", "one", "other.0", "other.1", "bn2", "output"]
    assert_same_in_both_modes(fused, twin, X)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return F.dropout(self.bn(x), 0.5, self.training)


class Skipping(Dropping):
    def forward(self, x):
        y = self.bn(x)
        return self.conv(y) if self.training else y


class ScaledByMode(Dropping):
    def forward(self, x):
        return self.bn(x) * torch.tensor(2.0 if self.training else 3.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Dropping, Skipping, ScaledByMode])
def test_what_holds_batch_norms_has_to_be_the_same_in_both_modes(kind, training):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(kind(), nn.ReLU())).train(training)
    model[0].train()  # modes differ
    modes = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match="model should compute the same in training and in evaluation") as raised:
        bnext.fuse(model)
    assert " of 1.0 in " in str(raised.value)
    assert [m.training for m in model.modules()] == modes
    assert type(model[1][0].bn) is nn.BatchNorm2d and not any("constant" in name for name in vars(model))


# ---- names and states


class WithMore(nn.Module):
    """More than its forward uses."""

    def __init__(self):
        super().__init__()
        self.late = nn.Conv2d(3, 3, 1)
        self.unused = nn.Parameter(torch.ones(3))
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        self.same = self.bn
        self.scale, self.missing = nn.Parameter(torch.ones(1)), None
        self.register_parameter("none", None)
        self.register_buffer("step", torch.zeros(()))
        self.register_buffer("offset", torch.ones(1), persistent=False)
        self.plain = torch.ones(1)
        self.aux = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())

    def forward(self, x):
        y = self.act(self.bn(x)) * self.scale + self.offset + self.plain + torch.tensor(2.0)
        return self.late(y)


@pytest.mark.parametrize("nested", [False, True])
def test_names_and_states_stay(nested):
    model = nn.Sequential(WithMore(), WithMore()) if nested else WithMore()
    if nested:
        model[1].again = model[0]
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model)
    assert list(fused.state_dict()) == list(twin.state_dict())
    fused.load_state_dict(twin.state_dict())
    for names in ("named_parameters", "named_modules"):
        expected = [name for name, _ in getattr(twin, names)(remove_duplicate=False)]
        found = [name for name, _ in getattr(fused, names)(remove_duplicate=False)]
        assert found == [name for name in expected if not name.endswith("act")]  # which is in the batch norm
    assert_same_in_both_modes(fused, twin, X)


def test_what_the_graph_does_not_use_stays_what_it_is():
    model = WithMore()
    fused = bnext.fuse(model)
    assert fused.aux is model.aux and fused.unused is model.unused and fused.same is fused.bn
    assert not hasattr(fused, "act")
    model = Block(lambda m, x: m.act(m.bn(m.act(x))))
    assert bnext.fuse(model).act is model.act  # the graph calls it elsewhere


def test_a_container_with_two_names_stays_one():
    model = Block(lambda m, x: m.act(m.first(x)))
    model.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model.second = model.first
    fused = fused_of(model, X)
    assert fused.first is fused.second and fused.get_submodule("second.1").activation == "silu"


# ---- hooks


CONTAINER_HOOKS = {
    "register_forward_pre_hook": "a forward pre-hook",
    "register_forward_hook": "a forward hook",
    "register_full_backward_pre_hook": "a backward pre-hook",
    "register_full_backward_hook": "a backward hook",
    "register_state_dict_pre_hook": "a pre-hook of state_dict",
    "register_state_dict_post_hook": "a hook of state_dict",
    "register_load_state_dict_pre_hook": "a pre-hook of load_state_dict",
    "register_load_state_dict_post_hook": "a post-hook of load_state_dict",
}


@pytest.mark.parametrize("tracer", [None, UnknownAreLeaves()], ids=["", "own tracer"])
@pytest.mark.parametrize("where", ["model", "0"])
@pytest.mark.parametrize("register", CONTAINER_HOOKS)
def test_a_hook_that_would_be_lost_is_refused(register, where, tracer):
    model, calls = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU()), []
    getattr(model if where == "model" else model[0], register)(lambda *args: calls.append(args))
    message = f"{where} should have nothing that its graph would drop, but this Sequential has "
    with pytest.raises(ValueError, match=message + CONTAINER_HOOKS[register]):
        bnext.fuse(model, tracer=tracer)
    assert type(model[0][1]) is nn.BatchNorm2d and calls == []


class Frozen(nn.Sequential):
    def train(self, mode=True):
        return super().train(False)


class WithExtraState(nn.Sequential):
    def get_extra_state(self):
        return 1

    def set_extra_state(self, state):
        pass


def test_what_a_class_does_besides_its_forward_is_refused():
    for kind, what in ((Frozen, "its own train"), (WithExtraState, "its own get_extra_state")):
        for model in (kind(nn.BatchNorm2d(3)), nn.Sequential(kind(nn.BatchNorm2d(3)))):
            with pytest.raises(ValueError, match=f"this {kind.__name__} has {what}"):
                bnext.fuse(model)
        fused_of(nn.Sequential(nn.BatchNorm2d(3), kind(nn.ReLU())), X)  # a call
    model = Block(lambda m, x: m.held.first(x))
    model.held = type("Held", (nn.ModuleDict,), {"train": Frozen.train})({"first": nn.BatchNorm2d(3)})
    with pytest.raises(ValueError, match="held should have .* this Held has its own train"):
        bnext.fuse(model)
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="this Sequential has a forward set on it"):
        bnext.fuse(model)


def test_a_hook_of_what_holds_no_batch_norm_goes_on_running():
    model, seen = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh())), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(type(output)) or output * 2)
    fused_of(model, X)
    assert seen == [torch.Tensor] * 2


def test_recompute_goes_on():
    model = bnext.recompute(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)))
    assert is_recomputed(bnext.fuse(model))
    assert not is_recomputed(bnext.fuse(bnext.recompute(model, False)))
    bnext.recompute(model)
    with pytest.raises(ValueError, match="0 should have .* hooks of bnext.recompute, which takes what fuse returns"):
        bnext.fuse(nn.Sequential(model))
