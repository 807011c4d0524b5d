"""`bnext.recompute`: what is kept for the backward, and that gradients stay equal to the bit."""

import contextlib
import copy
import gc
import pickle
import random
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bnext
from bench.networks import NETWORKS


def kept(run, *, block=True):
    """The shapes of what `run` keeps, and what it returns."""
    shapes, storages = [], {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in storages:
            storages[t.untyped_storage().data_ptr()] = t
            shapes.append(tuple(t.shape))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        if block:
            with bnext.recompute():
                result = run()
        else:
            result = run()
    return shapes, result


def gradients(net, x, *, block, run=None):
    """Of a copy of `net`, in a step with or without a block of recompute."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    run = run or (lambda net, x: net(x))
    if block:
        with bnext.recompute():
            y = run(net, x)
    else:
        y = run(net, x)
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters()), *net.buffers(), y.detach()]


def same(net, x, run=None):
    for a, b in zip(gradients(net, x, block=True, run=run), gradients(net, x, block=False, run=run), strict=True):
        assert torch.equal(a, b)


def block(activation="relu", channels=4, **options):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3),
        bnext.BatchNorm2d(channels, activation=activation, **options),
        nn.Conv2d(channels, channels, 3),
    )


class Residual(nn.Module):
    """Basic blocks as in ResNet, of which the first changes the shape."""

    def __init__(self, blocks, channels=4, activation="relu"):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.shortcut = bnext.BatchNorm2d(channels)
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(bnext.BatchNorm2d(channels, activation=activation) for _ in range(blocks))
        self.last = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        x = self.first(x)
        r = self.shortcut(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            r = norm(convolution(r), r)
        return self.last(r)


# ---- what it saves


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "tanh"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_an_output_is_not_kept(device, activation, training, format):
    net = block(activation).to(device).train(training)
    x = torch.randn(2, 3, 8, 7, device=device).to(memory_format=format)
    without, _ = kept(lambda: net(x), block=False)
    with_block, _ = kept(lambda: net(x))
    assert without.count((2, 4, 6, 5)) == 2  # x of the batch norm, and y
    assert with_block.count((2, 4, 6, 5)) == 1
    same(net, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_bits_are_those_of_the_forward(device, dtype):
    """Statistics that are hard to repeat: a large mean, and all that a forward can be given."""
    x, r = (torch.randn(2, 6, 5, 7, 3, device=device) + 1000).to(dtype)
    x.requires_grad_()
    layer = bnext.BatchNorm2d(5, activation="silu", device=device, dtype=dtype)
    with bnext.recompute():
        y = layer(x, r.requires_grad_())
        z = y.sigmoid() * y  # the product keeps both
    (grad,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    expected = torch.autograd.grad((lambda y: y.sigmoid() * y)(layer(x, r)).sum(), x)[0]
    assert torch.equal(grad, expected)


def test_a_view_of_an_output_is_not_kept(device):
    x, factor = torch.randn(4, 6, 5, device=device), torch.randn(3, 4, 6, device=device)
    net = nn.ModuleList([bnext.BatchNorm1d(6, activation="relu").to(device)])

    def run(net, x):
        return net[0](x)[1:].transpose(1, 2)[:, 1:] * factor.requires_grad_()

    shapes, _ = kept(lambda: run(net, x))
    assert (3, 4, 6) in shapes and len([s for s in shapes if s == (3, 4, 6)]) == 1  # the factor
    same(net, x, run)


def test_a_view_of_another_dtype_is_kept():
    net = nn.ModuleList([bnext.BatchNorm1d(6)])
    run = lambda net, x: torch.view_as_real(torch.view_as_complex(net[0](x)).square())  # noqa: E731
    same(net, torch.randn(4, 6, 2), run)


def test_a_batch_norm_of_a_view():
    """It keeps a part of what is computed again, from which nothing else follows."""
    net = nn.ModuleList([bnext.BatchNorm2d(6), bnext.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 3)])
    x = torch.randn(2, 6, 8, 8)
    same(net, x, lambda net, x: net[2](net[1](net[0](x)[:, 1:5])))
    same(net, x, lambda net, x: net[2](net[1](net[0](x).view(3, 4, 8, 8))))


def test_a_batch_norm_of_a_batch_norm():
    net = nn.Sequential(*(bnext.BatchNorm2d(3) for _ in range(4)), nn.Conv2d(3, 2, 3))
    x = torch.randn(2, 3, 8, 8)
    shapes, _ = kept(lambda: net(x))
    assert shapes.count((2, 3, 8, 8)) == 2  # x, and the third one's input: two passes from there
    same(net, x)


def test_a_residual_that_is_a_view():
    """Of the shape of the output that it is a view of, but not that output."""
    net = block()

    def run(net, x):
        hidden = net[0](x)
        y = net[1](hidden)
        return net[2](net[1](hidden, y.transpose(2, 3)))

    same(net, torch.randn(2, 3, 8, 8), run)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_residuals(device, blocks, activation):
    net = Residual(blocks, activation=activation).to(device)
    x = torch.randn(2, 3, 6, 5, device=device)
    shapes, _ = kept(lambda: net(x))
    without, _ = kept(lambda: net(x), block=False)
    shape = (2, 4, 6, 5)
    # Each batch norm keeps what it normalizes. Of the outputs, that of the shortcut the first, every third is kept.
    norms = 1 + blocks
    assert without.count(shape) == norms + 1 + blocks
    assert shapes.count(shape) == norms + (blocks + 1) // 3
    same(net, x)


def test_a_residual_that_nobody_keeps_is_not_kept_for_it():
    """Then y is kept: it takes no more memory than the residual would, and no time."""
    net = block()
    x = torch.randn(2, 3, 8, 8)
    r = torch.randn(2, 4, 6, 6)
    run = lambda net, x: net[2](net[1](net[0](x), r + 1))  # noqa: E731
    shapes, _ = kept(lambda: run(net, x))
    assert shapes.count((2, 4, 6, 6)) == 2
    same(net, x, run)


def test_memory_is_freed_when_it_would_be_without(device):
    """A recipe keeps x no longer than the batch norm does."""
    net = block().to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    with bnext.recompute():
        hidden = net[0](x)
        reference = weakref.ref(hidden)
        loss = net[2](net[1](hidden)).sum()
        del hidden
        gc.collect()
        assert reference() is not None
        loss.backward()
        assert reference() is None  # although the block, and the graph's nodes, are still there


def test_nothing_is_held_after_the_block():
    net, x = block(), torch.randn(2, 3, 8, 8)
    gc.disable()
    try:
        with bnext.recompute() as inside:
            hidden = net[0](x)
            reference = weakref.ref(hidden)
            y = net[1](hidden)
            loss = net[2](y).sum()
        del hidden
        loss.backward()
        assert inside is not None and y is not None and reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("partly", [False, True])
def test_what_was_computed_again_goes_when_nobody_else_asks(partly):
    """With the last who asks; or, where some do not, with the backward."""
    net = Residual(1)
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    with bnext.recompute() as inside:
        hidden = net.first(x)
        r = net.shortcut(hidden)
        y = net.norms[0](net.convolutions[0](r), r)
        ends = net.last(y).sum(), net.last(y).square().sum()
        recipes = [output.recipe for output in inside._outputs.values()]
    assert len(recipes) == 2
    left = []
    hidden.register_hook(lambda grad: left.extend(recipe._made for recipe in recipes))
    (ends[0] if partly else sum(ends)).backward()
    assert [t is not None for t in left] == ([False, True] if partly else [False, False])
    assert all(recipe._made is None for recipe in recipes)


# ---- where hooks go wrong


@pytest.mark.parametrize("later", [False, True], ids=["before it is kept", "after"])
def test_outputs_changed_in_place(later):
    net = block()
    x = torch.randn(2, 3, 8, 8)

    def before(net, x):
        y = net[1](net[0](x))
        y.mul_(2)
        return net[2](y)

    def after(net, x):
        y = net[1](net[0](x))
        z = net[2](y)
        with torch.no_grad():
            y.zero_()
        return z

    if not later:
        shapes, _ = kept(lambda: before(net, x))
        assert shapes.count((2, 4, 6, 6)) == 2
        same(net, x, before)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(net, x, block=False, run=after)
    # What it kept is the recipe, of which nothing has changed.
    for a, b in zip(gradients(net, x, block=True, run=after), gradients(net, x, block=False), strict=True):
        assert torch.equal(a, b)


def test_in_place_activations_behind_it():
    """A result kept under a version of its own, in the storage of y."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), bnext.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    same(net, torch.randn(2, 3, 8, 8))
    net[2] = nn.Sigmoid()
    same(net, torch.randn(2, 3, 8, 8))
    same(net, torch.randn(2, 3, 8, 8), lambda net, x: net[3](net[1](net[0](x)).sigmoid_()))


def test_what_is_kept_is_still_checked():
    """Autograd leaves it to hooks to notice changes in place."""
    net = block()
    x = torch.randn(2, 3, 8, 8)

    def run(net, x):
        hidden = net[0](x)
        y = net[2](net[1](hidden))
        with torch.no_grad():
            hidden.zero_()
        return y

    for inside in (False, True):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(net, x, block=inside, run=run)


def test_another_storage_under_the_same_tensor():
    net = block()
    x = torch.randn(2, 3, 8, 8)

    def run(net, x):
        y = net[1](net[0](x))
        y.data = torch.ones_like(y)
        total = net[2](y).sum()
        for i in range(50):  # one of these gets the address of y's old storage
            total = total + (torch.full_like(y, i) * net[0].bias.view(1, -1, 1, 1)).sum()
        return total

    same(net, x, run)


def test_storages_come_again():
    """The allocator gives memory of an output that is gone to other tensors."""
    x = torch.randn(1024, 64)

    def run(net, x):
        total = 0
        for i in range(20):
            net[0](x + i)  # dropped
            other = torch.sigmoid(x * i)
            total = total + (other * net[1].weight).sum() + (net[0](x - i) * net[1].weight).sum()
        return total

    same(nn.ModuleList([bnext.BatchNorm1d(64), nn.LayerNorm(64, bias=False)]), x, run)


def test_several_consumers_compute_once(monkeypatch):
    net = nn.ModuleList([bnext.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)])
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with bnext.recompute():
        y = net[0](x)
        z = net[1](y) + net[2](y)
    count = bnext.kernels_run()
    z.sum().backward(retain_graph=True)
    assert bnext.kernels_run() - count == 2  # once for both convolutions, and the batch norm's backward
    first = x.grad.clone()
    x.grad = None
    del y
    z.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, first) and bnext.kernels_run() - count == 4
    (only,) = torch.autograd.grad(net[1](net[0](x)).sum(), x)
    assert only.shape == x.shape


