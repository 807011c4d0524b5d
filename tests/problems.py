"""The problems that tests put to batch normalization: dtypes, shapes, strides, and how exact an
answer has to be."""

import torch

#: (of the input, of the parameters and the running statistics)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]

#: Vectors hold 2 (float64) to 8 (16-bit) values in 16 bytes, and up to 64 in a register block.
SHAPES = [
    (2, 3),
    (5, 1),
    (33, 7),
    (9, 64),
    (65, 65),
    (4, 3, 1, 1),  # one value a plane
    (1, 3, 2, 2),  # one sample
    (1, 1, 9),  # one sample, one channel
    (6, 1, 5, 5),
    (3, 5, 4),
    (2, 4, 15),
    (2, 2, 33),
    (2, 3, 7, 7),
    (3, 15, 4, 4),
    (3, 16, 4, 4),
    (3, 17, 4, 4),
    (2, 2, 31, 67),
    (2, 4, 3, 2, 5),
]


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    """Channels innermost; for (N, C) and (N, C, L), where torch has no such format, transposed."""
    if x.dim() == 2:
        return x.t().contiguous().t()
    if x.dim() == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()])


def every_second(x):
    """Strides 2 in the last axis."""
    return torch.stack([x, x.flip(0)], -1).flatten(-2)[..., ::2]


def inner_channels(x):
    """A slice of the channels of a larger tensor, in the layout of channels_last."""
    return channels_last(torch.cat([x, x, x], 1))[:, x.shape[1] : 2 * x.shape[1]]


def misaligned(x):
    """Dense, but one element past the 16-byte boundary."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def expanded(x):
    """Stride 0 in the last axis, the same values along it."""
    return x[..., :1].expand(x.shape)


LAYOUTS = [contiguous, channels_last, every_second, inner_channels, misaligned]


def eps_of(dtype):
    return torch.finfo(dtype).eps


def in_float64(t):
    """A copy to compute exact answers from. On the CPU, since torch's CUDA operators are less exact in places, and lack
    gradients in others."""
    return t.detach().cpu().double()


def statistics(x, eps=1e-5):
    """mean and invstd of each channel in float64, ready to broadcast over in_float64(x)."""
    x = in_float64(x)
    axes = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return mean, (var + eps).rsqrt()


class Tolerance:
    """How far from exact each result may be, element by element, by the errors that its
    computation cannot avoid.

    u is the unit of the accumulation type. The mean is some u * size off, with size = mean(|x|),
    which moves xhat = (x - mean) * invstd by u * size * invstd: with `reach` = |xhat| + size * invstd,
    xhat is some u * reach off. Sums of n terms are merged in a tree of registers, threads and
    blocks, and so are some u * sum(|term|) off, whatever n is. "Some" stands for as many roundings
    as STEPS says; in float64, where the exact answer is one that torch computed in float64 too, the
    larger part of the difference is torch's. On top comes the rounding to the type of the result.
    """

    STEPS = {torch.float32: 8, torch.float64: 64}

    def __init__(self, x, mean, invstd, weight, parameter_dtype):
        def channel(t):
            return in_float64(t).reshape([-1 if d == 1 else 1 for d in range(x.dim())])

        self.dtype, self.parameter_dtype = x.dtype, parameter_dtype
        self.axes = [d for d in range(x.dim()) if d != 1]
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.u = self.STEPS[acc] * eps_of(acc)
        x, mean, invstd = in_float64(x), channel(mean), channel(invstd)
        self.scale = invstd if weight is None else invstd * channel(weight).abs()
        self.w = self.scale / invstd
        self.size = x.abs().mean(self.axes)
        self.reach = ((x - mean).abs() + self.mean(x.abs())) * invstd

    def rounded(self, exact, dtype):
        return in_float64(exact).abs() * eps_of(dtype)

    def z(self, *addends):
        """Of the activation's argument. `addends`: what the sum has besides xhat * weight."""
        size = self.reach * self.w
        for t in addends:
            size = size + in_float64(t).abs()
        return self.u * size

    def y(self, exact, *addends):
        return self.z(*addends) + self.rounded(exact, self.dtype) + torch.finfo(self.dtype).tiny

    def dx(self, exact, dy):
        dy = in_float64(dy).abs()
        spread = dy + self.mean(dy) + self.reach * self.mean(dy * self.reach)
        return self.u * self.scale * spread + self.rounded(exact, self.dtype) + torch.finfo(self.dtype).tiny

    def dweight(self, exact, dy):
        size = (in_float64(dy).abs() * self.reach).sum(self.axes)
        return self.u * size + self.rounded(exact, self.parameter_dtype)

    def dbias(self, exact, dy):
        return self.u * in_float64(dy).abs().sum(self.axes) + self.rounded(exact, self.parameter_dtype)

    def running_mean(self, exact, before):
        return self.u * (in_float64(before).abs() + self.size) + self.rounded(exact, self.parameter_dtype)

    def running_var(self, exact, before, batch):
        size = in_float64(before).abs() + in_float64(batch).abs().flatten()
        return self.u * size + self.rounded(exact, self.parameter_dtype)

    def mean(self, t):
        return t.mean(self.axes, keepdim=True)


def assert_within(actual, exact, tolerance, what=""):
    """|actual - exact| <= tolerance, element by element; reports the worst element."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact, tolerance = (in_float64(t) if isinstance(t, torch.Tensor) else t for t in (actual, exact, tolerance))
    excess = (actual - exact).abs() / tolerance
    ok = (excess <= 1) | (actual == exact)
    if not bool(ok.all()):
        worst = int(torch.where(ok, 0, excess.nan_to_num(torch.inf)).argmax())
        got, wanted = actual.flatten()[worst].item(), exact.flatten()[worst].item()
        raise AssertionError(
            f"{what}: {int((~ok).sum())} of {ok.numel()} elements are off; element {worst} is {got!r}, expected "
            f"{wanted!r} +- {tolerance.expand_as(excess).flatten()[worst].item():.3g}"
        )
