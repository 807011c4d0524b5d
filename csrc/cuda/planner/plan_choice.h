// The plans by name, and what a caller may ask one for: "resident", or "resident:cluster=4".
#pragma once

#include <cstdint>
#include <string>

#include "../../core/names.h"

namespace bnext::cuda {

// resident:     one launch: blocks keep their slices in shared memory between the two passes
// cooperative:  one launch: both passes of two_pass, and between them a barrier of all blocks; for tensors that
//               do not fit `resident` and are small enough to come from the caches the second time
// two_pass:     two launches: a split reduction with a fixed-order merge, then an elementwise pass
//
// Each is a file of that name here, with the functions of plan_kinds.h, and one in ../plans, with launch_KIND_plan.
#define BNEXT_PLANS(X) X(resident) X(cooperative) X(two_pass)

// automatic: the fastest of them; what is asked for, never what runs.
#define BNEXT_PLAN_KINDS(X) X(automatic) BNEXT_PLANS(X)
BNEXT_NAMED_ENUM(PlanKind, uint8_t, BNEXT_PLAN_KINDS)

// A plan, and details of `resident`, of which 0 leaves one to the plan. 8 bytes, so that an atomic holds it.
struct PlanChoice {
  PlanKind kind = PlanKind::automatic;
  uint8_t cluster = 0;    // blocks of a cluster
  uint8_t tile_vecs = 0;  // interleaved layouts: vectors of a tile's row, up to kMaxTileVecs,
  uint16_t groups = 0;    // and, without clusters, tiles that the device works on at a time,
  uint16_t splits = 0;    // and blocks of each

  constexpr bool grouped() const { return groups || splits; }
  constexpr bool interleaved_details() const { return tile_vecs || grouped(); }
  constexpr bool details() const { return cluster || interleaved_details(); }
};

// Reads what to_string writes: a name; or resident:NAME=NUMBER, more of them behind commas. Throws
// std::invalid_argument, whose message says what is allowed and what came.
PlanChoice parse_choice(const std::string& text);
std::string to_string(const PlanChoice&);

}  // namespace bnext::cuda
