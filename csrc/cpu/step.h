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

// Columns of some tensors to go through: n_columns addresses per row, and the bytes of an element of each
// column. The first n_rewritten columns are read and written, the others read.
struct Stream {
  const uint64_t* columns;
  const Chunk* chunks;
  const int32_t* item_sizes;
  int64_t n_chunks;
  int32_t n_columns, n_rewritten;
  bool backwards;
};

// returns a sum of what was read, which the compiler must compute
using StreamFunction = int64_t (*)(const Stream&, int threads);

// preconditioners in the order of FW_PRECONDITIONED
#define FW_DECLARE(isa)                      \
  extern const Kernels kernels_##isa;        \
  extern const VectorFunction vectors_##isa; \
  extern const StreamFunction stream_##isa;  \
  extern const PreconditionerFunction* const preconditioners_##isa;
FW_DECLARE(baseline)
#if defined(FW_X86_64)
FW_DECLARE(avx2)
FW_DECLARE(avx512)
#endif
#undef FW_DECLARE

}  // namespace fw
