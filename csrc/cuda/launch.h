// What the bindings call: one entry per rule, each compiled on its own.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "../rules.h"

namespace fw {

// gradient pointers that fit into the arguments of one launch; more must be in the column already
constexpr int64_t kMaxInlinePointers = 4049;
// as many as fit into 4 KiB together with a Step, which is what drivers before 12.1 take and costs less;
// graphs are captured with no more
constexpr int64_t kFewPointers = 465;

struct Launch {
  int device;
  void* stream;
  bool all_kinds;           // whether any row is float64, or rounded in another mode than to nearest
  const uint64_t* grads;    // on the host
  int64_t n_grads;          // n_rows, or 0 when the column of the table has the addresses
  int64_t max_blocks;       // upper bound of every grid, 0 for as many as run at a time
  int stages = kAllStages;  // those to queue
  mutable int queued = 0;   // launches so far
};

struct CudaKernels {
  const char* rule;
  // loads the kernels of this rule, which cannot be done while a stream is captured
  void (*prepare)(int device, bool all_kinds);
  void (*step)(const Launch&, const Step&);
  // a small kernel for probe
  const void* kernel;
};

#define FW_DECLARE(Rule) extern const CudaKernels cuda_##Rule;
FW_RULES(FW_DECLARE)
#undef FW_DECLARE

// queues one of the operations of vectors.h
void run_vectors(const Launch&, const VectorOp&, int operation);
// queues the preconditioner of a rule of FW_PRECONDITIONED
void run_preconditioner(const Launch&, int rule, const Step&, const PreconditionerOp&);

// Loads a kernel on a device; -1 asks whether the driver runs this build at all, and makes no context.
// Returns the error with what was found, or nothing. built_for lists the architectures of the build.
std::string probe(int device, const char* built_for);

}  // namespace fw
