// The activations of core/activation.h on a row of numbers: a loop each, in one function that all kernels of the
// `general` variant call.
#pragma once

#include "kernels.h"
#include "vec_math.h"

namespace bnext::cpu {
namespace {

// z[i] becomes f(struct of the activation, z[i]), for n numbers and the rest of their last vector.
template <class A, class F>
void replace_each(Activation activation, A* z, int64_t n, F f) {
  with_activation(activation, [&](auto type) {
    for (int64_t j = 0; j < n; j += Vec<A>::lanes) store(z + j, Full{}, f(type, load(z + j, Full{})));
  });
}

template <class A>
[[gnu::noinline, gnu::flatten]] void values(Activation activation, A param, A* z, int64_t n) {
  const Vec<A> p(param);
  replace_each(activation, z, n, [&](auto type, const Vec<A>& v) { return decltype(type)::value(v, p); });
}

template <class A>
[[gnu::noinline, gnu::flatten]] void derivatives(Activation activation, A param, A* z, int64_t n) {
  const Vec<A> p(param);
  replace_each(activation, z, n, [&](auto type, const Vec<A>& v) { return decltype(type)::grad(v, p); });
}

// The bits of n numbers, from bit `first` on.
template <class A>
[[gnu::noinline, gnu::flatten]] void write_mask(Activation activation, const A* z, int64_t n, uint8_t* mask,
                                                int64_t first) {
  with_activation(activation, [&](auto type) {
    for_each_vector<A>(n, Tail::partial, [&](int64_t j, auto part) {
      put_bits(mask, first + j, lanes_of<A>(part), positive_bits(mask_bit<decltype(type)>(load(z + j, Full{}))));
    });
  });
}

}  // namespace
}  // namespace bnext::cpu
