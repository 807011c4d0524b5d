// The gradient in torch's operators, for where the kernels cannot go, and the gradient of the gradient. With, for each
// channel, m values, mu = mean(x), s = invstd, xhat = (x - mu) * s, the weight w, the bias c, the activation f of
// z = w xhat + c + residual, and g = dy f'(z), the backward computes
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

using Gradients = std::array<Tensor, 4>;    // dx, dweight, dbias, dresidual
using SecondOrder = std::array<Tensor, 5>;  // ddy, dx, dweight, dbias, dresidual

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

// What the formulas are made of, for one batch, in the accumulation type; what belongs to a channel has the dimensions
// of x. Where there is no x, there is no xhat either, and nobody may ask for what depends on it.
struct Terms {
  const Saved& saved;
  std::vector<int64_t> others, channel;        // the dimensions to sum over, and the shape of a vector of channels
  Tensor s, xhat, w, dy, g, slope, curvature;  // the last two are f'(z) and f''(z), where they are not constant

  Terms(const Saved& saved, const Tensor& grad) : saved(saved), others{0}, channel(grad.dim(), 1) {
    for (int64_t d = 2; d < grad.dim(); ++d) others.push_back(d);
    channel[1] = -1;
    const auto acc = saved.mean.scalar_type();
    Tensor mu = vector(saved.mean);
    s = vector(saved.invstd);
    if (given(saved.x)) {
      const Tensor x = saved.x->to(acc);
      if (saved.training && at::GradMode::is_enabled()) {
        mu = mean(x);
        s = (mean((x - mu).square()) + saved.eps).rsqrt();
      }
      xhat = (x - mu) * s;
    }
    w = given(saved.weight) ? vector(*saved.weight) : at::ones_like(s);
    dy = g = grad.to(acc);
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
    if (slope.defined()) g = through(Operand(dy), Operand(slope));
  }

  Tensor vector(const Tensor& t) const { return t.to(saved.mean.scalar_type()).reshape(channel); }
  Tensor sum(const Tensor& t) const { return t.sum(others, /*keepdim=*/true); }
  Tensor mean(const Tensor& t) const { return t.mean(others, /*keepdim=*/true); }
  Tensor P(const Tensor& a) const { return saved.training ? a - mean(a) - xhat * mean(a * xhat) : a; }
};

// Of one batch, with dweight and dbias in the accumulation type.
inline Gradients gradients_of_batch(const Saved& saved, const Tensor& dy, std::array<bool, 4> needs) {
  const Terms t(saved, dy);
  const auto type = dy.scalar_type();
  Gradients result;
  if (needs[0]) result[0] = (t.w * t.s * t.P(t.g)).to(type);
  if (needs[1]) result[1] = t.sum(t.g * t.xhat).reshape({-1});
  if (needs[2]) result[2] = t.sum(t.g).reshape({-1});
  if (needs[3]) result[3] = t.g.to(type);
  return result;
}

// Likewise.
inline SecondOrder double_backward_of_batch(const Saved& saved, const Tensor& grad, const Tensor& u, const Tensor& v,
                                            const Tensor& b, const Tensor& r, std::array<bool, 4> needs) {
  const Terms t(saved, grad);
  const auto type = grad.scalar_type();
  const auto& [w, s, xhat, g] = std::tie(t.w, t.s, t.xhat, t.g);
  Tensor dg = at::zeros_like(g), Q, h;
  if (u.defined()) {
    const Tensor ua = u.to(g.scalar_type());
    dg = dg + w * s * t.P(ua);
    Q = t.sum(ua * t.P(g));
    if (saved.training) h = -w * s * (t.mean(g * xhat) * ua + t.mean(ua * xhat) * g);
  }
  if (v.defined()) {
    dg = dg + t.vector(v) * xhat;
    h = h.defined() ? h + t.vector(v) * g : t.vector(v) * g;
  }
  if (b.defined()) dg = dg + t.vector(b);
  if (r.defined()) dg = dg + r.to(g.scalar_type());
  Tensor q;
  if (t.curvature.defined()) {
    q = dg * t.dy * t.curvature;
    h = h.defined() ? h + w * q : w * q;
  }
  if (t.slope.defined()) dg = through(Operand(dg), Operand(t.slope));

  const auto [need_dx, need_dweight, need_dbias, need_dresidual] = needs;
  SecondOrder result;
  auto& [ddy, dx, dweight, dbias, dresidual] = result;
  ddy = dg.to(type);
  if (need_dx && h.defined()) {
    dx = s * t.P(h);
    if (saved.training && u.defined()) dx = dx - w * s * s * Q * xhat / (grad.sym_numel() / grad.sym_size(1));
    dx = dx.to(type);
  }
  if (need_dweight && (u.defined() || q.defined())) {
    dweight = at::zeros_like(s);
    if (u.defined()) dweight = dweight + s * Q;
    if (q.defined()) dweight = dweight + t.sum(q * xhat);
  }
  if (need_dbias && q.defined()) dbias = t.sum(q);
  if (need_dresidual && q.defined()) dresidual = q.to(type);
  return result;
}

