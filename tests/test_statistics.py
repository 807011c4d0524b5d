"""freeze, unfreeze, update_statistics, and the statistics under checkpointing."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnext


def data(batches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 5, 4, generator=generator) * (1 + i) + 3 * i for i, n in enumerate(batches)]


@pytest.mark.parametrize("kind", [bnext.BatchNorm2d, nn.BatchNorm2d])
def test_statistics_are_those_of_the_population(kind):
    batches = data([4, 4, 1, 7])
    net = nn.Sequential(kind(3), nn.Dropout(0.5)).train()
    net[0].running_mean.fill_(100)
    bnext.update_statistics(net, [(x, "label") for x in batches], progress=False)
    everything = torch.cat(batches).double()
    torch.testing.assert_close(net[0].running_mean.double(), everything.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net[0].running_var.double(), everything.var((0, 2, 3)), rtol=1e-6, atol=1e-6)
    assert net[0].num_batches_tracked == 4 and net[0].momentum == 0.1
    assert net.training and net[0].training and net[1].training


def test_later_layers_see_what_training_shows_them():
    """Each batch norm normalizes by its batch meanwhile: the second sees the first's training output."""
    batches = data([4, 6])
    net = nn.Sequential(bnext.BatchNorm2d(3), bnext.BatchNorm2d(3)).double()
    bnext.update_statistics(net, [x.double() for x in batches], progress=False)
    seen = torch.cat([nn.functional.batch_norm(x.double(), None, None, training=True) for x in batches])
    torch.testing.assert_close(net[1].running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, seen.var((0, 2, 3)))


