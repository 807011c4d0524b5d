"""torch.func and forward mode: the Function in Python against the C++ one, and against differences."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import bnext
from bnext.activation import NAMES
from bnext.functional import batch_norm


def problem(device, seed=0, shape=(3, 2, 2, 2)):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    c = shape[1]
    return draw(*shape), draw(c), draw(c), draw(*shape)


def function(activation=None, training=True, residual=True, affine=True):
    param = 0.3 if activation == "leaky_relu" else None

    def f(x, weight=None, bias=None, r=None):
        statistics = (None, None)
        if not training:
            c = x.shape[1]
            mean = torch.linspace(-1, 1, c, dtype=x.dtype, device=x.device)
            statistics = (mean, mean.square() + 0.5)
        return batch_norm(
            x,
            *statistics,
            weight if affine else None,
            bias if affine else None,
            training,
            activation=activation,
            activation_param=param,
            residual=r if residual else None,
        )

    return f


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck_of_every_mode(device, activation, training, residual):
    inputs = problem(device)
    inputs = inputs if residual else inputs[:3]
    f = function(activation, training, residual)
    torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("activation", NAMES)
def test_gradients_are_those_of_the_other_function(device, activation):
    """The same kernels, so the same bits."""
    inputs = problem(device, shape=(4, 3, 5, 6))
    f = function(activation)
    dy = torch.randn(4, 3, 5, 6, dtype=torch.float64, device=device)
    expected = torch.autograd.grad(f(*inputs), inputs, dy)
    _, pull_back = vjp(f, *inputs)
    for ours, theirs in zip(pull_back(dy), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_jvp_agrees_with_torch(device, dtype):
    x, weight, bias, residual = (t.detach().to(dtype) for t in problem(device, shape=(4, 3, 5)))
    tangents = tuple(torch.randn_like(t) for t in (x, weight, bias, residual))

    def theirs(x, weight, bias, r):
        return nn.functional.silu(
            nn.functional.batch_norm(x.double(), None, None, weight.double(), bias.double(), True) + r.double()
        )

    y, moved = jvp(function("silu"), (x, weight, bias, residual), tangents)
    y64, moved64 = jvp(theirs, (x, weight, bias, residual), tangents)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y64, rtol=2 * eps, atol=8 * eps)
    torch.testing.assert_close(moved.double(), moved64.double(), rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("in_dims", [(0, None, None, 0), (1, 0, 0, 2), (None, 0, 0, None), (2, None, 1, None)], ids=str)
def test_vmap_is_a_loop(device, in_dims):
    tensors = []
    for t, dim in zip(problem(device, shape=(4, 3, 5)), in_dims, strict=True):
        t = t.detach()
        tensors.append(t if dim is None else torch.stack([t * (1 + i) + i for i in range(3)], dim))
    f = function("silu")
    loop = [f(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True))) for i in range(3)]
    torch.testing.assert_close(vmap(f, in_dims)(*tensors), torch.stack(loop), rtol=1e-12, atol=1e-12)


def test_vmap_inside_vmap(device):
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, device=device)
    f = function()
    loop = torch.stack([torch.stack([f(b) for b in a]) for a in x])
    torch.testing.assert_close(vmap(vmap(f))(x), loop, rtol=1e-12, atol=1e-12)


def test_jacobians_and_hessian(device):
    x, weight, bias, residual = (t.detach() for t in problem(device))
    f = function("tanh")
    torch.testing.assert_close(jacfwd(f)(x, weight, bias, residual), jacrev(f)(x, weight, bias, residual))

    def loss(f):
        return lambda x: f(x, weight, bias, residual).pow(3).sum()

    def theirs(x, weight, bias, r):
        return torch.tanh(nn.functional.batch_norm(x, None, None, weight, bias, True) + r)

    torch.testing.assert_close(hessian(loss(f))(x), hessian(loss(theirs))(x), rtol=1e-8, atol=1e-8)
    _, push = linearize(lambda x: f(x, weight, bias, residual), x)
    torch.testing.assert_close(push(x), jvp(lambda x: f(x, weight, bias, residual), (x,), (x,))[1])


def test_per_sample_gradients_in_evaluation(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bnext.BatchNorm2d(4, activation="relu")).to(device, torch.float64).eval()
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64, device=device)

    def loss(parameters, x):
        return functional_call(model, parameters, (x.unsqueeze(0),)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(5):
        alone = grad(loss)(parameters, x[i])
        for name, g in alone.items():
            torch.testing.assert_close(together[name][i], g, rtol=1e-10, atol=1e-10)


def test_an_ensemble_trains_under_vmap(device):
    models = [bnext.BatchNorm1d(3, activation="relu", device=device, dtype=torch.float64) for _ in range(3)]
    twins = copy.deepcopy(models)
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(3, 6, 3, 4, dtype=torch.float64, device=device)
    y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    for i, twin in enumerate(twins):
        torch.testing.assert_close(y[i], twin(x[i]), rtol=1e-12, atol=1e-12)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_step_as_outside(device, momentum):
    m = bnext.BatchNorm2d(3, momentum=momentum, device=device)
    twin = copy.deepcopy(m)
    buffers = {name: t.clone() for name, t in m.named_buffers()}

    def loss(x, buffers):
        return functional_call(m, buffers, (x,)).square().sum(), buffers

    for _ in range(2):
        x = torch.randn(4, 3, 5, 5, device=device) * 3 + 1
        _, buffers = grad(loss, has_aux=True)(x, buffers)
        twin(x)
    for name, theirs in twin.named_buffers():
        torch.testing.assert_close(buffers[name], theirs, rtol=1e-6, atol=1e-6, msg=name)


def test_replacing_all_batch_norm_modules(device):
    net = nn.Sequential(bnext.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 2, 1), bnext.BatchNorm2d(2)).to(device)
    torch.func.replace_all_batch_norm_modules_(net)
    assert all(m.running_mean is None for m in (net[0], net[2]))
    x = torch.randn(5, 4, 3, 6, 6, device=device)
    torch.testing.assert_close(vmap(net)(x), torch.stack([net(b) for b in x]), rtol=1e-5, atol=1e-5)


def test_unbatched_statistics_cannot_take_a_batch_of_steps(device):
    """As in torch.nn: which of the examples' statistics would it be?"""
    m = bnext.BatchNorm1d(3, device=device)
    with pytest.raises(RuntimeError, match="vmap|in-place|inplace"):
        vmap(m)(torch.randn(2, 4, 3, device=device))


