"""bnext.fuse: what it finds, what it leaves, and that results and gradients agree."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnext


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


def assert_same_result(fused, model, *args):
    """Without a graph, since autograd refuses tensors that changed after it kept them."""
    results = []
    for m in (fused, model):
        torch.manual_seed(0)
        with torch.no_grad():
            y = m(*copy.deepcopy(args))
        results.append([y, dict(m.named_buffers())])
    torch.testing.assert_close(*results)


def fused_of(model, *args, **options):
    """What fuse makes of the model, which computes the same."""
    twin = copy.deepcopy(model)
    fused = bnext.fuse(model, **options)
    assert_same_result(fused, twin, *args)
    return fused


X = torch.linspace(-2, 3, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5).sin()


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
    ):
        for training in (True, False):
            fused_of(nn.Sequential(copy.deepcopy(layer), nn.ReLU()).train(training), X)
