// What the CUDA backend's plans go by: one switch for all of them, so that tests and benchmarks can run each on
// each shape, and what to leave to kernels that run beside.
#pragma once

#include <string>
#include <vector>

namespace bnext {

std::vector<std::string> plans();

// Makes every training forward and backward of this process take this plan, or an error where the shape
// has no such plan; "automatic" ends that. Returns what held before. BNEXT_PLAN sets what holds at first.
std::string force_plan(const std::string& name);

// Multiprocessors that kernels whose blocks wait for each other do not count on, since they cannot begin before
// there is room for all of them: those of a library's communication kernels, which may be long. Returns what held
// before. BNEXT_SM_MARGIN sets what holds at first.
int64_t set_sm_margin(int64_t multiprocessors);

}  // namespace bnext
