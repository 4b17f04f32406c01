// The CUDA backend as the bindings see it: one entry per rule, each compiled on its own.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../rules.h"

namespace fw {

// gradient addresses that fit into the arguments of one launch; more must be in the column already
constexpr int64_t kMaxInlinePointers = 4064;

struct Launch {
  int device;
  void* stream;
  bool doubles;           // whether any row is float64
  const uint64_t* grads;  // on the host
  int64_t n_grads;        // n_rows, or 0 when the column of the table has the addresses
  int64_t max_blocks;     // upper bound of every grid, 0 for as many as run at a time
};

struct CudaKernels {
  const char* rule;
  // loads what a step of this rule launches, which a stream under capture could not
  void (*prepare)(int device, bool doubles);
  void (*step)(const Launch&, const Step&);
};

#define FW_DECLARE(Rule) extern const CudaKernels cuda_##Rule;
FW_RULES(FW_DECLARE)
#undef FW_DECLARE

// queues one of the operations of vectors.h
void run_vectors(const Launch&, const VectorOp&, int operation);
// queues the pre-conditioner of a rule of FW_PRECONDITIONED
void run_preconditioner(const Launch&, int rule, const Step&, const PreconditionerOp&);

}  // namespace fw