def test_statistics_of_which_one_is_batched_stay_as_they_were(device):
    x, batched, single = torch.randn(4, 2, 3, 5, device=device), torch.zeros(4, 3), torch.zeros(3)
    for mean, var in ((batched, single), (single, batched)):
        mean, var = mean.clone().to(device), var.clone().to(device)
        in_dims = 0, *(0 if t.dim() > 1 else None for t in (mean, var))
        with pytest.raises(RuntimeError, match="vmap|in-place|inplace"):
            vmap(lambda x, m, v: batch_norm(x, m, v, training=True), in_dims)(x, mean, var)
        assert not mean.any() and not var.any()


@pytest.mark.parametrize("momentum", [0.3, None])
def test_an_ensemble_on_one_batch_steps_its_statistics_once(device, momentum):
    """Parameters or a residual are batched, x is not: all examples have the same statistics."""
    layer, theirs = (kind(3, momentum=momentum, device=device) for kind in (bnext.BatchNorm1d, nn.BatchNorm1d))
    x, weights = torch.randn(4, 3, 5, device=device), torch.rand(2, 3, device=device)
    results = [vmap(lambda w, m=m: functional_call(m, {"weight": w}, (x,)))(weights) for m in (layer, theirs)]
    torch.testing.assert_close(*results)
    for (name, ours), expected in zip(layer.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, msg=name)
    residuals = torch.randn(2, 4, 3, 5, device=device)
    results = [vmap(lambda r, m=m: m(x, r))(residuals) for m in (layer, lambda x, r: theirs(x) + r)]
    torch.testing.assert_close(*results)
    assert layer.num_batches_tracked == theirs.num_batches_tracked == 2


def test_functionalize(device):
    m = bnext.BatchNorm1d(3, activation="relu", track_running_stats=False, device=device)
    x = torch.randn(4, 3, device=device)
    torch.testing.assert_close(torch.func.functionalize(m)(x), m(x))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_transforms_inside_a_compiled_graph(device, activation):
    torch._dynamo.reset()
    m = bnext.BatchNorm1d(3, activation=activation, track_running_stats=False, device=device)
    x = torch.randn(5, 4, 3, device=device)

    def loss(x):
        return m(x).square().sum()

    for f, argument in ((grad(loss), x[0]), (vmap(m), x), (jacrev(lambda x: m(x).sum(0)), x[0])):
        compiled = torch.compile(f, backend="aot_eager")
        torch.testing.assert_close(compiled(argument), f(argument), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"ghost_batch_size": 2}], ids=str)
