// The gradient of the gradient. With, for each channel, m values, mu = mean(x), s = invstd,
// xhat = (x - mu) * s, the weight w, and g = dy where the activation let the value pass, 0
// elsewhere, the backward computes
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
//   dL/dg = w s P(u) + v xhat + b + r                    dL/ddy = dL/dg where the value passed
//   dL/dw = s Q,  Q = sum(u P(g))
//
// x enters through xhat, and in training through s before Q. At fixed s,
//
//   dL/dxhat = h = v g - (w s / m) (sum(g xhat) u + sum(u xhat) g).
//
// d(xhat)/dx takes h to s P(h), as in any batch normalization, and ds/dx_i = -s^2 xhat_i / m:
//
//   dL/dx = s P(h) - (w s^2 / m) Q xhat.
//
// In eval mode mu and s are constants: P is the identity, Q = sum(u g), h = v g, and dL/dx = s h.
// These formulas hold with eps inside s. The activation's mask is constant: its derivative is 0
// wherever it has one.
//
// Everything is written in differentiable operators. A third derivative sees mu and s as functions
// of x, because they are taken from x anew when someone may ask for it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "layout.h"

namespace bnext {

// What the forward kept, and how it ran.
struct Saved {
  OptionalTensor x, weight, bias;
  Tensor mean, invstd;
  OptionalTensor mask;
  Activation activation;
  bool training;
  double eps;
};

struct SecondOrder { Tensor ddy, dx, dweight; };

// 1 where the activation let the value pass: from the mask, which holds a bit an element in
// memory order, or from x.
inline Tensor passed(const Saved& saved, const Tensor& xhat, const Tensor& weight, const Tensor& bias) {
  if (!given(saved.mask)) return (xhat * weight + bias).le(0).logical_not();
  const Tensor& x = *saved.x;
  const Tensor bits = saved.mask->unsqueeze(1).bitwise_right_shift(at::arange(8, saved.mask->options())).bitwise_and(1);
  const Tensor flat = bits.reshape(-1).narrow_symint(0, 0, x.sym_numel()).to(at::kBool);
  if (format_of(x) == at::MemoryFormat::Contiguous) return flat.view_symint(x.sym_sizes());
  auto sizes = x.sym_sizes().vec();
  sizes.push_back(sizes[1]);
  sizes.erase(sizes.begin() + 1);
  return flat.view_symint(sizes).movedim(-1, 1);
}

// u, v, b, r may each be undefined, and x may be missing where only ddy depends on nothing of it.
inline SecondOrder double_backward(const Saved& saved, const Tensor& dy, const Tensor& u, const Tensor& v,
                                   const Tensor& b, const Tensor& r, bool need_dx, bool need_dweight) {
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

  Tensor g = dy.to(acc), mask;
  if (saved.activation != Activation::none) {
    mask = passed(saved, xhat, w, given(saved.bias) ? vector(*saved.bias) : at::zeros_like(s));
    g = g * mask;
  }

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
  if (mask.defined()) dg = dg * mask;

  SecondOrder result;
  result.ddy = dg.to(dy.scalar_type());
  if (need_dx && h.defined()) {
    Tensor dx = s * P(h);
    if (saved.training && u.defined()) dx = dx - w * s * s * Q * xhat / (dy.sym_numel() / dy.sym_size(1));
    result.dx = dx.to(dy.scalar_type());
  }
  if (need_dweight && u.defined()) {
    result.dweight = (s * Q).reshape_symint(saved.weight->sym_sizes()).to(saved.weight->scalar_type());
  }
  return result;
}

}  // namespace bnext
