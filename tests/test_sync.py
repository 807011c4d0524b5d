"""SyncBatchNorm in processes, each with a part of a batch, against float64 and the ordinary layer on the whole of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import pickle
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from problems import assert_exact, channels_last, contiguous, every_second
from processes import Processes
from torch import nn

import bnext
from bnext.activation import NAMES

CHANNELS = 5


@pytest.fixture(scope="module")
def processes():
    started = Processes(3)
    yield started
    started.close()


@functools.cache
def group_of(ranks, seconds=20):
    """The same object in every call of a process; all processes come here."""
    return dist.new_group(list(ranks), timeout=timedelta(seconds=seconds))


# ---- the whole batch, in every process; and what each has of it


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...] = (3, 1, 2)  # N in each process
    layouts: tuple = (contiguous,) * 3
    dtype: torch.dtype = torch.float64
    parameters: torch.dtype = torch.float64
    plane: tuple[int, ...] = (4, 3)
    activation: str | None = None
    residual: bool = False
    options: tuple = ()  # of the layer

    def layer(self, kind, **more):
        torch.manual_seed(1)
        made = kind(CHANNELS, activation=self.activation, dtype=self.parameters, **dict(self.options), **more)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.uniform_(0.5, 1.5)
        return made

    def tensor(self, seed):
        torch.manual_seed(seed)
        return torch.randn(sum(self.sizes), CHANNELS, *self.plane, dtype=torch.float64).add(seed % 3).to(self.dtype)

    def part(self, whole, index):
        return self.layouts[index](whole.split(self.sizes)[index])


def gathered(part, group):
    """By name, a list of what each process of the group has."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, {name: t.detach() for name, t in part.items()}, group=group)
    return {name: [p[name] for p in parts] for name in part}


def check(rank, case, ranks=(0, 1, 2), steps=2):
    """Two steps of training, and an evaluation, by the group of `ranks`."""
    group = group_of(ranks) if ranks != (0, 1, 2) else None
    if rank not in ranks:
        return
    index = ranks.index(rank)
    layer = case.layer(bnext.SyncBatchNorm, process_group=group)
    for step in range(steps):
        x, residual, dy = (case.tensor(10 * step + k) for k in range(3))
        px, presidual, pdy = (case.part(t, index).requires_grad_() for t in (x, residual, dy))
        before = [None if b is None else b.clone() for b in (layer.running_mean, layer.running_var)]
        py = layer(px, presidual if case.residual else None)
        assert py.stride() == torch.empty_like(px).stride()
        py.backward(pdy.detach())

        part = {"y": py, "dx": px.grad} | ({"dresidual": presidual.grad} if case.residual else {})
        found = {name: torch.cat(parts) for name, parts in gathered(part, group).items()}
        found |= gathered({f"d{name}": p.grad for name, p in layer.named_parameters()}, group)
        if layer.track_running_stats:  # each process has those of the whole
            found |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
            assert layer.num_batches_tracked == step + 1
        operands = x, layer.weight, layer.bias, *before
        options = {"dy": dy, "activation": case.activation, "residual": residual if case.residual else None}
        options["momentum"] = layer.momentum or 1 / (step + 1)
        options["unbiased"] = dict(case.options).get("unbiased", True)
        assert_exact(found, *operands, **options)
        layer.zero_grad()
    if layer.track_running_stats:  # without, each process evaluates by its own batch
        operands = x, layer.weight, layer.bias, layer.running_mean, layer.running_var
        y = torch.cat(gathered({"y": layer.eval()(px)}, group)["y"])
        assert_exact({"y": y}, *operands, activation=case.activation, training=False)


