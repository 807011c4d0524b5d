"""Ghost batches: parts of a batch, each normalized by its own statistics, in one call of the operator."""

import copy
import pickle

import pytest
import torch
from problems import assert_within, channels_last, contiguous, eps_of, every_second, misaligned
from torch import nn
from torch.autograd import forward_ad as fwAD
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import bnext
from bnext import functional

OPS = bnext.ops

#: (N, C, ...) and the size of a ghost batch: even parts; uneven ones; parts that do not start on 16 bytes, or on a whole
#: byte of a mask; one channel; matrices; parts of one example.
PROBLEMS = [
    ((8, 4, 5, 4), 4),
    ((10, 4, 5, 4), 4),
    ((7, 3, 5, 3), 3),
    ((7, 1, 5, 3), 2),
    ((11, 3), 3),
    ((128, 96), 32),
    ((5, 3, 7), 1),
    ((9, 2, 3, 2, 3), 5),
    ((40, 65, 9), 16),
]
IDS = [f"{'x'.join(map(str, shape))} by {size}" for shape, size in PROBLEMS]

LAYERS = {2: bnext.BatchNorm1d, 3: bnext.BatchNorm1d, 4: bnext.BatchNorm2d, 5: bnext.BatchNorm3d}


def layer_of(shape, size, *, dtype=torch.float64, device="cpu", **options):
    """With parameters and buffers that are not those of a new layer."""
    layer = LAYERS[len(shape)](shape[1], ghost_batch_size=size, dtype=dtype, device=device, **options)
    with torch.no_grad():
        for t in (layer.weight, layer.bias, layer.running_mean):
            t.normal_()
    return layer


def parts_of(t, size):
    return torch.tensor_split(t, -(-len(t) // size))


def without_parts(layer):
    plain = copy.deepcopy(layer)
    plain.ghost_batch_size = None
    return plain


def in_parts(plain, x, residual, size):
    residuals = [None] * len(parts_of(x, size)) if residual is None else parts_of(residual, size)
    return torch.cat([plain(*pair) for pair in zip(parts_of(x, size), residuals, strict=True)])


# ---- what they are


@pytest.mark.parametrize(("shape", "size"), PROBLEMS, ids=IDS)
@pytest.mark.parametrize("layout", [contiguous, channels_last, every_second, misaligned])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2], ids=str
)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_each_part_is_a_batch_of_its_own_to_the_bit(device, shape, size, layout, dtypes, activation):
    dtype, parameters = dtypes
    for residual in (False, True):
        ghost = layer_of(shape, size, dtype=parameters, device=device, activation=activation)
        plain = without_parts(ghost)
        data = [layout(t.to(device, dtype)) for t in torch.randn(2, *shape)[: 1 + residual]]
        leaves = [[t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in data] for _ in "ab"]
        y = ghost(*leaves[0])
        expected = in_parts(plain, leaves[1][0], leaves[1][1] if residual else None, size)
        assert torch.equal(y, expected) and y.dtype == dtype
        for name, t in ghost.named_buffers():
            assert torch.equal(t, plain.get_buffer(name)), name
        assert ghost.num_batches_tracked == len(parts_of(y, size))
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        for a, b in zip(*leaves, strict=True):
            assert torch.equal(a.grad, b.grad)
        # Autograd adds the rounded gradients of parts; here they are added first.
        for a, b in zip(ghost.parameters(), plain.parameters(), strict=True):
            scale = b.grad.abs().max().item() * len(parts_of(y, size))
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=2 * eps_of(parameters) * scale + 1e-5)


@pytest.mark.parametrize(("shape", "size"), PROBLEMS, ids=IDS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("momentum", [0.25, None])
def test_against_torch(device, shape, size, layout, momentum):
    """torch.nn's layer over torch.tensor_split, in float64."""
    ghost = layer_of(shape, size, device=device, activation="relu", momentum=momentum)
    theirs = bnext.revert(without_parts(ghost))
    theirs.__class__ = getattr(nn, type(ghost).__name__)
    x, residual = (layout(t.to(device)) for t in torch.randn(2, *shape, dtype=torch.float64))
    leaves = [
        [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual)] for _ in "ab"
    ]
    y = ghost(*leaves[0])
    a, b = leaves[1]
    expected = (torch.cat([theirs(part) for part in parts_of(a, size)]) + b).relu()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for ours, other in zip([*leaves[0], *ghost.parameters()], [*leaves[1], *theirs.parameters()], strict=True):
        torch.testing.assert_close(ours.grad, other.grad)
    for ours, other in zip(ghost.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, other)