def test_a_layer_that_runs_more_than_once():
    net = nn.Sequential(bnext.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 3, 3, padding=1))
    same(net, torch.randn(2, 3, 8, 8), lambda net, x: net(net(net(x))))


def test_double_backward():
    net = block("silu").double()
    x = torch.randn(2, 3, 6, 6).double()

    def penalty(inside):
        model, t = copy.deepcopy(net), x.clone().requires_grad_()
        if inside:
            with bnext.recompute():
                y = model(t)
        else:
            y = model(t)
        (g,) = torch.autograd.grad(y.square().sum(), t, create_graph=True)
        g.square().sum().backward()
        return [t.grad, *(p.grad for p in model.parameters())]

    for a, b in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def f(t):
        with bnext.recompute():
            return net(t)

    assert torch.autograd.gradcheck(f, (x[:, :, :5, :5].clone().requires_grad_(),))


def elsewhere():
    """Hooks that keep copies; `save_on_cpu` of what is on the CPU keeps that itself."""
    return saved_tensors_hooks(torch.clone, lambda t: t)


def test_offloading_hooks_around_it():
    net, x = Residual(3), torch.randn(2, 3, 6, 5)

    def run(net, x):
        with elsewhere(), bnext.recompute():
            return net(x)

    for a, b in zip(gradients(net, x, block=False, run=run), gradients(net, x, block=False), strict=True):
        assert torch.equal(a, b)


