// One switch for all plans of the CUDA backend, so that tests and benchmarks can run each on each shape.
#pragma once

#include <string>
#include <vector>

namespace bnext {

std::vector<std::string> plans();

// Makes every training forward and backward of this process take this plan, or an error where the shape
// has no such plan; "automatic" ends that. Returns what held before. BNEXT_PLAN sets what holds at first.
std::string force_plan(const std::string& name);

}  // namespace bnext