def test_a_call_is_one_of_the_kernels(device):
    layer, x = layer_of((9, 3, 4), 2, device=device), torch.randn(9, 3, 4, dtype=torch.float64, device=device)
    before = bnext.kernels_run()
    y = layer(x.requires_grad_())
    assert bnext.kernels_run() - before == 1
    y.sum().backward()
    assert bnext.kernels_run() - before == 2
    assert "BnextBatchNormBackward" in y.grad_fn.name()


@pytest.mark.parametrize("examples", [0, 1, 4])
def test_a_batch_that_is_one_part(device, examples):
    ghost = layer_of((4, 3, 4), 4, device=device)
    plain = without_parts(ghost)
    x = torch.randn(examples, 3, 4, dtype=torch.float64, device=device)
    leaves = [x.clone().requires_grad_() for _ in "ab"]
    y, expected = ghost(leaves[0]), plain(leaves[1])
    assert torch.equal(y, expected)
    for grads in zip(
        torch.autograd.grad(y.square().sum(), [leaves[0], *ghost.parameters()]),
        torch.autograd.grad(expected.square().sum(), [leaves[1], *plain.parameters()]),
        strict=True,
    ):
        assert torch.equal(*grads)
    for pair in zip(ghost.buffers(), plain.buffers(), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("shape", [(6, 0), (6, 3, 0), (6, 0, 4)], ids=str)
def test_parts_without_values(device, shape):
    layer = LAYERS[len(shape)](shape[1], ghost_batch_size=2, device=device)
    x = torch.zeros(shape, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert layer.num_batches_tracked == 3 and x.grad.shape == shape
    assert (layer.weight.grad == 0).all() and (layer.running_mean == 0).all()


def test_evaluation_knows_no_parts(device):
    x = torch.randn(9, 3, 4, dtype=torch.float64, device=device)
    for change in (lambda n: n.eval(), lambda n: bnext.freeze(n)):
        ghost = layer_of((9, 3, 4), 2, device=device)
        plain = without_parts(ghost)
        assert torch.equal(change(ghost)(x), change(plain)(x)) and ghost.num_batches_tracked == 0


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "weight bias", "x bias"])
def test_only_the_gradients_that_are_needed(device, needs):
    shape, size = (7, 3, 5, 3), 3
    ghost = layer_of(shape, size, device=device, activation="relu")
    x, dy = torch.randn(2, *shape, dtype=torch.float64, device=device)
    everything = torch.autograd.grad(ghost(x.requires_grad_()), [x, *ghost.parameters()], dy)
    found = {"x": x, "weight": ghost.weight, "bias": ghost.bias}
    for name, t in found.items():
        t.requires_grad_(name in needs)
    wanted = [t for name, t in found.items() if name in needs.split()]
    grads = torch.autograd.grad(ghost(x), wanted, dy)
    for grad, t in zip(grads, wanted, strict=True):
        assert torch.equal(grad, everything[[id(f) for f in found.values()].index(id(t))])


def test_sums_over_parts_are_rounded_once(device):
    """In bfloat16 the gradients of parts, added one by one, would be wrong by more."""
    shape, size = (64, 5, 3), 1
    layer = layer_of(shape, size, dtype=torch.bfloat16, device=device)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    dy = (torch.randn(shape, device=device) + 1).bfloat16()
    y = layer(x)
    y.backward(dy)
    total = torch.zeros(2, 5, dtype=torch.float64, device=device)
    for part, grad in zip(x.double().split(size), dy.double().split(size), strict=True):
        normalized = nn.functional.batch_norm(part, None, None, training=True)
        total += torch.stack([(grad * normalized).sum((0, 2)), grad.sum((0, 2))])
    for t, exact in zip((layer.weight.grad, layer.bias.grad), total, strict=True):
        assert_within(t, exact, 0.5 * eps_of(torch.bfloat16) * exact.abs() + 1e-4)