CASES = {
    "plain": Case(),
    "uneven": Case(sizes=(7, 1, 2)),
    "empty": Case(sizes=(4, 0, 2)),
    "empty but one": Case(sizes=(0, 0, 3)),
    "one value a process": Case(sizes=(1, 1, 1), plane=()),
    "one value and none": Case(sizes=(1, 0, 1), plane=()),
    "matrix": Case(plane=()),
    "layouts": Case(layouts=(contiguous, channels_last, every_second)),
    "float32": Case(dtype=torch.float32, parameters=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16, parameters=torch.float32, layouts=(channels_last, contiguous, contiguous)),
    "bfloat16 parameters": Case(dtype=torch.bfloat16, parameters=torch.bfloat16),
    "float16": Case(dtype=torch.float16, parameters=torch.float32, activation="relu", residual=True),
    "no affine": Case(options=(("affine", False),)),
    "no bias": Case(options=(("bias", False),), activation="silu"),
    "no tracking": Case(options=(("track_running_stats", False),)),
    "cumulative": Case(options=(("momentum", None),)),
    "biased": Case(options=(("unbiased", False),)),
    "relu": Case(activation="relu", sizes=(4, 0, 2)),
    "residual": Case(residual=True),
    "residual relu": Case(residual=True, activation="relu", sizes=(4, 0, 2), layouts=(contiguous, contiguous, channels_last)),
    "residual silu": Case(residual=True, activation="silu", sizes=(4, 0, 2), layouts=(contiguous, contiguous, channels_last)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_are_as_the_whole(processes, name):
    case = CASES[name]
    processes(check, case)
    if name in ("plain", "empty"):
        processes(check, replace(case, sizes=case.sizes[:2]), (0, 1))


# ---- the second order


class Shard(torch.autograd.Function):
    """This process's part of what all have. With `Gather`, which is its transpose, a computation in several processes is
    a function that each of them computes alike, as gradcheck needs it."""

    @staticmethod
    def forward(ctx, whole, sizes):
        ctx.sizes = sizes
        return whole.split(sizes)[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, gradient):
        return Gather.apply(gradient, ctx.sizes), None


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, sizes):
        ctx.sizes = sizes
        parts = [part.new_zeros(max(sizes), *part.shape[1:]) for _ in sizes]
        padded = torch.cat([part, part.new_zeros(max(sizes) - part.shape[0], *part.shape[1:])])
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return Shard.apply(gradient, ctx.sizes), None


class Copy(torch.autograd.Function):
    """What all have, used by each: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, whole):
        return whole.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Total.apply(gradient)


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part):
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return Copy.apply(gradient)


def in_processes(layer, sizes, x, weight, bias, residual):
    layer = copy.copy(layer)
    layer._parameters = {}
    layer.weight, layer.bias = Copy.apply(weight), Copy.apply(bias)
    residual = None if residual is None else Shard.apply(residual, sizes)
    return Gather.apply(layer(Shard.apply(x, sizes), residual), sizes)


def check_second_order(rank, activation, with_residual):
    case = Case(sizes=(2, 0, 1), plane=(2,), activation=activation, residual=with_residual)
    layer = case.layer(bnext.SyncBatchNorm, track_running_stats=False)
    x, residual, dy = (case.tensor(seed).requires_grad_() for seed in range(3))
    residual = residual if with_residual else None
    operands = [x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_(), residual]

    def synchronised(*operands):
        return in_processes(layer, case.sizes, *operands)

    def ordinary(x, weight, bias, residual):
        options = {"activation": activation, "residual": residual}
        return bnext.functional.batch_norm(x, None, None, weight, bias, True, **options)

    # Three orders, as the ordinary layer has them.
    found = [[function(*operands)] for function in (synchronised, ordinary)]
    inputs = [t for t in (*operands, dy) if t is not None]
    for order in range(3):
        for y, y_expected in zip(*found, strict=True):
            torch.testing.assert_close(y, y_expected, rtol=1e-10, atol=1e-10, msg=lambda m, o=order: f"order {o}: {m}")
        scalars = [sum((t * t * dy.mean()).sum() + t.sum() for t in f) if order else (f[0] * dy).sum() for f in found]
        found = [torch.autograd.grad(s, inputs, create_graph=True, materialize_grads=True) for s in scalars]
    if activation in (None, "silu"):
        inputs = [t for t in operands if t is not None]
        function = synchronised if with_residual else lambda *three: synchronised(*three, None)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, grad_outputs=dy, fast_mode=True)


def check_second_order_in_16_bits(rank, activation):
    options = {"dtype": torch.bfloat16, "parameters": torch.bfloat16, "residual": True}
    case = Case(sizes=(3, 0, 2), activation=activation, **options)
    whole, part = case.layer(bnext.BatchNorm2d), case.layer(bnext.SyncBatchNorm)
    tensors = [case.tensor(seed) for seed in range(3)]
    results = []
    for layer, operands in ((whole, tensors), (part, [case.part(t, rank) for t in tensors])):
        x, residual, dy = (t.clone().requires_grad_() for t in operands)
        inputs = [x, residual, layer.weight]
        first = torch.autograd.grad(layer(x, residual), inputs, dy, create_graph=True)
        # The sum over processes of what each has of it, since it is linear in dweight.
        scalar = first[0].float().square().sum() + first[2].float().sum()
        results.append(torch.autograd.grad(scalar, [x, dy]))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        expected = expected.split(case.sizes)[rank].float()
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * results[0][0].abs().max().item())


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_second_order_in_16_bits(processes, activation):
    processes(check_second_order_in_16_bits, activation)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_second_order(processes, activation, with_residual):
    processes(check_second_order, activation, with_residual)


def check_saved_tensors_with_other_strides(rank):
    case = Case(layouts=(channels_last,) * 3, activation="relu", residual=True)
    x, residual = (case.part(case.tensor(seed), rank).requires_grad_() for seed in (0, 1))
    results = []
    for unpack in (lambda t: t, lambda t: t.contiguous()):
        layer = case.layer(bnext.SyncBatchNorm)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
            first = torch.autograd.grad(layer(x, residual).square().sum(), (x, residual), create_graph=True)
            results.append((*first, *torch.autograd.grad(first[0].square().sum(), (x, residual))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_saved_tensors_with_other_strides(processes):
    processes(check_saved_tensors_with_other_strides)


# ---- collectives


def collectives(function):
    """What it returns, and the names of the collectives that it takes."""
    with torch.autograd.profiler.profile() as profile:
        result = function()
    return result, [event.name for event in profile.function_events if event.name.startswith("c10d::")]


def check_one_collective_each_way(rank):
    case = Case(sizes=(3, 0, 2), activation="silu", residual=True)
    layer, x = case.layer(bnext.SyncBatchNorm), case.part(case.tensor(0), rank).requires_grad_()
    y, forward = collectives(lambda: layer(x, x))
    assert forward == ["c10d::_allgather_base_"]
    _, backward = collectives(lambda: y.sum().backward(retain_graph=True))
    assert backward == ["c10d::allreduce_"]
    _, recorded = collectives(lambda: torch.autograd.grad(y.sum(), x, create_graph=True))
    assert recorded == ["c10d::allreduce_"]
    first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    _, second = collectives(lambda: torch.autograd.grad(first.square().sum(), x))
    assert second == ["c10d::allreduce_"] * 7  # three sums, their gradients, and the first order again
    # An input that needs no gradient takes none, and neither does evaluation.
    assert collectives(lambda: layer(x.detach()).sum().backward())[1] == ["c10d::_allgather_base_"]
    assert collectives(lambda: layer.eval()(x))[1] == []


def test_one_collective_each_way(processes):
    processes(check_one_collective_each_way)


def check_types_side_by_side(rank):
    dtype = (torch.bfloat16, torch.float16, torch.float32)[rank]
    case = Case(sizes=(5, 4, 6))
    layer = bnext.SyncBatchNorm(CHANNELS)
    parts = [
        p.to(t)
        for p, t in zip(case.tensor(0).split(case.sizes), (torch.bfloat16, torch.float16, torch.float32), strict=True)
    ]
    y = layer(parts[rank])
    assert y.dtype == dtype
    whole = torch.cat([p.double() for p in parts])
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * whole.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), 0.9 + 0.1 * whole.var((0, 2, 3)), rtol=1e-5, atol=0)


def test_types_side_by_side(processes):
    processes(check_types_side_by_side)


def check_alone(rank):
    """A group of this process alone, and a group without it."""
    groups = [dist.new_group([r]) for r in range(3)]
    case = Case(sizes=(2, 3, 4))
    for group in groups:
        whole, part = case.layer(bnext.BatchNorm2d), case.layer(bnext.SyncBatchNorm, process_group=group)
        x = case.part(case.tensor(0), rank)
        expected = whole(x)
        y, taken = collectives(functools.partial(part, x))
        assert torch.equal(y, expected) and taken == []
        assert torch.equal(part.running_var, whole.running_var)


def test_a_group_of_one_is_the_ordinary_layer(processes):
    processes(check_alone)


def check_groups_side_by_side(rank):
    """Two groups that share a process, one layer each."""
    for ranks in ((0, 1), (1, 2)):
        group = group_of(ranks)
        if rank in ranks:
            check(rank, Case(sizes=(3, 1), activation="relu"), ranks)
        assert group is not None


def test_groups_side_by_side(processes):
    processes(check_groups_side_by_side)


def check_statistics_are_equal(rank):
    """To the bit, in every process."""
    case = Case(sizes=(3, 1, 2), dtype=torch.float32, parameters=torch.float32, options=(("momentum", None),))
    layer = case.layer(bnext.SyncBatchNorm)
    for step in range(3):
        layer(case.part(case.tensor(step), rank))
    mine = torch.cat([layer.running_mean, layer.running_var])
    others = [torch.empty_like(mine) for _ in range(3)]
    dist.all_gather(others, mine)
    assert all(torch.equal(other, mine) for other in others)


def test_all_processes_have_the_same_bits(processes):
    processes(check_statistics_are_equal)


def check_absent(rank, forward):
    """Process 1 does not come: into the layer, or into its backward."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    model = nn.Sequential(nn.Sequential(bnext.BatchNorm2d(CHANNELS, activation="relu")))
    layer = bnext.convert_sync_batchnorm(model, group)
    if rank < 2:
        y = None
        if rank == 0 or not forward:
            x = Case().part(Case().tensor(0).float(), rank).requires_grad_()
            before = copy.deepcopy([b.clone() for b in layer.buffers()])
            expectation = pytest.raises(RuntimeError) if forward else contextlib.nullcontext()
            start = time.monotonic()
            with expectation as caught:
                y = layer(x)
        if rank == 0 and not forward:
            start = time.monotonic()
            with pytest.raises(RuntimeError) as caught:
                y.sum().backward()
        if rank == 0:
            assert time.monotonic() - start < 10
            message = str(caught.value)
            assert "bnext.SyncBatchNorm(5) '0.0'" in message and f"group {group.group_name!r}" in message, message
            assert ("all_gather" if forward else "all_reduce") in message and "processes [0, 1]" in message
            assert "imed out" in message
            if forward:
                assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    dist.barrier()


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_a_process_that_does_not_come_is_an_error_with_names(processes, forward):
    processes(check_absent, forward)


def check_mistakes(rank):
    """Found before the others wait: none of these takes a collective, or changes anything."""
    layer = bnext.SyncBatchNorm(3, activation="relu")
    x = torch.randn(2, 3, 4, 4)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    mistakes = [
        (ValueError, r"expected at least 2D input \(got 1D input\)", lambda: layer(torch.randn(3))),
        (ValueError, "number of input channels should be non-zero", lambda: layer(torch.randn(2, 0, 4))),
        (RuntimeError, "weight should contain 5 elements not 3", lambda: layer(torch.randn(2, 5, 4))),
        (RuntimeError, "residual should have the shape of input", lambda: layer(x, x[:1])),
        (RuntimeError, "residual should have the dtype of input", lambda: layer(x, x.double())),
        (NotImplementedError, "input should be float32, float64", lambda: layer(x.int())),
        (RuntimeError, "weight should be float64", lambda: layer(x.double())),
    ]
    for kind, words, call in mistakes:
        with torch.autograd.profiler.profile() as profile, pytest.raises(kind, match=words):
            call()
        assert not [event.name for event in profile.function_events if event.name.startswith("c10d::")]
    with torch.inference_mode():
        frozen = bnext.SyncBatchNorm(3)
    with pytest.raises(RuntimeError, match="running_mean is an inference tensor"):
        frozen.requires_grad_(False)(x)
    # Of all processes together; found behind the collective, before anything is changed.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(int(rank == 1), 3))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_mistakes(processes):
    processes(check_mistakes)


# ---- the statistics of a data set


class TorchsOnCpu(nn.SyncBatchNorm):
    """Torch's layer, whose own forward takes no CPU tensors where several processes take part."""

    def forward(self, input):
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, training=True)


