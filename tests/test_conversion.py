"""convert, revert, and what tools that know torch.nn's batch norm do with our layers."""

import copy
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


def fused_layer():
    return bnext.BatchNorm2d(3, activation="relu")


TOOLS = {
    "sync": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fused_layer())),
    "conv": lambda: nn.utils.fuse_conv_bn_eval(nn.Conv2d(3, 3, 1).eval(), fused_layer().eval()),
    "linear": lambda: nn.utils.fuse_linear_bn_eval(
        nn.Linear(3, 3).eval(), bnext.BatchNorm1d(3, activation="relu").eval()
    ),
    "mkldnn": lambda: mkldnn.to_mkldnn(fused_layer().eval()),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_of_torch_do_not_drop_the_activation(tool):
    with pytest.raises(RuntimeError, match=r"would drop activation='relu' of BatchNorm.*bnext\.revert"):
        TOOLS[tool]()


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