def test_offloaded_residuals():
    """Their storage is free, and its address another tensor's; or they have changed since."""
    net, x = block(), torch.randn(2, 3, 8, 8)

    def step(net, x, i, changes):
        hidden = net[0](x)
        r = hidden.detach() * i
        total = (r * net[0].bias.view(1, -1, 1, 1)).sum()  # keeps r
        if changes:
            r.add_(1)
        else:
            del r
            r = torch.full_like(hidden, i)
        return total + net[2](net[1](hidden, r)).square().sum()

    def run(net, x):
        with elsewhere(), bnext.recompute():
            return sum(step(net, x, i, changes) for i in range(20) for changes in (False, True))

    def plain(net, x):
        with elsewhere():
            return sum(step(net, x, i, changes) for i in range(20) for changes in (False, True))

    for a, b in zip(gradients(net, x, block=False, run=run), gradients(net, x, block=False, run=plain), strict=True):
        assert torch.equal(a, b)


def test_hooks_inside_it_have_their_say():
    net, x = block(), torch.randn(2, 3, 8, 8)

    def run(net, x):
        hidden = net[0](x)
        with save_on_cpu():
            return net[2](net[1](hidden))

    same(net, x, run)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(inside, reentrant):
    net = nn.Sequential(Residual(3), bnext.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    x = torch.randn(2, 3, 6, 5)

    def within(part, x):
        if inside:
            with bnext.recompute():
                return part(x)
        return part(x)

    def run(net, x):
        return net[2](net[1](checkpoint(within, net[0], x, use_reentrant=reentrant)))

    plain = gradients(
        net, x, block=False, run=lambda net, x: net[2](net[1](checkpoint(net[0], x, use_reentrant=False)))
    )
    for a, b in zip(gradients(net, x, block=not inside, run=run), plain, strict=True):
        assert torch.equal(a, b)


def test_autocast(device):
    net, x = block().to(device), torch.randn(2, 3, 8, 8, device=device)

    def run(net, x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return net(x).float()

    shapes, _ = kept(lambda: run(net, x))
    assert shapes.count((2, 4, 6, 6)) == 1
    same(net, x, run)


def test_an_error_halfway_ends_the_block():
    net, x = block(), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError), bnext.recompute():
        net(torch.randn(2, 5, 8, 8))
    assert bnext.recomputation.here.block is None
    shapes, _ = kept(lambda: net(x), block=False)
    assert shapes.count((2, 4, 6, 6)) == 2
    bnext.recompute(net)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 8, 8))
    assert bnext.recomputation.here.block is None and not bnext.recomputation.here.entered