#: N of each batch in each process.
SHARES = {"even": [(2, 2, 2), (2, 2, 2)], "uneven": [(3, 0, 2), (1, 4, 0)], "empty but one": [(0, 3, 0), (0, 2, 0)]}


def check_statistics_of_all(rank, kind, shares, ranks=(0, 1, 2)):
    """Every process of the group ends with those of all values that it has normalized, to the bit."""
    group = group_of(ranks)
    sizes = [n if r in ranks else 2 for step in shares for r, n in enumerate(step)]
    values = [torch.randn(n, CHANNELS, 4).double() + 10 * (i % 3) for i, n in enumerate(sizes)]
    layer = kind(CHANNELS, process_group=group).double()
    bnext.update_statistics(nn.Sequential(layer), values[rank::3], progress=False)
    mine = torch.cat([layer.running_mean, layer.running_var])
    if rank in ranks:
        seen = torch.cat([x for i, x in enumerate(values) if i % 3 in ranks])
        assert all(torch.equal(other, mine) for other in gathered({"mine": mine}, group)["mine"])
    else:
        seen = torch.cat(values[rank::3])
    torch.testing.assert_close(layer.running_mean, seen.mean((0, 2)))
    torch.testing.assert_close(layer.running_var, seen.var((0, 2)))
    assert layer.num_batches_tracked == len(shares)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", [bnext.SyncBatchNorm, TorchsOnCpu])