def test_a_failure_changes_nothing():
    net = nn.Sequential(bnext.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    before = copy.deepcopy(net.state_dict())
    for loader, error in (([*data([4]), torch.randn(2, 5, 4, 4)], RuntimeError), ([], ValueError)):
        with pytest.raises(error):
            bnext.update_statistics(net, loader, progress=False)
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
        assert not net.training and not net[0]._forward_pre_hooks and net[0].momentum == 0.1
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        bnext.update_statistics(nn.Sequential(bnext.BatchNorm2d(3, track_running_stats=False)), data([4]))


@pytest.mark.parametrize("library", [bnext, nn])
def test_lazy_layers_begin_with_the_first_batch(library):
    net = nn.Sequential(library.LazyBatchNorm2d(momentum=None), nn.LazyConv2d(4, 1), library.LazyBatchNorm2d())
    net.eval()
    batches = data([4, 6])
    bnext.update_statistics(net, batches, progress=False)
    assert [type(layer) for layer in net] == [library.BatchNorm2d, nn.Conv2d, library.BatchNorm2d]
    torch.testing.assert_close(net[0].running_mean, torch.cat(batches).mean((0, 2, 3)))
    torch.testing.assert_close(net[0].running_var, torch.cat(batches).var((0, 2, 3)))
    assert net[0].num_batches_tracked == net[2].num_batches_tracked == 2 and net[2].running_var.shape == (4,)
    assert not any(module.training for module in net.modules()) and not net[0]._forward_pre_hooks
    assert net[0].weight.requires_grad and torch.equal(net[0].weight, torch.ones(3))


def test_lazy_layers_that_see_nothing():
    """They stay as they are; without a value, or after a failure, they have the statistics of a new layer."""
    net = nn.Sequential(bnext.LazyBatchNorm2d(), bnext.LazyBatchNorm2d(), nn.LazyBatchNorm2d(affine=False))
    new = list(bnext.BatchNorm2d(3).buffers())

    def forward(model, x):
        model[0](x), model[1](x[:0])

    def update(loader):
        bnext.update_statistics(net, loader, forward=forward, progress=False)

    def as_new(layer):
        return all(torch.equal(t, u) for t, u in zip(layer.buffers(), new, strict=True))

    with pytest.raises(ValueError, match="loader is empty"):
        update([])
    assert all(layer.has_uninitialized_params() for layer in net)
    with pytest.raises(RuntimeError):
        update([*data([4]), torch.randn(2, 5, 4, 4)])
    assert as_new(net[0]) and as_new(net[1])
    update(data([4, 6]))
    assert not as_new(net[0]) and as_new(net[1]) and net[2].has_uninitialized_params()


def test_forward_and_progress(capsys):
    net = nn.Sequential(bnext.BatchNorm2d(3))
    batches = [{"image": x} for x in data([4, 4])]
    bnext.update_statistics(net, batches, forward=lambda model, b: model(b["image"]), progress=True)
    assert "of 2 batches" in capsys.readouterr().err
    assert net[0].running_mean.abs().sum() > 0


@pytest.mark.parametrize("activation", [None, "silu"])
def test_frozen_layers_evaluate_in_training_mode(activation):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net(torch.randn(8, 3, 6, 6))
    bnext.convert(net)
    net[1].activation = activation
    before = copy.deepcopy(net.state_dict())
    evaluating = copy.deepcopy(net).eval()
    bnext.freeze(net)
    assert net.training and net.train()[1].frozen and "frozen=True" in repr(net)
    x, x2 = (torch.ones(2, 3, 6, 6, requires_grad=True) for _ in range(2))
    y, expected = net(x), evaluating(x2)
    assert torch.equal(y, expected)
    y.square().sum().backward(), expected.square().sum().backward()
    assert torch.equal(x.grad, x2.grad) and net[1].weight.grad is None
    assert torch.equal(net[0].weight.grad, evaluating[0].weight.grad)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    reverted = bnext.revert(net, inplace=False)
    torch.testing.assert_close(reverted.train()(x), expected)
    assert copy.deepcopy(net)[1].frozen
    bnext.unfreeze(net)
    assert not net[1].frozen and net[1].weight.requires_grad
    net(x)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


def test_frozen_parameters_can_go_on_training():
    layer = bnext.freeze(bnext.BatchNorm2d(3), parameters=False)
    layer(torch.randn(2, 3, 4, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_freezing_what_has_no_statistics():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="freeze: 1 has no running statistics"):
        bnext.freeze(net)
    assert type(net[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("lazy", [bnext.LazyBatchNorm2d, nn.LazyBatchNorm2d])
def test_freezing_what_has_seen_no_batch(lazy, parameters):
    net = nn.Sequential(nn.BatchNorm2d(3), lazy(affine=False), bnext.BatchNorm2d(3))
    with pytest.raises(ValueError, match="freeze: 1 should have seen a batch before it is frozen: Lazy.* is lazy"):
        bnext.freeze(net, parameters=parameters)
    assert [type(layer) for layer in net] == [nn.BatchNorm2d, lazy, bnext.BatchNorm2d]
    assert all(p.requires_grad for p in net.parameters()) and not net[2].frozen
    net(torch.ones(2, 3, 4, 4))
    assert bnext.freeze(net)[1].frozen


@pytest.mark.parametrize("as_is", [lambda model: model, bnext.revert], ids=["ours", "reverted"])
@pytest.mark.parametrize("update", ["bnext", "torch"])
def test_frozen_statistics_are_not_updated(update, as_is):
    net = nn.Sequential(bnext.BatchNorm2d(3), nn.Conv2d(3, 3, 1), bnext.BatchNorm2d(3))
    for x in data([4, 4]):
        net(x)
    bnext.freeze(net[0])
    net = as_is(net)
    before = copy.deepcopy(net.state_dict())
    if update == "bnext":
        bnext.update_statistics(net, data([4, 6], seed=1), progress=False)
    else:
        torch.optim.swa_utils.update_bn(data([4, 6], seed=1), net)
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]) == (not name.startswith("2.running")), name
    # The other one has seen what training shows it.
    seen = torch.cat([net[1](net[0](x)) for x in data([4, 6], seed=1)])
    if update == "bnext":
        torch.testing.assert_close(net[2].running_mean, seen.mean((0, 2, 3)))
    assert net[0].frozen and net[0].momentum == net[2].momentum == 0.1
    net[0].reset_parameters()  # does what it says
    assert net[0].running_mean.abs().sum() == 0


def test_nothing_to_update_where_all_is_frozen():
    with pytest.raises(ValueError, match="no batch norm with running statistics that is not frozen"):
        bnext.update_statistics(bnext.freeze(bnext.BatchNorm2d(3)), data([4]))


def test_the_input_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.ours, self.theirs, self.renamed = bnext.BatchNorm2d(3), nn.BatchNorm2d(3), Renamed(3)

        def forward(self, x):
            self.theirs(input=x), self.renamed(x=x)
            return self.ours(residual=x * 0, input=x)

    class Renamed(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    net, batches = ByKeyword(), data([4, 6])
    bnext.update_statistics(net, batches, progress=False)
    for layer in net.children():
        torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean((0, 2, 3)))


def test_a_layer_that_is_not_called_keeps_its_statistics():
    net = nn.Sequential(bnext.BatchNorm2d(3), bnext.BatchNorm2d(3), bnext.BatchNorm2d(3))
    for _ in range(5):
        net(data([4])[0])
    before = [copy.deepcopy(layer.state_dict()) for layer in net]

    def forward(model, x):
        model[0](x), model[2](x[:0])

    bnext.update_statistics(net, data([4, 6]), forward=forward, progress=False)
    assert net[0].num_batches_tracked == 2
    for i in (1, 2):  # the last one has seen nothing either
        assert all(torch.equal(t, before[i][name]) for name, t in net[i].state_dict().items())


def test_batches_that_come_to_no_layer():
    net = nn.ModuleDict({"norm": bnext.BatchNorm2d(3), "other": nn.BatchNorm2d(3)})
    net["norm"](data([4])[0])
    before = copy.deepcopy(net.state_dict())
    for forward in (lambda model, x: x, lambda model, x: model["norm"](x[:0])):
        with pytest.raises(ValueError, match="batch norms \\('norm', 'other'\\) with values, but none of 2 batches"):
            bnext.update_statistics(net, data([4, 6]), forward=forward, progress=False)
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items()) and net.training


#: What torch.compile makes of a model, given the model and how to compile.
COMPILED = {
    "torch.compile": torch.compile,
    "Module.compile": lambda net, **how: net.compile(**how) or net,
    "a part": lambda net, **how: nn.Sequential(net[0], torch.compile(net[1], **how)),
}


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("kind", [bnext.BatchNorm2d, nn.BatchNorm2d])
def test_graphs_from_before(compiled, kind):
    """Dynamo does not look whether a layer has got a hook since."""
    torch._dynamo.reset()
    net, batches = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4)), data([4, 6])
    twin = copy.deepcopy(net)
    bnext.update_statistics(twin, batches, progress=False)
    model = COMPILED[compiled](net, backend="aot_eager")
    for train in (False, True):
        with torch.no_grad():
            model.train(train)(batches[0])
    bnext.update_statistics(model, batches, progress=False)
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert net[1].num_batches_tracked == 2