class Interrupted(nn.Module):
    """What Ctrl-C does to whatever calls it, once."""

    def __init__(self):
        super().__init__()
        self.error = KeyboardInterrupt

    def forward(self, x):
        error, self.error = self.error, None
        if error is not None:
            raise error
        return x


def nothing_is_open():
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return bnext.recomputation.here.block is None and not bnext.recomputation.here.entered and top is None


@pytest.mark.parametrize("next", ["the next call", "recompute off"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_an_interrupt_left_ends_with_the_next_call(at, next):
    """Torch runs no hook of the model after it. Hooks that others have set since stay."""
    net, x = block(), torch.randn(2, 3, 8, 8)
    net.insert(at, Interrupted())
    bnext.recompute(net)
    with pytest.raises(KeyboardInterrupt):
        net(x)
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        net(x) if next == "the next call" else bnext.recompute(net, False)
        before = len(packed)
        x.clone().requires_grad_().exp()
        assert len(packed) == before + 1
    assert nothing_is_open()
    shapes, _ = kept(lambda: bnext.recompute(net)(x), block=False)
    assert shapes.count((2, 4, 6, 6)) == 1 and nothing_is_open()


def test_a_model_that_calls_itself():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = block()

        def forward(self, x, again=True):
            if again:
                self(x, again=False)
            return self.net(x)

    net, x = bnext.recompute(Twice()), torch.randn(2, 3, 8, 8)
    shapes, _ = kept(lambda: net(x), block=False)
    assert shapes.count((2, 4, 6, 6)) == 2 and nothing_is_open(), "one in each call"


def test_a_block_is_entered_once_at_a_time():
    again, x = bnext.recompute(), torch.randn(2, 3, 8, 8)
    for _ in range(2):
        with again, pytest.raises(RuntimeError, match="this block of bnext.recompute.. is open"), again:
            pass
        assert nothing_is_open()
    with again:
        loss = block()(x).sum()
    loss.backward()


def test_an_error_in_the_backward_leaves_the_next_one_right():
    net, x = Residual(2), torch.randn(2, 3, 6, 5)
    expected = gradients(net, x, block=False)
    x.requires_grad_()
    with bnext.recompute():
        hidden = net.first(x)
        r = net.shortcut(hidden)
        for convolution, norm in zip(net.convolutions, net.norms, strict=True):
            r = norm(convolution(r), r)
        loss = net.last(r).square().sum()

    def fail(grad):
        raise ValueError

    handle = hidden.register_hook(fail)
    with pytest.raises(ValueError):
        loss.backward(retain_graph=True)
    handle.remove()
    net.zero_grad()
    x.grad = None
    loss.backward()
    assert torch.equal(x.grad, expected[0])


def test_threads_and_blocks_within_blocks():
    net, x = block(), torch.randn(2, 3, 8, 8)
    shapes = {}

    def other():
        shapes["other"], _ = kept(lambda: net(x), block=False)

    with bnext.recompute():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        hidden = net[1](net[0](x))
        shapes["inner"], _ = kept(lambda: net[2](hidden))
    assert shapes["other"].count((2, 4, 6, 6)) == 2

    def nested(net, x):
        with bnext.recompute():
            hidden = net[1](net[0](x))
            with bnext.recompute():
                y = net[2](hidden)
            return net[2](net[1](net[0](x))) + y

    shapes["nested"], _ = kept(lambda: nested(net, x), block=False)
    assert shapes["nested"].count((2, 4, 6, 6)) == 2  # two batch norms' x
    same(net, x, nested)

    losses = []
    with bnext.recompute():
        for _ in range(2):
            losses.append(net(x).sum())
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    grad = net[0].weight.grad.clone()
    net.zero_grad()
    for _ in range(2):
        net(x).sum().backward()
    torch.testing.assert_close(grad, net[0].weight.grad)


# ---- models


def test_a_model_takes_it_along():
    net, x = block(), torch.randn(2, 3, 8, 8)
    assert bnext.recompute(bnext.recompute(net)) is net
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        shapes, _ = kept(lambda model=model: model(x), block=False)
        assert shapes.count((2, 4, 6, 6)) == 1
        assert len(model._forward_hooks) == 1
    bnext.recompute(net, False)
    shapes, _ = kept(lambda: net(x), block=False)
    assert shapes.count((2, 4, 6, 6)) == 2 and not net._forward_hooks and not net._forward_pre_hooks


def test_a_model_that_fails_before_it_begins():
    """Hooks that end a block run although another one failed before it began."""
    inner, outer, x = block(), nn.ModuleList(), torch.randn(2, 3, 8, 8)

    def fail(module, args):
        raise ValueError

    inner.register_forward_pre_hook(fail)
    bnext.recompute(inner)

    class Outer(nn.Module):
        def forward(self, x):
            with pytest.raises(ValueError):
                inner(x)
            assert bnext.recomputation.here.block is not None
            return outer[0](x)

    outer.append(block())
    shapes, _ = kept(lambda: bnext.recompute(Outer())(x), block=False)
    assert shapes.count((2, 4, 6, 6)) == 1


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_graphs_are_left_alone(inside):
    net, x = block(), torch.randn(2, 3, 8, 8)

    def step(x):
        if inside:
            with bnext.recompute():
                return net(x)
        return net(x)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    if inside:
        y = compiled(x)
    else:
        with bnext.recompute():
            y = compiled(x)
    y.sum().backward()
    grad = net[0].weight.grad.clone()
    net.zero_grad()
    net(x).sum().backward()
    torch.testing.assert_close(grad, net[0].weight.grad)
    bnext.recompute(net)
    torch.compile(net, backend="aot_eager", fullgraph=True)(x).sum().backward()


def test_memory_tells_what_is_kept():
    net = nn.Sequential(Residual(3), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    x = torch.randn(2, 3, 6, 5)
    report = bnext.memory(net, x)
    size = 2 * 4 * 6 * 5 * 4
    assert report["0.convolutions.1"] == (size, 0)  # its input, which follows from the first block's
    assert report["1"] == (2 * 2 * 6 * 5 * 4,) * 2  # its result, which the convolution behind it keeps, too
    assert report.total.before > report.total.after
    assert "0.convolutions.1" in str(report) and "total" in str(report)
    assert net[0].norms[0].num_batches_tracked == 0 and not net[0]._forward_hooks


def test_outputs_of_torchs_operators_are_kept():
    """Where the kernels do not go there is no recipe, and all works as without."""
    net = block()
    x = torch.randn(2, 3, 8, 8)
    same(net, x, lambda net, x: net[2](net[1](net[0](x), torch.ones(1, 4, 1, 1))))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    same(plain, x)


#: Of what a fused network keeps, the part that recompute need not keep.
SAVED = {"lenet": 0.3, "resnet18": 0.37, "resnet50": 0.35, "densenet121": 0.47, "mobilenet_v2": 0.46, "unet": 0.37}


@pytest.mark.parametrize("name", SAVED)
def test_networks(device, name):
    make, size = NETWORKS[name]
    net = bnext.fuse(make()).to(device)
    x = torch.randn(2, 3, min(size, 64), min(size, 64), device=device)
    total = bnext.memory(net, x).total
    assert 1 - total.after / total.before >= SAVED[name]
    same(net, x)


# ---- anything


#: Steps of a random graph: functions of two tensors, a batch norm and a convolution.
STEPS = [
    lambda x, r, norm, convolution: norm(x),
    lambda x, r, norm, convolution: norm(x, r),
    lambda x, r, norm, convolution: norm(convolution(x), r),
    lambda x, r, norm, convolution: norm(x.transpose(2, 3), r.transpose(2, 3).contiguous()).transpose(2, 3),
    lambda x, r, norm, convolution: norm(x.reshape(2, 4, 30, 1), r.reshape(2, 4, 30, 1)).view_as(x),
    lambda x, r, norm, convolution: norm(torch.cat([x, r])[1:3]),
    lambda x, r, norm, convolution: convolution(x),
    lambda x, r, norm, convolution: F.relu(norm(convolution(x)), inplace=True),
    lambda x, r, norm, convolution: torch.sigmoid(x) * r,
    lambda x, r, norm, convolution: norm(x).mul_(0.5),
    lambda x, r, norm, convolution: torch.cat([x[:, :2], norm(r)[:, 2:]], 1),
    lambda x, r, norm, convolution: F.max_pool2d(norm(x), 3, 1, 1),
    lambda x, r, norm, convolution: norm(norm(x).detach()) + x,
    lambda x, r, norm, convolution: checkpoint(lambda t: norm(convolution(norm(t))), x, use_reentrant=False),
]


class Anything(nn.Module):
    """A random graph of them."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        draw = random.Random(seed)
        activations = [None, "relu", "relu6", "leaky_relu", "silu", "sigmoid"]
        self.norms = nn.ModuleList(bnext.BatchNorm2d(4, activation=draw.choice(activations)) for _ in range(4))
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        draw = random.Random(self.seed + 1)
        values = [x * 1.0]
        for _ in range(14):
            operands = draw.choice(values), draw.choice(values[-3:])
            layers = draw.choice(self.norms), draw.choice(self.convolutions)
            values.append(draw.choice(STEPS)(*operands, *layers))
        return sum(values)


@pytest.mark.parametrize("around", [contextlib.nullcontext, elsewhere], ids=["alone", "in other hooks"])
def test_anything(device, around):
    """Gradients to the bit, of a hundred graphs."""

    def run(net, x):
        with around():
            return net(x)

    def inside(net, x):
        with around(), bnext.recompute():
            return net(x)

    for seed in range(100):
        torch.manual_seed(seed)
        net = Anything(seed).to(device)
        x = torch.randn(2, 4, 6, 5, device=device)
        found, expected = (gradients(net, x, block=False, run=way) for way in (inside, run))
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), seed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_effect_in_a_traced_program():
    model = bnext.recompute(nn.Sequential(nn.Conv2d(3, 4, 1), bnext.BatchNorm2d(4, activation="relu"))).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
