// The CPU backend as the bindings see it: one entry per rule, compiled once per instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../table.h"

namespace fw {

using StepFunction = void (*)(const Step&, int threads);

struct Kernels {
  const char* isa;
  bool (*supported)();
  const StepFunction* steps;  // in the order of FW_RULES
};

extern const Kernels kernels_baseline;
#if defined(FW_X86_64)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fw
