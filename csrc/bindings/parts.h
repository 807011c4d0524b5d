// Ghost batches: parts of a batch along its first dimension, each normalized by itself. They are those of
// torch.tensor_split, as even as possible and in order. Their statistics have a row each, and lie behind each other in
// memory in either layout, so that the backends run on one part of the tensors after the other.
#pragma once

#include <ATen/Functions.h>

#include <utility>
#include <vector>

#include "layout.h"

namespace bnext {

struct Part {
  int64_t index;                    // its row
  int64_t first, examples;          // of the batch
  int64_t offset;                   // elements before it
  int64_t mask_offset, mask_bytes;  // in a mask, where each part begins a byte of its own
};

class Parts {
 public:
  // One part, whose statistics are vectors of channels.
  static Parts whole(const Tensor& x) { return Parts(x, 1, false); }

  // Of at most `size` examples, where it is given.
  static Parts of_size(const Tensor& x, std::optional<int64_t> size) {
    if (!size) return whole(x);
    check_ghost_batch_size(size);
    const c10::SymInt examples = x.sym_size(0);
    return Parts(x, examples == 0 ? 1 : (examples - 1) / *size + 1, true);
  }

  // One for each row of `mean`.
  static Parts of_rows(const Tensor& x, const Tensor& mean) {
    return has_rows(mean, x) ? Parts(x, mean.sym_size(0), true) : whole(x);
  }

  const c10::SymInt& count() const { return count_; }

  c10::SymInt min_examples() const { return examples_ / count_; }

  // Whether a statistic has a row for each part.
  bool in_rows() const { return rows_; }

  // For a bit an element.
  c10::SymInt mask_bytes() const {
    const auto bytes = [this](const c10::SymInt& examples) { return (examples * each_ + 7) / 8; };
    if (!rows_) return bytes(examples_);
    const c10::SymInt larger = examples_ % count_;
    return larger * bytes(min_examples() + 1) + (count_ - larger) * bytes(min_examples());
  }

  template <class Body>
  void for_each(const Body& body) const {
    const int64_t count = count_.expect_int(), each = each_.expect_int(), least = min_examples().expect_int();
    const int64_t larger = examples_.expect_int() % count;
    Part part = {};
    for (; part.index < count; ++part.index) {
      part.examples = least + (part.index < larger);
      part.mask_bytes = (part.examples * each + 7) / 8;
      body(std::as_const(part));
      part.first += part.examples;
      part.offset = part.first * each;
      part.mask_offset += part.mask_bytes;
    }
  }

 private:
  Parts(const Tensor& x, c10::SymInt count, bool rows)
      : examples_(x.sym_size(0)), each_(1), count_(std::move(count)), rows_(rows) {
    for (int64_t d = 1; d < x.dim(); ++d) each_ *= x.sym_size(d);
  }

  c10::SymInt examples_, each_, count_;  // each_: elements of an example
  bool rows_;
};

inline const void* advanced(const void* start, int64_t bytes) {
  return start == nullptr ? nullptr : static_cast<const char*>(start) + bytes;
}
inline void* advanced(void* start, int64_t bytes) {
  return const_cast<void*>(advanced(static_cast<const void*>(start), bytes));
}

// Where a part of dense tensors is: in place, or, where that is not the 16-byte boundary that a backend needs, in
// copies, of which those that are written go back in the end.
class Window {
 public:
  Window(const Part& part, int64_t item) : part_(part), bytes_(part.offset * item) {}

  // `start` is where `t` begins; null stays null.
  const void* read(const void* start, const OptionalTensor& t) {
    if (start == nullptr || in_place()) return advanced(start, bytes_);
    copies_.push_back(view(*t).clone());
    return copies_.back().const_data_ptr();
  }
  void* write(void* start, const Tensor& t) {
    if (start == nullptr || in_place()) return advanced(start, bytes_);
    written_.emplace_back(view(t), at::empty_like(view(t)));
    return written_.back().second.data_ptr();
  }

  void write_back() const {
    for (const auto& [place, copy] : written_) place.copy_(copy);
  }

 private:
  bool in_place() const { return bytes_ % 16 == 0; }
  Tensor view(const Tensor& t) const { return t.narrow(0, part_.first, part_.examples); }

  Part part_;
  int64_t bytes_;  // before the part
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

// Sums over `dim`, in an order that depends on its size alone: halves are added until one is left. That of at::sum also
// depends on how many threads share the other dimensions.
inline Tensor pairwise_sum(Tensor t, int64_t dim) {
  while (t.size(dim) > 1) {
    const int64_t half = t.size(dim) / 2;
    Tensor sum = t.narrow(dim, 0, half).add(t.narrow(dim, half, half));
    if (t.size(dim) % 2 != 0) sum.narrow(dim, 0, 1).add_(t.narrow(dim, 2 * half, 1));
    t = std::move(sum);
  }
  return t.squeeze(dim);
}

}  // namespace bnext
