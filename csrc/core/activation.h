// Activations: an entry of the list and a struct each, from which both backends and every order of the gradient are
// made.
//
// A struct has, for z the activation's argument and `param` its parameter (leaky_relu's slope; 0 for all others),
//   value(z, param), grad(z, param), second(z, param)   the function and its first two derivatives
//   saves                                                what the forward saves besides x, behind a residual
// written for V a float or double (CUDA kernels), a vector of them (csrc/cpu/vec_math.h), or a tensor of torch
// (csrc/bindings/tensor_math.h). V has + - * /, unary -, and constant_like, where_le, where_ge, fma, exp, tanh.
// Comparisons are false for NaN, and the derivatives there are torch's, but for leaky_relu's and hardswish's, where
// torch has the slope and 1; the value is NaN either way.
#pragma once

#include <cmath>
#include <type_traits>

#include "epilogue.h"

namespace bnext {

// The name that Python sees, and the struct below. An activation is added here and in bnext/activation.py.
#define BNEXT_ACTIVATIONS(X) \
  X(none, Identity)          \
  X(relu, Relu)              \
  X(relu6, Relu6)            \
  X(leaky_relu, LeakyRelu)   \
  X(silu, Silu)              \
  X(hardswish, Hardswish)    \
  X(sigmoid, Sigmoid)        \
  X(tanh, Tanh)

BNEXT_NAMED_ENUM(Activation, int32_t, BNEXT_ACTIVATIONS)

// Without a residual z follows from x, and the forward saves nothing more. Behind a residual it does not.
enum class Saves : int32_t {
  nothing,   // the derivative is 1
  mask,      // the derivative is 1 or `param`: a bit an element says which
  residual,  // the derivative depends on z, which takes x and the residual
};

// ---- the operations that V needs, for scalars

template <class A> BNEXT_HD A constant_like(A, double v) { return static_cast<A>(v); }
// a where z <= limit (z >= limit), else b.
template <class A> BNEXT_HD A where_le(A z, double limit, A a, A b) { return z <= static_cast<A>(limit) ? a : b; }
template <class A> BNEXT_HD A where_ge(A z, double limit, A a, A b) { return z >= static_cast<A>(limit) ? a : b; }
BNEXT_HD float exp(float v) { return ::expf(v); }
BNEXT_HD_CALLED double exp(double v) { return ::exp(v); }
BNEXT_HD float tanh(float v) { return ::tanhf(v); }
BNEXT_HD_CALLED double tanh(double v) { return ::tanh(v); }

// a / b. On the device a float takes the division that is off by 2 ulp at most, as exp is: one that rounds correctly
// would be four fifths of the code of whatever calls it.
template <class V> BNEXT_HD V quotient(const V& a, const V& b) { return a / b; }
BNEXT_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

template <class V> BNEXT_HD V sigmoid(const V& z) {
  const V one = constant_like(z, 1);
  return quotient(one, one + exp(-z));
}

// ---- the activations

struct Identity {
  static constexpr Saves saves = Saves::nothing;
  template <class V> BNEXT_HD static V value(const V& z, const V&) { return z; }
  template <class V> BNEXT_HD static V grad(const V& z, const V&) { return constant_like(z, 1); }
  template <class V> BNEXT_HD static V second(const V& z, const V&) { return constant_like(z, 0); }
};

// relu, and dy times its derivative, a selection. Vectors of the CPU have an instruction for each (csrc/cpu/vec.h).
template <class V> BNEXT_HD V relu(const V& z) { return where_le(z, 0, constant_like(z, 0), z); }
template <class V> BNEXT_HD V relu_gate(const V& z, const V& dy) { return where_le(z, 0, constant_like(z, 0), dy); }

struct Relu {
  static constexpr Saves saves = Saves::mask;
  template <class V> BNEXT_HD static V value(const V& z, const V&) { return relu(z); }
  template <class V> BNEXT_HD static V grad(const V& z, const V&) {
    return where_le(z, 0, constant_like(z, 0), constant_like(z, 1));
  }
  template <class V> BNEXT_HD static V second(const V& z, const V&) { return constant_like(z, 0); }
};

struct Relu6 {
  static constexpr Saves saves = Saves::mask;
  template <class V> BNEXT_HD static V value(const V& z, const V&) {
    return where_le(z, 0, constant_like(z, 0), where_ge(z, 6, constant_like(z, 6), z));
  }
  template <class V> BNEXT_HD static V grad(const V& z, const V&) {
    const V zero = constant_like(z, 0);
    return where_le(z, 0, zero, where_ge(z, 6, zero, constant_like(z, 1)));
  }
  template <class V> BNEXT_HD static V second(const V& z, const V&) { return constant_like(z, 0); }
};

struct LeakyRelu {
  static constexpr Saves saves = Saves::mask;
  template <class V> BNEXT_HD static V value(const V& z, const V& slope) { return where_le(z, 0, z * slope, z); }
  template <class V> BNEXT_HD static V grad(const V& z, const V& slope) {
    return where_le(z, 0, slope, constant_like(z, 1));
  }
  template <class V> BNEXT_HD static V second(const V& z, const V&) { return constant_like(z, 0); }
};

// z sigmoid(z), which Ramachandran, Zoph and Le call swish ("Searching for activation functions", 2017).
struct Silu {
  static constexpr Saves saves = Saves::residual;
  template <class V> BNEXT_HD static V value(const V& z, const V&) {
    return quotient(z, constant_like(z, 1) + exp(-z));
  }
  template <class V> BNEXT_HD static V grad(const V& z, const V&) {
    const V one = constant_like(z, 1), s = sigmoid(z);
    return s * fma(z, one - s, one);
  }
  template <class V> BNEXT_HD static V second(const V& z, const V&) {
    const V one = constant_like(z, 1), two = constant_like(z, 2), s = sigmoid(z);
    return s * (one - s) * fma(z, fma(-two, s, one), two);
  }
};

// z relu6(z + 3) / 6 (Howard et al., "Searching for MobileNetV3", 2019, section 5.2).
struct Hardswish {
  static constexpr Saves saves = Saves::residual;
  template <class V> BNEXT_HD static V value(const V& z, const V&) {
    const V three = constant_like(z, 3), sixth = constant_like(z, 1.0 / 6);
    return where_le(z, -3, constant_like(z, 0), where_ge(z, 3, z, z * (z + three) * sixth));
  }
  template <class V> BNEXT_HD static V grad(const V& z, const V&) {
    const V inner = fma(z, constant_like(z, 1.0 / 3), constant_like(z, 0.5));
    return where_le(z, -3, constant_like(z, 0), where_ge(z, 3, constant_like(z, 1), inner));
  }
  template <class V> BNEXT_HD static V second(const V& z, const V&) {
    const V zero = constant_like(z, 0);
    return where_le(z, -3, zero, where_ge(z, 3, zero, constant_like(z, 1.0 / 3)));
  }
};

struct Sigmoid {
  static constexpr Saves saves = Saves::residual;
  template <class V> BNEXT_HD static V value(const V& z, const V&) { return sigmoid(z); }
  template <class V> BNEXT_HD static V grad(const V& z, const V&) {
    const V s = sigmoid(z);
    return s * (constant_like(z, 1) - s);
  }
  template <class V> BNEXT_HD static V second(const V& z, const V&) {
    const V one = constant_like(z, 1), s = sigmoid(z);
    return s * (one - s) * (one - s - s);
  }
};

struct Tanh {
  static constexpr Saves saves = Saves::residual;
  template <class V> BNEXT_HD static V value(const V& z, const V&) { return tanh(z); }
  template <class V> BNEXT_HD static V grad(const V& z, const V&) {
    const V t = tanh(z);
    return fma(-t, t, constant_like(z, 1));
  }
  template <class V> BNEXT_HD static V second(const V& z, const V&) {
    const V t = tanh(z);
    return constant_like(z, -2) * t * fma(-t, t, constant_like(z, 1));
  }
};

// ---- from a value of the enumeration to its struct

// The mask's bit for z, as a number: 1 where the derivative is 1, 0 where it is `param`.
template <class Act, class V>
BNEXT_HD V mask_bit(const V& z) {
  return Act::grad(z, constant_like(z, 0));
}

// f(Relu{}), say.
template <class F>
BNEXT_HD auto with_activation(Activation activation, F&& f) {
  switch (activation) {
#define BNEXT_CASE(name, type) \
  case Activation::name: return f(type{});
    BNEXT_ACTIVATIONS(BNEXT_CASE)
#undef BNEXT_CASE
  }
  BNEXT_UNREACHABLE();
}

// The same of those that share one kernel of every plan on CUDA, with uniform branches, for their derivatives alone:
// none is not among them, and relu's derivative is leaky_relu's with a slope of 0.
template <class F>
BNEXT_HD void with_general_activation(Activation activation, F&& f) {
  if (activation == Activation::relu) activation = Activation::leaky_relu;
  with_activation(activation, [&](auto act) {
    using Act = decltype(act);
    if constexpr (!std::is_same_v<Act, Identity> && !std::is_same_v<Act, Relu>) f(act);
  });
}

inline Saves saves_of(Activation activation) {
  return with_activation(activation, [](auto act) { return decltype(act)::saves; });
}

// dy * f'(z). Where the derivative is 0, so is the product, whatever dy is: as in torch's relu.
template <class V>
BNEXT_HD V through(const V& dy, const V& grad) {
  return where_le(grad, 0, where_ge(grad, 0, constant_like(grad, 0), dy * grad), dy * grad);
}

}  // namespace bnext
