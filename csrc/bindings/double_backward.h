// The gradient of the gradient. With, for each channel, m values, mu = mean(x), s = invstd,
// xhat = (x - mu) * s, the weight w, the bias c, the activation f of z = w xhat + c + residual, and
// g = dy f'(z), the backward computes
//
//   training:  dx = w s P(g)    with P(a) = a - mean(a) - xhat mean(a xhat)
//   eval:      dx = w s g
//   both:      dweight = sum(g xhat),  dbias = sum(g),  dresidual = g.
//
// Let u, v, b, r be the gradients with respect to dx, dweight, dbias, dresidual, so that what is
// differentiated is
//
//   L = sum(u dx) + v dweight + b dbias + sum(r g).
//
// L is linear in g, and P is symmetric, since it projects onto the complement of (1, xhat):
//
//   dL/dg = w s P(u) + v xhat + b + r                    dL/ddy = dL/dg f'(z)
//
// g depends on z as well, wherever f is not piecewise linear:
//
//   dL/dz = q = dL/dg dy f''(z)                          dL/dresidual = q,  dL/dc = sum(q)
//
// w enters through dx and through z:
//
//   dL/dw = s Q + sum(q xhat),  Q = sum(u P(g))
//
// x enters through xhat (in dx, in dweight, in z), and in training through s before Q. At fixed s,
//
//   dL/dxhat = h = v g - (w s / m) (sum(g xhat) u + sum(u xhat) g) + w q.
//
// d(xhat)/dx takes h to s P(h), as in any batch normalization, and ds/dx_i = -s^2 xhat_i / m:
//
//   dL/dx = s P(h) - (w s^2 / m) Q xhat.
//
// In eval mode mu and s are constants: P is the identity, Q = sum(u g), h = v g + w q, and dL/dx = s h.
// These formulas hold with eps inside s. Where the forward kept a bit an element, f is piecewise
// linear: f' is a constant, and q is 0.
//
// Everything is written in differentiable operators. A third derivative sees mu and s as functions
// of x, because they are taken from x anew when someone may ask for it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <array>

#include "parts.h"
#include "tensor_math.h"