// f(Saved, part_of) of each ghost batch, where part_of(t) is its part of a tensor like x. Of f's results those
// `like_x` are joined, and those of channels summed.
template <size_t n, class F>
std::array<Tensor, n> by_parts(const Parts& parts, const Saved& saved, const std::array<bool, n>& like_x, const F& f) {
  std::array<std::vector<Tensor>, n> all;
  std::array<Tensor, n> result;
  parts.for_each([&](const Part& part) {
    const auto part_of = [&](const Tensor& t) {
      return t.defined() ? t.narrow(0, part.first, part.examples) : Tensor();
    };
    const auto if_given = [&](const OptionalTensor& t) { return given(t) ? OptionalTensor(part_of(*t)) : t; };
    Saved own = saved;
    own.x = if_given(saved.x);
    own.residual = if_given(saved.residual);
    own.mean = saved.mean.select(0, part.index);
    own.invstd = saved.invstd.select(0, part.index);
    if (given(saved.mask)) own.mask = saved.mask->narrow(0, part.mask_offset, part.mask_bytes);
    const std::array<Tensor, n> one = f(own, part_of);
    for (size_t i = 0; i < n; ++i) {
      if (!one[i].defined()) continue;
      if (like_x[i]) all[i].push_back(one[i]);
      else result[i] = result[i].defined() ? result[i] + one[i] : one[i];
    }
  });
  for (size_t i = 0; i < n; ++i) {
    if (!all[i].empty()) result[i] = at::cat(all[i]);
  }
  return result;
}

// In the shape and dtype of the parameter that it is the gradient of.
inline void make_like(Tensor& gradient, const OptionalTensor& parameter) {
  if (gradient.defined()) gradient = gradient.reshape_symint(parameter->sym_sizes()).to(parameter->scalar_type());
}

// What the kernels compute, in operators that forward mode and torch.func can go through. dweight and dbias stay in the
// accumulation type: autograd converts them.
inline Gradients gradients(const Saved& saved, const Tensor& dy, std::array<bool, 4> needs) {
  const Parts parts = Parts::of_rows(dy, saved.mean);
  if (parts.count() == 1) return gradients_of_batch(saved, dy, needs);
  return by_parts<4>(parts, saved, {true, false, false, true}, [&](const Saved& own, const auto& part_of) {
    return gradients_of_batch(own, part_of(dy), needs);
  });
}

// u, v, b, r may each be undefined, and x may be missing where only ddy depends on nothing of it. `needs` asks for
// (dx, dweight, dbias, dresidual).
inline SecondOrder double_backward(const Saved& saved, const Tensor& dy, const Tensor& u, const Tensor& v,
                                   const Tensor& b, const Tensor& r, std::array<bool, 4> needs) {
  const Parts parts = Parts::of_rows(dy, saved.mean);
  SecondOrder result =
      parts.count() == 1
          ? double_backward_of_batch(saved, dy, u, v, b, r, needs)
          : by_parts<5>(parts, saved, {true, true, false, false, true}, [&](const Saved& own, const auto& part_of) {
              return double_backward_of_batch(own, part_of(dy), part_of(u), v, b, part_of(r), needs);
            });
  make_like(result[2], saved.weight);
  make_like(result[3], saved.bias);
  return result;
}

}  // namespace bnext
