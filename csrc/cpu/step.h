// What the bindings call: one function per rule, compiled once per instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../table.h"

namespace fw {

using StepFunction = void (*)(const Step&, int threads, int stages);

struct Kernels {
  const char* isa;
  bool (*supported)();
  const StepFunction* steps;  // in the order of FW_RULES
};

// one of the operations of vectors.h
using VectorFunction = void (*)(const VectorOp&, int operation, int threads);

using PreconditionerFunction = void (*)(const Step&, const PreconditionerOp&, int threads);

// preconditioners in the order of FW_PRECONDITIONED
#define FW_DECLARE(isa)                      \
  extern const Kernels kernels_##isa;        \
  extern const VectorFunction vectors_##isa; \
  extern const PreconditionerFunction* const preconditioners_##isa;
FW_DECLARE(baseline)
#if defined(FW_X86_64)
FW_DECLARE(avx2)
FW_DECLARE(avx512)
#endif
#undef FW_DECLARE

}  // namespace fw