def test_statistics_of_a_data_set_are_those_of_all_processes(processes, kind, share):
    processes(check_statistics_of_all, kind, SHARES[share])


def test_statistics_of_a_data_set_in_a_part_of_the_processes(processes):
    processes(check_statistics_of_all, bnext.SyncBatchNorm, SHARES["even"], (0, 2))


def check_statistics_of_each(rank):
    """Layers that normalize by their own process keep to it; several synchronised ones are gathered in their order; one
    that nobody calls keeps its statistics."""
    ours = nn.Sequential(bnext.BatchNorm1d(3), *(bnext.SyncBatchNorm(3) for _ in range(3))).double()
    x = torch.randn(6, 3).double() + torch.tensor([0.0, 10, 20]).repeat(2)[:, None]
    bnext.update_statistics(ours, [x[rank::3]], forward=lambda model, x: model[:3](x), progress=False)
    torch.testing.assert_close(ours[0].running_mean, x[rank::3].mean(0))
    first = [nn.functional.batch_norm(x[r::3], None, None, training=True) for r in range(3)]
    torch.testing.assert_close(ours[1].running_var, torch.cat(first).var(0))
    second = nn.functional.batch_norm(torch.cat(first), None, None, training=True)
    torch.testing.assert_close(ours[2].running_var, second.var(0))
    assert ours[3].num_batches_tracked == 0 and torch.equal(ours[3].running_var, torch.ones(3).double())


