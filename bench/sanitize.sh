#!/bin/sh
# The reduced suite under each tool of compute-sanitizer, where that is installed. Watches our kernels
# alone, and takes memory straight from CUDA: in torch's cache, one tensor's end is the next one's start.
set -u
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: skipped"
    exit 0
fi
status=0
for tool in memcheck racecheck synccheck initcheck; do
    echo "compute-sanitizer --tool $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-regex kns=bnext \
        --report-api-errors no --error-exitcode 9 "${PYTHON:-python3}" -m pytest -q -m sanitize -k cuda || status=1
done
exit $status