namespace bnext {

// What the forward kept, and how it ran.
struct Saved {
  OptionalTensor x, weight, bias;
  Tensor mean, invstd;
  OptionalTensor mask, residual;
  Activation activation;
  double activation_param;
  bool training;
  double eps;
};

struct SecondOrder { Tensor ddy, dx, dweight, dbias, dresidual; };

// The mask as a tensor of bool like x: it holds a bit an element in memory order.
inline Tensor unpacked_mask(const Saved& saved) {
  const Tensor& x = *saved.x;
  const Tensor bits = saved.mask->unsqueeze(1).bitwise_right_shift(at::arange(8, saved.mask->options())).bitwise_and(1);
  const Tensor flat = bits.reshape(-1).narrow_symint(0, 0, x.sym_numel()).to(at::kBool);
  if (format_of(x) == at::MemoryFormat::Contiguous) return flat.view_symint(x.sym_sizes());
  auto sizes = x.sym_sizes().vec();
  sizes.push_back(sizes[1]);
  sizes.erase(sizes.begin() + 1);
  return flat.view_symint(sizes).movedim(-1, 1);
}

// Of one batch, with dweight and dbias in the accumulation type.
inline SecondOrder double_backward_of_batch(const Saved& saved, const Tensor& dy, const Tensor& u, const Tensor& v,
                                            const Tensor& b, const Tensor& r, std::array<bool, 4> needs) {
  const auto acc = saved.mean.scalar_type();
  std::vector<int64_t> others = {0};
  for (int64_t d = 2; d < dy.dim(); ++d) others.push_back(d);
  std::vector<int64_t> channel(dy.dim(), 1);
  channel[1] = -1;

  const auto vector = [&](const Tensor& t) { return t.to(acc).reshape(channel); };
  const auto sum = [&](const Tensor& t) { return t.sum(others, /*keepdim=*/true); };
  const auto mean = [&](const Tensor& t) { return t.mean(others, /*keepdim=*/true); };

  Tensor mu = vector(saved.mean), s = vector(saved.invstd), x, xhat;
  if (given(saved.x)) {
    x = saved.x->to(acc);
    if (saved.training && at::GradMode::is_enabled()) {
      mu = mean(x);
      s = (mean((x - mu).square()) + saved.eps).rsqrt();
    }
    xhat = (x - mu) * s;
  }
  const Tensor w = given(saved.weight) ? vector(*saved.weight) : at::ones_like(s);
  const auto P = [&](const Tensor& a) { return saved.training ? a - mean(a) - xhat * mean(a * xhat) : a; };

  const Tensor dya = dy.to(acc);
  Tensor g = dya, slope, curvature;  // f'(z), f''(z)
  if (given(saved.mask)) {
    slope = at::where(unpacked_mask(saved), at::ones_like(s), at::full_like(s, saved.activation_param));
  } else if (saved.activation != Activation::none) {
    Tensor z = xhat * w;
    if (given(saved.bias)) z = z + vector(*saved.bias);
    if (given(saved.residual)) z = z + saved.residual->to(acc);
    const Operand argument(z), param = constant_like(argument, saved.activation_param);
    with_activation(saved.activation, [&](auto type) {
      using Act = decltype(type);
      slope = Act::grad(argument, param);
      if (Act::saves == Saves::residual) curvature = Act::second(argument, param);
    });
  }
  if (slope.defined()) g = through(Operand(dya), Operand(slope));

  Tensor dg = at::zeros_like(g), Q, h;
  if (u.defined()) {
    const Tensor ua = u.to(acc);
    dg = dg + w * s * P(ua);
    Q = sum(ua * P(g));
    if (saved.training) h = -w * s * (mean(g * xhat) * ua + mean(ua * xhat) * g);
  }
  if (v.defined()) {
    dg = dg + vector(v) * xhat;
    h = h.defined() ? h + vector(v) * g : vector(v) * g;
  }
  if (b.defined()) dg = dg + vector(b);
  if (r.defined()) dg = dg + r.to(acc);
  Tensor q;
  if (curvature.defined()) {
    q = dg * dya * curvature;
    h = h.defined() ? h + w * q : w * q;
  }
  if (slope.defined()) dg = through(Operand(dg), Operand(slope));

  const auto [need_dx, need_dweight, need_dbias, need_dresidual] = needs;
  SecondOrder result;
  result.ddy = dg.to(dy.scalar_type());
  if (need_dx && h.defined()) {
    Tensor dx = s * P(h);
    if (saved.training && u.defined()) dx = dx - w * s * s * Q * xhat / (dy.sym_numel() / dy.sym_size(1));
    result.dx = dx.to(dy.scalar_type());
  }
  if (need_dweight && (u.defined() || q.defined())) {
    Tensor dweight = at::zeros_like(s);
    if (u.defined()) dweight = dweight + s * Q;
    if (q.defined()) dweight = dweight + sum(q * xhat);
    result.dweight = dweight;
  }
  if (need_dbias && q.defined()) result.dbias = sum(q);
  if (need_dresidual && q.defined()) result.dresidual = q.to(dy.scalar_type());
  return result;
}

// Of ghost batches: by each.
inline SecondOrder double_backward_of_parts(const Parts& parts, const Saved& saved, const Tensor& dy, const Tensor& u,
                                            const Tensor& v, const Tensor& b, const Tensor& r,
                                            std::array<bool, 4> needs) {
  std::vector<Tensor> ddy, dx, dresidual;
  SecondOrder result;
  const auto append = [](std::vector<Tensor>& all, const Tensor& t) {
    if (t.defined()) all.push_back(t);
  };
  const auto add = [](Tensor& sum, const Tensor& t) {
    if (t.defined()) sum = sum.defined() ? sum + t : t;
  };
  parts.for_each([&](const Part& part) {
    const auto of_part = [&](const Tensor& t) {
      return t.defined() ? t.narrow(0, part.first, part.examples) : Tensor();
    };
    const auto if_given = [&](const OptionalTensor& t) { return given(t) ? OptionalTensor(of_part(*t)) : t; };
    Saved own = saved;
    own.x = if_given(saved.x);
    own.residual = if_given(saved.residual);
    own.mean = saved.mean.select(0, part.index);
    own.invstd = saved.invstd.select(0, part.index);
    if (given(saved.mask)) own.mask = saved.mask->narrow(0, part.mask_offset, part.mask_bytes);
    const SecondOrder one = double_backward_of_batch(own, of_part(dy), of_part(u), v, b, of_part(r), needs);
    append(ddy, one.ddy);
    append(dx, one.dx);
    append(dresidual, one.dresidual);
    add(result.dweight, one.dweight);
    add(result.dbias, one.dbias);
  });
  const auto joined = [](const std::vector<Tensor>& all) { return all.empty() ? Tensor() : at::cat(all); };
  result.ddy = joined(ddy);
  result.dx = joined(dx);
  result.dresidual = joined(dresidual);
  return result;
}

// u, v, b, r may each be undefined, and x may be missing where only ddy depends on nothing of it. `needs` asks for
// (dx, dweight, dbias, dresidual).
inline SecondOrder double_backward(const Saved& saved, const Tensor& dy, const Tensor& u, const Tensor& v,
                                   const Tensor& b, const Tensor& r, std::array<bool, 4> needs) {
  const Parts parts = Parts::of_rows(dy, saved.mean);
  SecondOrder result = parts.count() == 1 ? double_backward_of_batch(saved, dy, u, v, b, r, needs)
                                          : double_backward_of_parts(parts, saved, dy, u, v, b, r, needs);
  const auto like = [](Tensor& t, const OptionalTensor& parameter) {
    if (t.defined()) t = t.reshape_symint(parameter->sym_sizes()).to(parameter->scalar_type());
  };
  like(result.dweight, saved.weight);
  like(result.dbias, saved.bias);
  return result;
}

}  // namespace bnext