def test_bits_do_not_depend_on_threads():
    shape = (38, 1030)
    x, dy = torch.randn(2, *shape)
    layer = layer_of(shape, 2, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            found.append(torch.autograd.grad(layer(x.requires_grad_()), [x, *layer.parameters()], dy))
    finally:
        torch.set_num_threads(threads)
    for grads in found[1:]:
        for pair in zip(grads, found[0], strict=True):
            assert torch.equal(*pair)


# ---- derivatives of higher order


@pytest.mark.parametrize(("shape", "size"), [((5, 2, 3), 2), ((5, 2, 2, 2), 3), ((7, 2), 3)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
def test_first_and_second_derivatives(device, shape, size, layout, residual, activation):
    def f(x, weight, bias, r):
        options = {"activation": activation, "residual": r, "ghost_batch_size": size}
        return functional.batch_norm(x, None, None, weight, bias, True, **options)

    x, r = (layout(t.to(device)).requires_grad_() for t in torch.randn(2, *shape, dtype=torch.float64))
    weight, bias = (t.to(device).requires_grad_() for t in torch.rand(2, 2, dtype=torch.float64) + 0.5)
    args = x, weight, bias, r if residual else None
    assert gradcheck(f, args)
    assert gradgradcheck(f, args)


def test_third_derivatives(device):
    x, weight = (
        torch.randn(5, 2, 3, dtype=torch.float64, device=device),
        torch.rand(2, dtype=torch.float64, device=device),
    )

    def penalty_gradient(x, weight):
        y = functional.batch_norm(x, None, None, weight, training=True, ghost_batch_size=2)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, weight], create_graph=True)

    assert gradcheck(penalty_gradient, (x.requires_grad_(), weight.requires_grad_()))


# ---- the operators


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_opcheck(device, layout, activation):
    x, dy, residual = (layout(t.to(device)) for t in torch.randn(3, 7, 3, 5, 3))
    weight, bias = torch.rand(2, 3, device=device)
    buffers = torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)
    forward = (x, weight, bias, *buffers, residual, None, 1e-5, activation, 0.0, True, True, 3)
    opcheck(OPS.batch_norm_forward.default, forward)
    _, mean, invstd, mask = OPS.batch_norm_forward(*forward)
    assert mean.shape == invstd.shape == (3, 3)
    kept = (mask, None) if activation == "relu" else (None, residual)
    if activation == "relu":
        assert mask.numel() == sum(-(-part.numel() // 8) for part in parts_of(x, 3))
    opcheck(OPS.batch_norm_normalize.default, (x, mean, invstd, weight, bias, residual, activation, 0.0, True))
    opcheck(
        OPS.batch_norm_backward.default, (dy, x, weight, bias, mean, invstd, *kept, activation, 0.0, True, [True] * 4)
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    whole = (*leaves[:3], *buffers, residual, True, None, 1e-5, activation, 0.0, True, 3)
    opcheck(OPS.batch_norm.default, whole)


def test_statistics_that_do_not_fit(device):
    x = torch.randn(4, 3, 5, device=device)
    rows = torch.ones(5, 3, device=device)
    with pytest.raises(
        RuntimeError, match="mean should have a row for each ghost batch, of which an input of 4 examples"
    ):
        OPS.batch_norm_normalize(x, rows, rows, None, None)
    with pytest.raises(RuntimeError, match=r"invstd should have the shape of mean, \[2, 3\], not \[3\]"):
        OPS.batch_norm_normalize(x, rows[:2], rows[0], None, None)
    with pytest.raises(RuntimeError, match="mean should be float32 for an input of float32, not float64"):
        OPS.batch_norm_normalize(x, rows[:2].double(), rows[:2], None, None)
    with pytest.raises(RuntimeError, match="mean should contain 3 elements not 6"):  # a stage has one vector of sums
        OPS.batch_norm_backward_reduce(x, x, rows[:2], rows[:2])
    x = x[:, :, :3]
    mask = torch.zeros(
        6, dtype=torch.uint8, device=device
    )  # 3 bytes for the 18 bits of each of two; 5 for those of one batch
    how = None, "relu", 0.0, True, [True] * 4
    OPS.batch_norm_backward(x, x, None, None, rows[:2], rows[:2], mask, *how)
    with pytest.raises(RuntimeError, match="mask should be uint8 with 6 elements, not uint8 with 5"):
        OPS.batch_norm_backward(x, x, None, None, rows[:2], rows[:2], mask[:5], *how)


# ---- errors


def ways(layer):
    """The layer by every way that a call can go: the kernels, the Function in Python, torch's operators."""

    def transformed(x):
        with fwAD.dual_level():
            return layer(fwAD.make_dual(x, torch.ones_like(x)))

    reverted = bnext.revert(copy.deepcopy(layer))
    return {"kernels": (layer, layer), "function": (layer, transformed), "torch": (reverted, reverted)}


@pytest.mark.parametrize("way", ["kernels", "function", "torch"])
def test_a_failed_call_changes_nothing(device, way):
    """Not even the statistics of parts before the one that fails."""
    layer, call = ways(bnext.BatchNorm1d(3, ghost_batch_size=2, device=device))[way]
    before = pickle.dumps(layer.state_dict())
    with pytest.raises(
        ValueError, match=r"more than 1 value per channel.*\[5, 3\].*smallest ghost batch is of 1 example"
    ):
        call(torch.randn(5, 3, device=device))
    assert pickle.dumps(layer.state_dict()) == before


def test_wrong_sizes(device):
    for wrong in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="ghost_batch_size should be None or a positive integer"):
            bnext.BatchNorm2d(3, ghost_batch_size=wrong)
    x, mean, var = torch.randn(4, 3, device=device), torch.zeros(3, device=device), torch.ones(3, device=device)
    for training in (True, False):
        with pytest.raises(ValueError, match="ghost_batch_size should be None or a positive integer, not 0"):
            functional.batch_norm(x, mean, var, training=training, ghost_batch_size=0)
        with pytest.raises(TypeError, match="argument 'ghost_batch_size' must be int or None, not str"):
            functional.batch_norm(x, mean, var, training=training, ghost_batch_size="4")
    layer = bnext.BatchNorm2d(3, ghost_batch_size=2)
    with pytest.raises(ValueError, match="ghost_batch_size"):
        bnext.convert_sync_batchnorm(nn.Sequential(layer))


# ---- every way


def test_other_ways_agree(device):
    x, r = torch.randn(2, 7, 3, 4, 4, device=device)
    layer = layer_of(x.shape, 4, dtype=torch.float32, device=device, activation="silu")
    assert "ghost_batch_size=4" in repr(layer)
    copies = [pickle.loads(pickle.dumps(layer)) for _ in range(3)]
    bnext.revert(copies[1])
    copies[2] = torch.jit.script(bnext.revert(copies[2]))
    assert bnext.explain(layer, x)[""].way == "kernels"
    y = layer(x, r)
    for copied in copies:
        torch.testing.assert_close(copied(x, r), y)
        torch.testing.assert_close(copied.running_var, layer.running_var)
        assert copied.num_batches_tracked == 2


@pytest.mark.parametrize("activation", [None, "relu"])
def test_transforms(device, activation):
    """The Function in Python, under torch.func and in forward mode."""
    x, r, dx = torch.randn(3, 7, 3, 4, dtype=torch.float64, device=device)
    layer = layer_of(x.shape, 3, device=device, activation=activation)

    def by_torch(t, r):
        parts = torch.cat(
            [nn.functional.batch_norm(p, None, None, layer.weight, layer.bias, True) for p in parts_of(t, 3)]
        )
        return torch.relu(parts + r) if activation else parts + r

    def ours(t, r):
        return functional.batch_norm(
            t, None, None, layer.weight, layer.bias, True, residual=r, activation=activation, ghost_batch_size=3
        )

    torch.testing.assert_close(
        torch.func.grad(lambda t: ours(t, r).square().sum())(x),
        torch.func.grad(lambda t: by_torch(t, r).square().sum())(x),
    )
    batched = torch.stack([x, dx])
    torch.testing.assert_close(torch.vmap(ours, (0, None))(batched, r), torch.stack([by_torch(t, r) for t in batched]))
    tangents = (dx, torch.zeros_like(r))
    torch.testing.assert_close(torch.func.jvp(ours, (x, r), tangents), torch.func.jvp(by_torch, (x, r), tangents))
    plain = without_parts(layer)
    with fwAD.dual_level():
        layer(fwAD.make_dual(x, dx))
    for part in parts_of(x, 3):
        plain(part)
    for pair in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(*pair)


def test_a_residual_that_broadcasts(device):
    x = torch.randn(7, 3, 4, device=device)
    layer = layer_of(x.shape, 3, dtype=torch.float32, device=device, activation="relu")
    for r in (torch.randn(1, 3, 1, device=device), torch.randn(7, 3, 4, device=device, dtype=torch.float64)):
        plain = without_parts(layer)
        plain.activation = None
        expected = torch.relu(in_parts(plain, x, None, 3) + r)
        y = layer(x, r)
        assert torch.equal(y, expected) and y.dtype == r.dtype


def test_autocast(device):
    x = torch.randn(7, 3, 4, 4, device=device)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), layer_of(x.shape, 3, dtype=torch.float32)).to(device)
    plain = without_parts(net[1])
    with torch.autocast(device_type=torch.device(device).type, dtype=torch.bfloat16):
        y, hidden = net(x), net[0](x)
        assert torch.equal(y, in_parts(plain, hidden, None, 3)) and y.dtype == hidden.dtype == torch.bfloat16


