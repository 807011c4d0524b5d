"""The layers as citizens of torch.nn."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import bnext

PAIRS = [(bnext.BatchNorm1d, nn.BatchNorm1d), (bnext.BatchNorm2d, nn.BatchNorm2d), (bnext.BatchNorm3d, nn.BatchNorm3d)]
pairs = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda c: c.__name__)


def batch(kind, device="cpu"):
    extra = {"BatchNorm1d": (), "BatchNorm2d": (5, 4), "BatchNorm3d": (2, 3, 4)}[kind.__name__]
    return torch.randn(6, 3, *extra, device=device)


@pairs
def test_are_torchs_own_classes(ours, theirs):
    m = ours(3)
    assert isinstance(m, theirs) and isinstance(m, nn.modules.batchnorm._BatchNorm)
    assert repr(m) == repr(theirs(3))
    assert repr(ours(3, activation="relu")) == repr(theirs(3))[:-1] + ", activation='relu')"


def test_repr_says_what_was_asked_for():
    assert repr(bnext.BatchNorm2d(3, weight=False)).endswith(", weight=False)")
    assert repr(bnext.BatchNorm2d(3, bias=False)).count("bias=False") == 1
    assert "weight" not in repr(bnext.BatchNorm2d(3, affine=False))
    for decay, momentum in ((0.9, "0.1"), (0.99, "0.01"), (0.999, "0.001"), (1, "0.0")):
        assert f"momentum={momentum}, " in repr(bnext.BatchNorm2d(3, decay=decay))


def test_keywords_that_contradict_each_other_or_are_of_a_wrong_type():
    for kind in (bnext.BatchNorm2d, bnext.SyncBatchNorm):
        for momentum in (0.3, None):
            with pytest.raises(ValueError, match=f"momentum should be left out where decay .* not {momentum}"):
                kind(3, momentum=momentum, decay=0.9)
    with pytest.raises(ValueError, match="momentum should be left out where decay"):
        bnext.LazyBatchNorm2d(momentum=0.3, decay=0.9)
    for kind in (bnext.BatchNorm2d, bnext.nn.BatchNormAct2d):
        with pytest.raises(TypeError, match="ghost_batch_size should be None or a positive integer, not True"):
            kind(3, ghost_batch_size=True)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"decay": "0.9"}, "decay should be None or a number from 0 to 1, not '0.9'"),
        ({"decay": True}, "decay should be None or a number from 0 to 1, not True"),
        ({"weight": torch.ones(3)}, r"weight should be True or False, .* not tensor\(\[1., 1., 1.\]\)"),
        ({"bias": None}, "bias should be True or False, .* not None"),
        ({"unbiased": "no"}, "unbiased should be None, True or False, not 'no'"),
    ],
    ids=["decay of a string", "decay of a bool", "weight", "bias", "unbiased"],
)
def test_keywords_of_a_wrong_type(keywords, message):
    for kind, features in ((bnext.BatchNorm2d, (3,)), (bnext.SyncBatchNorm, (3,)), (bnext.LazyBatchNorm2d, ())):
        with pytest.raises(TypeError, match=message):
            kind(*features, **keywords)


def test_numbers_of_numpy():
    """As torch.nn takes them for eps and momentum."""
    options = {"activation": "leaky_relu", "activation_param": 0.25, "ghost_batch_size": 2}
    theirs = {"activation_param": np.float32(0.25), "ghost_batch_size": np.int64(2)}
    layer, x = bnext.BatchNorm2d(3, decay=np.float64(0.9), **options | theirs), torch.randn(4, 3, 5, 5)
    plain = bnext.BatchNorm2d(3, decay=0.9, **options)
    assert repr(layer) == repr(plain) and torch.equal(layer(x), plain(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), plain(x))
    layer.activation_param = np.float32(0.5)
    torch.testing.assert_close(layer(x), bnext.BatchNorm2d(3, **options | {"activation_param": 0.5})(x))


def test_the_activation_is_found_when_the_layer_is_made():
    made = bnext.nn.BatchNormAct2d
    assert made(4, act=nn.ReLU()).activation == "relu"
    layer = made(4, act=nn.LeakyReLU(0.3))
    assert (layer.activation, layer.activation_param) == ("leaky_relu", 0.3)
    for children in ({"act": nn.GELU()}, {"act": nn.ReLU(), "drop": nn.Dropout()}, {}):
        assert made(4, **children).activation is None


def test_explain_knows_which_tensors_a_call_takes(device):
    layer = bnext.BatchNorm2d(3, device=device)
    layer.num_batches_tracked = layer.num_batches_tracked.int()
    x = torch.randn(2, 3, 4, 4, device=device)
    assert bnext.explain(layer, x)[""].way == "torch"
    for evaluating in (copy.deepcopy(layer).eval(), bnext.freeze(copy.deepcopy(layer))):
        assert bnext.explain(evaluating, x)[""].way == "kernels"
        with torch.profiler.profile() as profile:
            evaluating(x)
        assert not any("batch_norm" in e.key and e.key.startswith("aten") for e in profile.key_averages())
    layer.track_running_stats = False  # which trains without a counter
    assert bnext.explain(layer, x)[""].way == "kernels"


def test_explain_knows_frozen_layers(device):
    frozen = bnext.nn.FrozenBatchNorm2d(3).to(device)
    model = nn.Sequential(frozen, nn.ReLU())
    x = torch.randn(2, 3, 4, 4, device=device)
    assert {name: route.way for name, route in bnext.explain(model, x).items()} == {"0": "kernels"}
    found = bnext.explain(bnext.revert(model), x)
    assert found["0"].way == "torch" and "TorchFrozenBatchNorm2d: bnext.convert" in found["0"].why


@pairs
def test_constructor_is_that_of_the_installed_torch(ours, theirs):
    def parameters_of(kind):
        return {name: (p.kind, p.default) for name, p in inspect.signature(kind).parameters.items()}

    parameters, expected = parameters_of(ours), parameters_of(nn.modules.batchnorm._BatchNorm)
    own = {"activation": None, "activation_param": None, "weight": True, "bias": True}
    own |= {"decay": None, "unbiased": None, "ghost_batch_size": None}
    for name, default in own.items():
        assert parameters.pop(name) == (inspect.Parameter.KEYWORD_ONLY, default)
    expected.pop("bias", None)  # new in torch 2.12
    assert list(parameters.items()) == list(expected.items())
    m = ours(3, 1e-3, 0.2, False, True, None, torch.float64)
    assert (m.eps, m.momentum, m.affine, m.track_running_stats) == (1e-3, 0.2, False, True)
    assert m.running_mean.dtype == torch.float64
    for missing, there in (("weight", "bias"), ("bias", "weight")):
        m = ours(3, **{missing: False})
        m.reset_parameters()
        assert getattr(m, missing) is None and getattr(m, there) is not None
        assert list(m.state_dict())[0] == there
        assert m(batch(ours)).shape == batch(ours).shape
    with pytest.raises(TypeError):
        ours(3, unknown=1)


@pairs
def test_a_subclass_has_the_constructor_that_it_writes(ours, theirs):
    class Wide(ours):
        def __init__(self, factor):
            super().__init__(3 * factor, activation="relu")

    assert list(inspect.signature(Wide).parameters) == ["factor"]
    assert Wide(2).num_features == 6


@pairs
def test_state_dicts_interchange(ours, theirs):
    a, b = ours(3), theirs(3)
    for m in (a, b):
        m(batch(ours) + 1)
    assert list(a.state_dict()) == list(b.state_dict())
    restored_theirs, restored_ours = theirs(3), ours(3)
    restored_theirs.load_state_dict(a.state_dict())
    restored_ours.load_state_dict(b.state_dict())
    x = batch(ours)
    torch.testing.assert_close(restored_theirs.eval()(x), a.eval()(x))
    torch.testing.assert_close(restored_ours.eval()(x), b.eval()(x))


@pairs
def test_old_checkpoints_without_a_counter(ours, theirs):
    """Version 1 of torch's own format."""
    state = theirs(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    m = ours(3)
    m.load_state_dict(state)
    assert m.num_batches_tracked == 0


@pairs
def test_copies_behave_alike(ours, theirs):
    m = ours(3, momentum=None, activation="relu")
    m(batch(ours))
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    x = batch(ours)
    copies = [copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False)]
    expected = m(x, x)
    for c in copies:
        assert type(c) is ours and torch.equal(c(x, x), expected)
        assert all(torch.equal(a, b) for a, b in zip(c.buffers(), m.buffers(), strict=True))


