"""Values that were worked out elsewhere: the worked examples of the documents that describe batch
normalization, and NumPy."""

import numpy as np
import pytest
import torch

import bnext
from bnext import reference


def tensor(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device)


def assert_golden(y, expected):
    """The documents print four decimals."""
    torch.testing.assert_close(y.detach().cpu(), torch.tensor(expected), rtol=0, atol=6e-5)


def test_a_matrix(device):
    x = tensor([[1, 3, 2, 4], [2, 2, 1, 1], [6, 2, 4, 1]], device)
    y = bnext.BatchNorm1d(4, eps=1e-12, device=device)(x)
    assert_golden(
        y,
        [
            [-0.9258, 1.4142, -0.2673, 1.4142],
            [-0.4629, -0.7071, -1.0690, -0.7071],
            [1.3887, -0.7071, 1.3363, -0.7071],
        ],
    )


def test_b_sequences(device):
    x = tensor([[[1, 3], [2, 4]], [[2, 2], [1, 1]], [[6, 2], [4, 1]]], device)
    y = bnext.BatchNorm1d(2, eps=1e-12, device=device)(x)
    assert_golden(
        y,
        [
            [[-1.0426, 0.2085], [-0.1240, 1.3644]],
            [[-0.4170, -0.4170], [-0.8682, -0.8682]],
            [[2.0851, -0.4170], [1.3644, -0.8682]],
        ],
    )


def test_c_images_without_parameters_or_buffers(device):
    x = tensor(
        [
            [[[3, 4], [1, 2]], [[3, 3], [1, 2]], [[4, 1], [4, 1]]],
            [[[2, 2], [1, 4]], [[3, 3], [1, 4]], [[2, 1], [2, 3]]],
            [[[4, 2], [4, 1]], [[1, 1], [2, 1]], [[3, 2], [2, 4]]],
        ],
        device,
    )
    m = bnext.BatchNorm2d(3, eps=1e-12, affine=False, track_running_stats=False)
    for mode in (m.train(), m.eval()):
        y = mode(x)
        assert_golden(
            y[0],
            [
                [[0.4201, 1.2602], [-1.2602, -0.4201]],
                [[0.8835, 0.8835], [-1.0442, -0.0803]],
                [[1.4201, -1.2706], [1.4201, -1.2706]],
            ],
        )
        assert_golden(
            y[2],
            [
                [[1.2602, -0.4201], [1.2602, -1.2602]],
                [[-1.0442, -1.0442], [-0.0803, -1.0442]],
                [[0.5232, -0.3737], [-0.3737, 1.4201]],
            ],
        )


def test_d_running_statistics_of_constant_volumes(device):
    k = torch.arange(1.0, 5.0, device=device)
    x = k.view(1, 4, 1, 1, 1).expand(3, 4, 2, 2, 3)
    m = bnext.BatchNorm3d(4, momentum=0.3, device=device)
    for mean, var in ((0.3, 0.7), (0.51, 0.49)):
        y = m(x)
        assert torch.equal(y, torch.zeros_like(y))
        torch.testing.assert_close(m.running_mean, mean * k)
        torch.testing.assert_close(m.running_var, torch.full_like(k, var))
    assert m.num_batches_tracked.item() == 2


def test_decay_is_one_minus_momentum(device):
    """Keras, TensorFlow and Flax weigh the old average: moving = 0.9 moving + 0.1 batch."""
    x = torch.randn(8, 3, 4, 4, device=device)
    m = bnext.BatchNorm2d(3, momentum=1 - 0.9, device=device)
    m(x)
    torch.testing.assert_close(m.running_mean, 0.1 * x.mean((0, 2, 3)))


@pytest.mark.parametrize("shape", [(16, 5), (6, 5, 9), (1, 3, 5, 5), (4, 6, 7, 3), (2, 3, 4, 2, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_numpy(device, shape, training):
    """By definition, in NumPy: of the layers, and of bnext.reference that other tests rely on."""
    kind = {2: bnext.BatchNorm1d, 3: bnext.BatchNorm1d, 4: bnext.BatchNorm2d, 5: bnext.BatchNorm3d}[len(shape)]
    m = kind(shape[1], device=device, dtype=torch.float64).train(training)
    for t in (*m.parameters(), m.running_mean):
        torch.nn.init.normal_(t)
    torch.nn.init.uniform_(m.running_var, 0.5, 2)
    x = torch.randn(shape, dtype=torch.float64, device=device)

    a = x.cpu().numpy()
    axes = tuple(d for d in range(a.ndim) if d != 1)
    weight, bias, mean, var = (
        t.detach().cpu().numpy().reshape(-1, *[1] * (a.ndim - 2))
        for t in (m.weight, m.bias, m.running_mean, m.running_var)
    )
    running_mean, running_var = mean, var
    if training:
        mean, var = a.mean(axes, keepdims=True)[0], a.var(axes, keepdims=True)[0]
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_var = 0.9 * running_var + 0.1 * a.var(axes, ddof=1, keepdims=True)[0]
    expected = (a - mean) / np.sqrt(var + m.eps) * weight + bias

    by_definition = reference.forward(x, m.weight, m.bias, m.running_mean, m.running_var, training=training)
    y = m(x)
    for actual in (y, by_definition.y):
        np.testing.assert_allclose(actual.detach().cpu().numpy(), expected, rtol=1e-12, atol=1e-12)
    for ours, theirs, wanted in (
        (m.running_mean, by_definition.running_mean, running_mean),
        (m.running_var, by_definition.running_var, running_var),
    ):
        for actual in (ours, theirs):
            np.testing.assert_allclose(actual.cpu().numpy(), wanted.ravel(), rtol=1e-12, atol=1e-12)


def test_parameters_train(device):
    """What a version built on `.data` would miss: gradients reach weight and bias."""
    m = bnext.BatchNorm2d(3, device=device)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    before = [p.clone() for p in m.parameters()]
    m(torch.randn(1, 3, 5, 5, device=device)).pow(3).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(m.parameters(), before, strict=True))