# ---- torch.compile


def check_compiled(device, backend):
    torch._dynamo.reset()
    graphs = []
    layer = bnext.BatchNorm2d(3, ghost_batch_size=4, activation="relu", device=device)
    compiled = copy.deepcopy(layer)

    def counted(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    f = torch.compile(lambda x, r: compiled(x, r) * 2, fullgraph=True, backend=counted)
    for examples in (8, 9, 3, 4, 14, 31):
        x, r = torch.randn(2, examples, 3, 5, 3, device=device)
        results = []
        for call, module in ((lambda x, r: layer(x, r) * 2, layer), (f, compiled)):
            leaves = [t.clone().requires_grad_() for t in (x, r)]
            y = call(*leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), [*leaves, *module.parameters()])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for a, b in zip(layer.buffers(), compiled.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    # Of the first size, of any, and, as torch distinguishes a dimension of 1, of one part. Torch 2.11 specialises more.
    assert len(graphs) == 3 or (torch.__version__ < "2.12" and len(graphs) <= 5)


def test_traced(device):
    check_compiled(device, "aot_eager")


@pytest.mark.slow
def test_inductor(device):
    check_compiled(device, "inductor")


# ---- what a step keeps


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(("shape", "size"), [((7, 3, 5, 3), 3), ((8, 4, 5, 4), 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute(device, activation, shape, size, dtype):
    c = shape[1]
    net = nn.Sequential(nn.Conv2d(c, c, 1), layer_of(shape, size, activation=activation), nn.Conv2d(c, c, 1)).to(
        device, dtype
    )
    x, grads = torch.randn(shape, device=device).to(dtype), []
    for recompute in (False, True):
        step = bnext.recompute(copy.deepcopy(net), recompute)
        leaf = x.clone().requires_grad_()
        step(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in step.parameters()), *step.buffers()])
    for pair in zip(*grads, strict=True):
        assert torch.equal(*pair)
    report = bnext.memory(net, x)
    output = x.numel() * x.element_size()
    assert report["2"].before == output and report["2"].after == 0  # the batch norm's result


def test_recompute_of_a_matrix(device):
    """Whose statistics have as many dimensions as it has."""
    net = nn.Sequential(nn.Linear(6, 6), layer_of((9, 6), 4), nn.Linear(6, 2)).to(device, torch.float32)
    x, grads = torch.randn(9, 6, device=device), []
    for recompute in (False, True):
        step = bnext.recompute(copy.deepcopy(net), recompute)
        step(x).square().sum().backward()
        grads.append([p.grad for p in step.parameters()])
    for pair in zip(*grads, strict=True):
        assert torch.equal(*pair)
    assert bnext.memory(net, x)["2"].after == 0