def test_statistics_of_a_data_set_layer_by_layer(processes):
    processes(check_statistics_of_each)


def check_statistics_of_a_process_that_fails(rank):
    """Behind its last batch, so that the others have seen theirs."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    layer = bnext.SyncBatchNorm(3, process_group=group)

    def loader():
        yield torch.randn(4, 3)
        if rank == 1:
            raise ValueError("the loader fails")

    before = [t.clone() for t in layer.buffers()]
    if rank < 2:
        with pytest.raises(ValueError if rank else RuntimeError) as caught:
            bnext.update_statistics(nn.Sequential(layer), loader(), progress=False)
        assert rank == 1 or "update_statistics: 0: gathering" in str(caught.value), caught.value
        assert rank == 1 or "processes [0, 1]" in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
        assert layer.training and not layer._forward_pre_hooks
    dist.barrier()


def test_statistics_of_a_data_set_that_a_process_does_not_finish(processes):
    processes(check_statistics_of_a_process_that_fails)


# ---- in a model


class OnAnyDevice(nn.parallel.DistributedDataParallel):
    """Without the check that refuses torch.nn.SyncBatchNorm, and all that is one, on the CPU."""

    def _passing_sync_batchnorm_handle(self, module):
        pass


def convolutions(activation):
    torch.manual_seed(2)
    layers = [nn.Conv2d(CHANNELS, 4, 3, padding=1), bnext.BatchNorm2d(4, activation=activation)]
    return nn.Sequential(*layers, nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(36, 1)).double()


def train_alike(whole, x, part, mine, weight):
    """Three steps of one process on all of x, and of one of several on its share, whose loss counts by `weight`."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, part)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        whole(x).square().mean().backward()
        (part(mine).square().sum() * weight).backward()
        for optimizer in optimizers:
            optimizer.step()


