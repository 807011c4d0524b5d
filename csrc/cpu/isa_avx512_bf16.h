// Registers of AVX-512 with instructions for bfloat16 (BF16 and VBMI: AMD since 2022, Intel since 2023).
#pragma once

#define BNEXT_AVX512_BF16 1
#include "isa_avx512.h"
