// Torch's own batch-norm operators on these kernels, so that models made of torch.nn's layers run them as they are.
#pragma once

namespace bnext {

// The first call with `true` registers the kernels of enable.cpp for aten's operators, for the rest of the process;
// while `on` is false they hand every call to torch's. Registration is not safe beside a batch norm that runs on
// another thread at that moment, since the dispatcher's tables are read without a lock.
void set_enabled(bool on);

}  // namespace bnext