def check_data_parallel(rank):
    case = Case(sizes=(3, 2, 1), layouts=(contiguous, channels_last, contiguous))
    x = case.tensor(0)
    whole, part = convolutions("silu"), bnext.convert_sync_batchnorm(convolutions("silu"))
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        nn.parallel.DistributedDataParallel(part)
    # Gradients are averaged over processes, losses are not averages of as many samples.
    train_alike(whole, x, OnAnyDevice(part), case.part(x, rank), 3 / sum(case.sizes))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(part.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_distributed_data_parallel(processes):
    processes(check_data_parallel)


def check_fully_sharded(rank, synchronised):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def model():
        return bnext.convert(convolutions("relu"))

    case = Case(sizes=(3, 2, 1), layouts=(contiguous, channels_last, contiguous))
    x = case.tensor(0)
    whole, part = model(), bnext.convert_sync_batchnorm(model()) if synchronised else model()
    mine, scale = (case.part(x, rank), 3) if synchronised else (x, 1)
    mesh = init_device_mesh("cpu", (3,))
    for layer in (part[0], part[1], part):
        fully_shard(layer, mesh=mesh)
    train_alike(whole, x, part, mine, scale / sum(case.sizes))  # gradients are averaged
    for name, value in part.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-10, atol=1e-12, msg=name)
    torch.testing.assert_close(part.eval()(mine), whole.eval()(mine))

    theirs = nn.Sequential(fully_shard(nn.BatchNorm2d(4), mesh=mesh))
    with pytest.raises(ValueError, match="0: fully_shard has changed its class: convert the model before that"):
        bnext.convert(theirs, strict=True)
    with pytest.raises(TypeError, match="0: fully_shard has changed its class: convert the model before that"):
        bnext.convert_sync_batchnorm(theirs)


@pytest.mark.parametrize("synchronised", [False, True])
def test_fully_sharded(processes, synchronised):
    processes(check_fully_sharded, synchronised)