@pairs
def test_eps_is_kept_where_torch_keeps_it(ours, theirs):
    m, existing, restored = ours(3, eps=0.5, activation="relu"), theirs(3, eps=0.5), ours.__new__(ours)
    existing.__class__ = ours
    restored.__setstate__(vars(m).copy())
    synchronised = bnext.convert_sync_batchnorm(nn.Sequential(m))[0]
    for layer in (m, existing, restored, copy.deepcopy(m), pickle.loads(pickle.dumps(m)), synchronised):
        assert layer.eps == vars(layer)["eps"] == 0.5
        layer.eps = 0.25
        assert layer.eps == vars(layer)["eps"] == 0.25
    assert vars(bnext.revert(m)).keys() >= vars(theirs(3)).keys() and vars(m)["eps"] == 0.25


@pairs
def test_assigned_to_an_existing_layer(ours, theirs):
    m = theirs(3)
    m.__class__ = ours
    x = batch(ours)
    torch.testing.assert_close(m(x), theirs(3)(x))


def test_data_parallel():
    """On the CPU it calls the model; on GPUs it makes such replicas, whose parameters are plain attributes."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bnext.BatchNorm2d(4, eps=0.5, activation="relu"))
    x = torch.randn(2, 3, 6, 6)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(nn.DataParallel(copy.deepcopy(model))(x), expected)
    layer = model[1]
    replica = layer._replicate_for_data_parallel()
    for key, value in (*layer.named_parameters(), *layer.named_buffers()):
        setattr(replica, key, value.clone())
    torch.testing.assert_close(replica(model[0](x)), expected)
    assert layer.num_batches_tracked == 0 and replica.eps == 0.5


def _parametrize(layer):
    parametrize.register_parametrization(layer, "weight", nn.Softplus())


def _prune(layer):
    prune.custom_from_mask(layer, "bias", torch.tensor([1, 0, 1]))


def _buffers_as_attributes(layer):
    for name, value in dict(layer.named_buffers()).items():
        delattr(layer, name)
        setattr(layer, name, value + 1)


@pytest.mark.parametrize("change", [_parametrize, _prune, _buffers_as_attributes])
@pytest.mark.parametrize("training", [False, True])
def test_parameters_and_buffers_of_another_kind(change, training):
    ours, theirs = bnext.BatchNorm2d(3).train(training), nn.BatchNorm2d(3).train(training)
    x = batch(bnext.BatchNorm2d)
    for layer in (ours, theirs):
        nn.init.constant_(layer.bias, 0.5)
        change(layer)
    torch.testing.assert_close(ours(x), theirs(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_evaluation_takes_no_counter():
    layer = bnext.BatchNorm2d(3).eval()
    del layer.num_batches_tracked
    x = batch(bnext.BatchNorm2d)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3).eval()(x))


def test_a_subclass_may_compute_what_the_forward_reads():
    def subclass(base):
        class Positive(base):
            def __init__(self, c):
                super().__init__(c, affine=False)
                self.raw = nn.Parameter(torch.full((c,), 2.0))

            @property
            def weight(self):
                return self.raw.exp()

        return Positive

    def doubled(base):
        class Doubled(base):
            def __getattr__(self, name):
                found = super().__getattr__(name)
                return 2 * found if name == "weight" else found

        return Doubled

    class Shifted(bnext.BatchNorm2d):
        @property
        def running_mean(self):
            return self._buffers["running_mean"] + 7

    x = batch(bnext.BatchNorm2d)
    torch.testing.assert_close(subclass(bnext.BatchNorm2d)(3)(x), subclass(nn.BatchNorm2d)(3)(x))
    layers = doubled(bnext.BatchNorm2d)(3), doubled(nn.BatchNorm2d)(3)
    for layer in layers:
        nn.init.ones_(layer._parameters["weight"])
    torch.testing.assert_close(layers[0](x), layers[1](x))
    torch.testing.assert_close(layers[0](x), 2 * nn.BatchNorm2d(3)(x))
    shifted = bnext.BatchNorm2d(3).eval()
    shifted.__class__ = Shifted
    torch.testing.assert_close(shifted(x), nn.BatchNorm2d(3).eval()(x - 7))
    for name, training in (("weight", True), ("running_var", False)):
        layers = bnext.BatchNorm2d(3).train(training), nn.BatchNorm2d(3).train(training)
        for layer in layers:
            vars(layer)[name] = torch.full((3,), 4.0)
        torch.testing.assert_close(layers[0](x), layers[1](x))


def test_buffers_follow_the_module(device):
    m = bnext.BatchNorm2d(3).to(device).double()
    m(torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device))
    assert {t.device.type for t in m.state_dict().values()} == {device}
    assert m.running_var.dtype == torch.float64 and m.num_batches_tracked.dtype == torch.int64


def test_forward_hooks_and_residual_by_name(device):
    m = bnext.BatchNorm2d(3, device=device)
    seen = []
    m.register_forward_hook(lambda module, args, kwargs, output: seen.append(set(kwargs)), with_kwargs=True)
    x = torch.randn(2, 3, 4, 4, device=device)
    torch.testing.assert_close(m(x, residual=x), nn.BatchNorm2d(3, device=device)(x) + x)
    assert seen == [{"residual"}]


def test_tensor_subclasses_and_modes_see_the_call(device):
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, f, types, args=(), kwargs=None):
            calls.append(f)
            return super().__torch_function__(f, types, args, kwargs or {})

    x = torch.randn(2, 3, 4, 4, device=device)
    m = bnext.BatchNorm2d(3, activation="relu", device=device)
    twin = copy.deepcopy(m)
    y = m(x.as_subclass(Logged), x)
    assert bnext.functional.batch_norm in calls and type(y) is Logged
    assert torch.equal(y.as_subclass(torch.Tensor), twin(x, x))  # nothing is lost on the way
    assert all(torch.equal(a, b) for a, b in zip(m.buffers(), twin.buffers(), strict=True))
    calls.clear()
    y = m.eval()(x, x.as_subclass(Logged))  # the residual alone says so
    assert bnext.functional.batch_norm in calls and type(y) is Logged
    assert torch.equal(y.as_subclass(torch.Tensor), twin.eval()(x, x))
    m.train(), twin.train()

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            calls.append(f)
            return f(*args, **(kwargs or {}))

    calls.clear()
    with Mode():
        m(x)
    assert bnext.functional.batch_norm in calls


ALL = [
    bnext.BatchNorm2d(3, activation="silu"),
    bnext.SyncBatchNorm(3),
    bnext.nn.BatchNormAct2d(3, act=nn.GELU()),
    bnext.nn.BatchNormAct2d(3, act=nn.SiLU(), drop=nn.Dropout()),
    bnext.nn.FrozenBatchNorm2d(3, act=nn.GELU()),
]


@pytest.mark.parametrize("reverted", [False, True])
@pytest.mark.parametrize("layer", ALL, ids=lambda layer: repr(layer).partition("\n")[0])
def test_torch_fx_traces_each_layer_once(layer, reverted):
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    if reverted:
        model = bnext.revert(model)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_torch_fx_refuses_hooks_that_would_run_twice():
    model = nn.Sequential(bnext.BatchNorm2d(3)).eval()
    model[0].register_forward_hook(lambda module, args, y: y * 2)
    with pytest.raises(RuntimeError, match="torch.fx would run the hooks of BatchNorm2d.* twice"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, name)

    traced, x = torch.fx.GraphModule(model, Tracer().trace(model)), torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(traced(x), model(x))


def test_a_replaced_activation_is_seen_by_compilers():
    layer = bnext.nn.BatchNormAct2d(3, act=nn.SiLU()).eval()
    x = torch.randn(4, 3, 5, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(x)
    layer.act = nn.GELU()
    expected = nn.Sequential(nn.BatchNorm2d(3), nn.GELU()).eval()(x)
    for run in (layer, compiled, torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(run(x), expected)


def test_fake_tensors_go_through(device):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        m = bnext.BatchNorm2d(3, activation="relu", device=device)
        x = torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last).requires_grad_()
        y = m(x, x)
        y.sum().backward()
    assert y.shape == x.grad.shape == (2, 3, 4, 4) and y.stride() == x.stride()


def test_import_neither_loads_nor_compiles():
    import subprocess
    import sys

    code = "import sys, bnext; assert 'bnext._C' not in sys.modules; print(bnext.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pairs
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"weight": False}, {"bias": False}, {"activation": "relu"}], ids=str
)
def test_lazy_layers_become_the_others(ours, theirs, options):
    lazy = getattr(bnext, f"Lazy{ours.__name__}")(momentum=0.3, **options)
    assert isinstance(lazy, getattr(nn, f"Lazy{ours.__name__}"))
    fresh = getattr(bnext, f"Lazy{ours.__name__}")(momentum=0.3, **options)
    x = batch(ours)
    y = lazy(x)
    twin = ours(3, momentum=0.3, **options)
    assert type(lazy) is ours and lazy.num_features == 3 and repr(lazy) == repr(twin)
    assert torch.equal(y, twin(x))
    assert list(lazy.state_dict()) == list(twin.state_dict())
    fresh.load_state_dict(lazy.state_dict())
    assert torch.equal(fresh.eval()(x), lazy.eval()(x))


@pytest.mark.parametrize("by_name", [False, True])
def test_lazy_layers_take_a_residual_at_once(by_name):
    lazy, x = bnext.LazyBatchNorm2d(activation="relu"), torch.randn(4, 3, 5, 5)
    y = lazy(x, residual=x) if by_name else lazy(x, x)
    torch.testing.assert_close(y, (nn.BatchNorm2d(3)(x) + x).relu())
