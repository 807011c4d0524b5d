"""The problems that tests put to batch normalization: dtypes, shapes, strides, and how exact an
answer has to be."""

import torch

from bnext import reference

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
    (4, 600),  # more columns than a kernel takes at once
    (2, 704, 3, 3),  # several tasks of whole channels
    (70, 5, 4, 5),  # short planes of many images
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
    blocks, and so are some u * sum(|term|) off, whatever n is. An activation and its derivative take
    a handful of operations around exp, which is within 1.1 units, or tanh, within 2.5. "Some" stands
    for as many roundings as STEPS says; in float64, where the exact answer is one that torch computed in float64 too, the
    larger part of the difference is torch's. On top comes the rounding to the type of the result.
    """

    STEPS = {torch.float32: 8, torch.float64: 64}
    #: Upper bounds of |f'| and |f''| of activations: hardswish' is at most 1.5, silu' 1.1; tanh'' 0.77, silu'' 0.5.
    STEEPEST, BENT = 1.5, 0.8

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

    def activated(self, exact, z):
        """Of an activation's value, whose argument is z off; and it takes some roundings itself."""
        own = self.u * (in_float64(exact).abs() + 1)
        return self.STEEPEST * z + own + self.rounded(exact, self.dtype) + torch.finfo(self.dtype).tiny

    def dz(self, dy, z):
        """Of dy times the derivative of a smooth activation there."""
        return in_float64(dy).abs() * (self.BENT * z + self.u)

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


def assert_exact(
    found,
    x,
    weight=None,
    bias=None,
    running_mean=None,
    running_var=None,
    *,
    dy=None,
    residual=None,
    activation=None,
    training=True,
    **options,
):
    """`found`, results of one forward and backward by their names in bnext.reference, against bnext.reference on the
    same operands; and their dtypes. The running statistics are those before; `options` are reference.forward's.

    The activation is None, "relu" or a smooth one. dweight and dbias may be lists, of what each process has of the sum.
    """
    parameter_dtype = next((t.dtype for t in (weight, bias, running_mean) if t is not None), x.dtype)
    operands = (x, weight, bias, running_mean, running_var, residual, dy)
    operands = (None if t is None else in_float64(t) for t in operands)
    x64, weight, bias, running_mean, running_var, residual, dy = operands
    fused = {"activation": activation, "residual": residual}
    forward = reference.forward(x64, weight, bias, running_mean, running_var, training=training, **fused, **options)
    tolerance = Tolerance(x, forward.mean, forward.invstd, weight, parameter_dtype)
    addends = [] if bias is None else [bias.view(-1, *[1] * (x.dim() - 2))]
    addends += [] if residual is None else [residual]
    z_off, smooth = tolerance.z(*addends), activation not in (None, "relu")
    exact = vars(forward)
    bounds = {"y": tolerance.activated(forward.y, z_off) if smooth else tolerance.y(forward.y, *addends)}
    if training and running_mean is not None:
        m = x.numel() // x.shape[1]
        bounds["running_mean"] = tolerance.running_mean(forward.running_mean, running_mean)
        bounds["running_var"] = tolerance.running_var(forward.running_var, running_var, forward.var * m / (m - 1))
    if dy is not None:
        if activation == "relu":  # next to 0 rounding decides what passes, and y says what it decided
            dy, fused = dy * (in_float64(found["y"]) > 0), {}
        backward = reference.backward(dy, x64, forward.mean, forward.invstd, weight, bias, training=training, **fused)
        dz_off = smooth * tolerance.dz(dy, z_off)
        # The bounds are linear in |dz|, and an error of dz spreads as dz itself does.
        dz = backward.dresidual.abs() + dz_off / tolerance.u
        exact = exact | vars(backward)
        bounds |= {name: getattr(tolerance, name)(exact[name], dz) for name in ("dx", "dweight", "dbias")}
        # Without an activation, or behind relu, it is dy or 0, to the bit.
        bounds["dresidual"] = dz_off + smooth * tolerance.rounded(backward.dresidual, x.dtype)
    for name, results in found.items():
        dtype, bound = x.dtype if name in ("y", "dx", "dresidual") else parameter_dtype, bounds[name]
        if isinstance(results, list):  # each of which was rounded by itself
            bound = bound + sum(tolerance.rounded(t, dtype) for t in results)
        else:
            results = [results]
        assert all(t.dtype == dtype for t in results), f"{name} is {[t.dtype for t in results]}"
        assert_within(sum(map(in_float64, results)), exact[name], bound, name)