def check_recomputation(rank):
    torch.manual_seed(2)
    layers = [nn.Conv2d(CHANNELS, 4, 3, padding=1), bnext.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 3, 1)]
    model = OnAnyDevice(bnext.convert_sync_batchnorm(nn.Sequential(*layers)))
    x = torch.randn(2 + rank, CHANNELS, 4, 4)
    shape, found = (2 + rank, 4, 4, 4), []
    model(x).sum().backward()  # behind which DistributedDataParallel adds in another order
    model.zero_grad()
    for block in (contextlib.nullcontext(), bnext.recompute()):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t), block:  # noqa: B023
            loss = model(x).square().sum()
        loss.backward()
        found.append((shapes.count(shape), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    (without, expected), (inside, gradients) = found
    assert (without, inside) == (2, 1)
    for a, b in zip(expected, gradients, strict=True):
        assert torch.equal(a, b)


def test_recomputation(processes):
    processes(check_recomputation)


def check_recomputation_of_sharded_layers(rank):
    """FSDP frees a layer's parameters between its forward and its backward, in which time it is recomputed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (3,))
    torch.manual_seed(rank)
    x = torch.randn(2, CHANNELS, 4, 4)
    results = []
    for block in (contextlib.nullcontext(), bnext.recompute()):
        torch.manual_seed(3)
        layers = [nn.Conv2d(CHANNELS, 4, 1)]
        for activation in ("relu", "silu", "relu"):
            layers += [bnext.BatchNorm2d(4, activation=activation), nn.Conv2d(4, 4, 1)]
            nn.init.uniform_(layers[-2].weight, 0.5, 1.5)
        model = nn.Sequential(*layers)
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        with block:
            loss = model(x).square().sum()
        loss.backward()
        results.append([p.grad.full_tensor() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_recomputation_of_sharded_layers(processes):
    processes(check_recomputation_of_sharded_layers)


def check_autocast(rank):
    torch.manual_seed(3)
    model = bnext.convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 6), bnext.BatchNorm1d(6, activation="relu")))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(5, 4))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


def test_autocast(processes):
    processes(check_autocast)


def check_compiled(rank):
    case = Case(sizes=(3, 2, 1), dtype=torch.float32, parameters=torch.float32, activation="relu", residual=True)
    x, residual, dy = (case.part(case.tensor(seed), rank) for seed in range(3))
    results = []
    for compiled in (False, True):
        layer = case.layer(bnext.SyncBatchNorm)
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = run(*leaves)
        y.backward(dy)
        results.append([y, *(t.grad for t in (*leaves, *layer.parameters())), *layer.buffers()])
    for compiled, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
def test_compiles_to_one_graph(processes):
    processes(check_compiled)


# ---- conversion, which needs no processes


def network():
    torch.manual_seed(4)
    shared = bnext.BatchNorm1d(4, activation=nn.LeakyReLU(0.2))
    return nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4, eps=1e-3, momentum=None),
        nn.ModuleDict({"a": shared, "b": bnext.BatchNorm1d(4, affine=False), "c": shared}),
        bnext.BatchNorm1d(4, track_running_stats=False, activation="silu"),
        nn.SyncBatchNorm(4),
    )


def test_conversion_loses_nothing():
    before = network()
    before[1].eval()
    before[1].weight.requires_grad_(False)
    calls, layers = [], dict(before.named_modules())
    handle = before[2]["a"].register_forward_hook(lambda *_: calls.append("hook"))
    before[3].note, before[3].qconfig = "kept", "int8"
    values = before.state_dict()
    after = bnext.convert_sync_batchnorm(before)
    assert after is before
    assert list(after.state_dict()) == list(values)
    converted = {name: m for name, m in after.named_modules(remove_duplicate=False) if "BatchNorm" in type(m).__name__}
    assert list(converted) == ["1", "2.a", "2.b", "2.c", "3", "4"]
    for name, layer in converted.items():
        old = layers[name if name != "2.c" else "2.a"]
        assert type(layer) is bnext.SyncBatchNorm and layer is not old
        for key in ("eps", "momentum", "affine", "track_running_stats", "training", "weight", "bias", "running_mean"):
            assert getattr(layer, key) is getattr(old, key), (name, key)
        assert layer.num_batches_tracked is old.num_batches_tracked
        assert layer.activation == getattr(old, "activation", None)
        assert layer.activation_param == getattr(old, "activation_param", None)
        assert layer.process_group is None
    assert after[2]["a"] is after[2]["c"]
    assert not after[1].training and not after[1].weight.requires_grad
    assert (after[3].note, after[3].qconfig) == ("kept", "int8")
    after[2]["a"](torch.randn(3, 4))
    handle.remove()
    after[2]["a"](torch.randn(3, 4))
    assert calls == ["hook"]


def test_conversion_of_a_layer_itself():
    layer = bnext.BatchNorm2d(4, activation="relu")
    after = bnext.convert_sync_batchnorm(layer, "group")
    assert type(after) is bnext.SyncBatchNorm and after.process_group == "group" and after.activation == "relu"
    after.process_group = None
    x, residual = torch.randn(2, 2, 4, 3, 3)
    assert torch.equal(after(x, residual), bnext.BatchNorm2d(4, activation="relu")(x, residual))
    assert torch.equal(layer.running_mean, after.running_mean)
    new = torch.zeros(4)
    after.running_mean = new
    assert layer.running_mean is not new
    other = nn.Linear(2, 2)
    assert bnext.convert_sync_batchnorm(other) is other


class Own(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input) + 1


class OwnCheck(bnext.BatchNorm1d):
    def _check_input_dim(self, input):
        assert input.shape[0] > 1


def test_what_conversion_would_lose_is_an_error():
    parametrized = nn.BatchNorm1d(4)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    mistakes = [
        (Own(4), TypeError, r"1\.1: \S*Own has its own forward$"),
        (OwnCheck(4), TypeError, r"1\.1: \S*OwnCheck has its own _check_input_dim$"),
        (bnext.nn.BatchNormAct2d(4), TypeError, r"1\.1: bnext\.BatchNormAct2d has its own _batch_norm$"),
        (parametrized, TypeError, r"1\.1: it is parametrized"),
        (nn.LazyBatchNorm1d(), ValueError, r"1\.1: torch\.nn\.LazyBatchNorm1d should have seen a batch"),
    ]
    for layer, kind, words in mistakes:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.Identity(), layer))
        with pytest.raises(kind, match=words):
            bnext.convert_sync_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm1d


def test_torchs_conversion_does_not_drop_an_activation():
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    for layer in (bnext.BatchNorm2d(4, activation="relu"), bnext.SyncBatchNorm(4, activation="relu")):
        with pytest.raises(RuntimeError, match="drop activation='relu' of .*use bnext.convert_sync_batchnorm"):
            convert(nn.Sequential(nn.Conv2d(3, 4, 1), layer))
    converted = convert(nn.Sequential(nn.Conv2d(3, 4, 1), bnext.BatchNorm2d(4)))
    assert type(converted[1]) is nn.SyncBatchNorm


@pytest.mark.parametrize("activation", [None, "relu"])
def test_convert_and_revert(activation):
    model = bnext.convert(nn.Sequential(nn.SyncBatchNorm(4)))
    assert type(model[0]) is bnext.SyncBatchNorm
    model[0].activation = activation
    x = torch.randn(3, 4, 5, 5)
    expected = model.eval()(x)
    reverted = bnext.revert(model, inplace=False)
    assert (type(reverted[0]) is nn.SyncBatchNorm) == (activation is None)
    torch.testing.assert_close(reverted(x), expected)
    assert torch.equal(bnext.convert(reverted)(x), expected)


def test_is_torchs_own_class():
    layer, theirs = bnext.SyncBatchNorm(3), nn.SyncBatchNorm(3)
    assert isinstance(layer, nn.SyncBatchNorm)
    assert repr(layer) == repr(theirs)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(layer.state_dict())
    expected = inspect.signature(nn.SyncBatchNorm).parameters
    parameters = dict(inspect.signature(bnext.SyncBatchNorm).parameters)
    assert parameters.pop("activation").default is None and parameters.pop("activation_param").default is None
    assert parameters.pop("weight").default is parameters.pop("bias").default is True
    assert parameters.pop("decay").default is parameters.pop("unbiased").default is None
    found = [(name, p.kind, p.default) for name, p in parameters.items()]
    assert found == [(name, p.kind, p.default) for name, p in expected.items() if name != "bias"]
    made = bnext.SyncBatchNorm(3, 1e-3, 0.2, True, True, "group", "cpu", torch.float64, activation="relu", bias=False)
    assert (made.process_group, made.weight.dtype, made.bias, made.eps) == ("group", torch.float64, None, 1e-3)
    assert repr(made).endswith("activation='relu')")


def test_copies():
    layer = bnext.convert_sync_batchnorm(nn.Sequential(bnext.BatchNorm1d(3, activation="leaky_relu")))[0]
    x = torch.randn(4, 3)
    layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    restored = torch.load(saved, weights_only=False)
    others = pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), restored
    expected = layer(x)
    for other in others:
        assert torch.equal(other(x), expected) and other.activation == "leaky_relu"
        assert torch.equal(other.running_mean, layer.running_mean)


def test_without_torch_distributed_it_is_the_ordinary_layer():
    layer, ordinary = bnext.SyncBatchNorm(3, activation="tanh"), bnext.BatchNorm2d(3, activation="tanh")
    x, residual = torch.randn(2, 4, 3, 5, 5)
    assert torch.equal(layer(x, residual), ordinary(x, residual))
    assert torch.equal(layer.running_var, ordinary.running_var)
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        layer(torch.randn(3))