def test_a_gradient_that_comes_with_a_tangent(device, options, create_graph):
    """Forward over reverse where the tangent begins behind the batch norm: its forward saw none."""

    def tangents(norm):
        x, weight, residual = (t.detach().clone().requires_grad_() for t in tensors)
        with torch.autograd.forward_ad.dual_level():
            y = norm(x, weight, residual)
            target = torch.autograd.forward_ad.make_dual(
                torch.zeros_like(y), torch.linspace(-1, 1, y.numel()).view_as(y)
            )
            loss = (y - target.to(y)).square().sum()
            grads = torch.autograd.grad(loss, (x, weight, residual), create_graph=create_graph)
            return [torch.autograd.forward_ad.unpack_dual(g).tangent for g in grads]

    x, weight, _, residual = problem(device, shape=(4, 3, 2, 2))
    tensors = x, weight, residual

    def by_torch(x, weight, residual):
        size = options.get("ghost_batch_size", 4)
        parts = [nn.functional.batch_norm(part, None, None, weight, training=True) for part in x.split(size)]
        y = torch.cat(parts) + residual
        return y * y.sigmoid() if "activation" in options else y

    def by_bnext(x, weight, residual):
        return batch_norm(x, None, None, weight, training=True, residual=residual, **options)

    for ours, theirs in zip(tangents(by_bnext), tangents(by_torch), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("residual", [False, True])
def test_transforms_of_the_backward_of_an_outer_graph(device, residual):
    x, weight, bias, r = problem(device, shape=(4, 3, 2, 2))
    kept = r if residual else None
    y = batch_norm(x, None, None, weight, bias, training=True, activation="relu", residual=kept)
    expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    expected = nn.functional.relu(expected + r if residual else expected)
    dys = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)).to(device)

    def pull(output):
        return lambda dy: torch.autograd.grad(output, (x, weight, bias), dy, retain_graph=True)

    for ours, theirs in zip(vmap(pull(y))(dys), vmap(pull(expected))(dys), strict=True):
        torch.testing.assert_close(ours, theirs)
    _, ours = jvp(pull(y), (dys[0],), (dys[1],))
    for tangent, wanted in zip(ours, pull(expected)(dys[1]), strict=True):  # the backward is linear in dy
        torch.testing.assert_close(tangent, wanted)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_an_empty_batch_moves_no_statistics(device, momentum):
    m = bnext.BatchNorm1d(3, momentum=momentum, device=device)
    m(torch.randn(8, 3, device=device) + 5)
    before = {name: t.clone() for name, t in m.state_dict().items()}
    x = torch.randn(0, 3, device=device)
    with torch.autograd.forward_ad.dual_level():
        m(torch.autograd.forward_ad.make_dual(x, x))
    m.num_batches_tracked = m.num_batches_tracked.int()  # by torch's operators
    m(x)
    assert m.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(m, name), before[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{"momentum": None}, {"unbiased": False}, {"decay": 0.9}], ids=str)
def test_an_empty_batch_moves_no_statistics_in_torchscript(device, options):
    m = torch.jit.script(bnext.BatchNorm1d(3, device=device, **options))
    m(torch.randn(8, 3, device=device) + 5)
    before = m.running_mean.clone(), m.running_var.clone()
    m(torch.randn(0, 3, device=device))
    torch.testing.assert_close((m.running_mean, m.running_var), before, rtol=0, atol=0)


def test_one_value_a_channel_gets_the_error_of_torch(device):
    m = bnext.BatchNorm1d(3, track_running_stats=False, device=device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        grad(lambda x: m(x).sum())(torch.randn(1, 3, device=device))


@pytest.mark.parametrize("residual", [torch.randn(1, 3, 1, 1), torch.randn(4, 3, 5, 5).bfloat16()])
def test_a_residual_broadcasts_and_promotes_as_outside(residual):
    layer, x = bnext.BatchNorm2d(3, activation="silu").eval(), torch.randn(4, 3, 5, 5)
    leaf = x.clone().requires_grad_()
    layer(leaf, residual).sum().backward()
    torch.testing.assert_close(grad(lambda x: layer(x, residual).sum())(x), leaf.grad)
    y, tangent = jvp(lambda x: layer(x, residual), (x,), (x,))
    torch.testing.assert_close(y, layer(x, residual))
    torch.testing.assert_close(
        tangent,
        jvp(
            lambda x: nn.functional.silu(nn.functional.batch_norm(x, layer.running_mean, layer.running_var) + residual),
            (x,),
            (x,),
        )[1],
    )


def test_mistakes_are_found_and_change_nothing():
    x = torch.randn(4, 3, 5, 5)
    with pytest.raises(ValueError, match="eps"):
        grad(lambda x: bnext.BatchNorm2d(3, eps=0, track_running_stats=False)(x).sum())(x)
    layer = bnext.BatchNorm2d(3, affine=False)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="running_mean should contain 1 elements not 3"):
        grad(lambda x: layer(x).sum())(x[:, :1])
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(layer)(x.expand(2, 4, 3, 5, 5))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


def test_the_counter_may_be_of_any_dtype():
    layer, x = bnext.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    layer.num_batches_tracked = torch.zeros(())
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))
    assert layer.num_batches_tracked == 1
