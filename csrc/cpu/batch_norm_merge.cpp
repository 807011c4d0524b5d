// The statistics of several processes, merged: by one thread, since a channel takes some nanoseconds a rank.
#include "../core/merge.h"
#include "cpu.h"
#include "stages.h"

namespace bnext::cpu {

int64_t batch_norm_merged_count(const BatchNormMergeParams& p) {
  int64_t count = 0;
  with_acc_type(p.dtype, [&](auto acc) {
    for (int64_t rank = 0; rank < p.ranks; rank++) count += count_of_rank<decltype(acc)>(p, rank);
  });
  return count;
}

void batch_norm_merge(const BatchNormMergeParams& p) {
  with_acc_type(p.dtype, [&](auto acc) {
    for (int64_t channel = 0; channel < p.c; channel++) merge_channel<decltype(acc)>(p, channel);
  });
}

}  // namespace bnext::cpu