def test_unfreeze_leaves_what_did_not_train_before():
    net = nn.Sequential(bnext.BatchNorm2d(3), bnext.BatchNorm2d(3, bias=False), bnext.BatchNorm2d(3))
    net[0].weight.requires_grad_(False)
    wanted = [p.requires_grad for p in net.parameters()]
    keys = [vars(layer).keys() - {"frozen"} for layer in net]
    bnext.freeze(net)
    bnext.freeze(net)  # again
    assert not any(p.requires_grad for p in net.parameters())
    net = copy.deepcopy(bnext.convert(bnext.revert(net)))
    bnext.unfreeze(net)
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert [vars(layer).keys() - {"frozen"} for layer in net] == keys
    bnext.freeze(net, parameters=False)
    net[2].weight.requires_grad_(False)
    bnext.unfreeze(net)
    assert not net[2].weight.requires_grad
    bnext.freeze(net)
    bnext.unfreeze(net, parameters=False)
    assert not any(p.requires_grad for p in net.parameters()) and not net[0].frozen


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_the_statistics_once(device, momentum):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), bnext.BatchNorm2d(4, momentum=momentum, activation="relu")).to(device)
    twin = copy.deepcopy(net)
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y = checkpoint(net, x, use_reentrant=False, context_fn=bnext.update_once)
    y.square().sum().backward()
    twin(x2).square().sum().backward()
    assert torch.equal(x.grad, x2.grad) and net[1].num_batches_tracked == 1
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), twin.buffers(), strict=True))


def test_held_statistics_end_with_the_block_and_stay_in_the_thread():
    norm = bnext.BatchNorm1d(3)
    x = torch.randn(4, 3)
    with bnext.hold_statistics(), bnext.hold_statistics():
        expected = norm(x)
        assert norm.num_batches_tracked == 0
        thread = threading.Thread(target=norm, args=(x,))
        thread.start(), thread.join()
        assert norm.num_batches_tracked == 1
    assert torch.equal(norm(x), expected) and norm.num_batches_tracked == 2
