// The decide stage, by one block: clipping, counters, learning rates, the scalars of every row, and the
// telemetry row. No mathematics here: decide.h calls rules.h and schedules.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "measure.cuh"

namespace fw {
namespace {

// counters and scalars of all rows that have a gradient
template <class Rule, int kSize>
FW_DEVICE void set_rows(const Step& step, const GradPointers<kSize>& pointers, StepDecision& decision) {
  __shared__ int first_of_tile;
  const Row* rows = at<Row>(step.rows);
  Scalars* scalars = at<Scalars>(step.scalars);
  bool found = false;
  for (int64_t begin = 0; begin < step.n_rows; begin += blockDim.x) {
    const int64_t row = begin + threadIdx.x;
    const bool active = row < step.n_rows && grad_of(step, pointers, row);
    if (row < step.n_rows) count_average(step, decision, rows[row]);
    if (active) count_update(rows[row]);
    if (threadIdx.x == 0) first_of_tile = kDecideThreads;
    __syncthreads();
    if (active && (threadIdx.x == 0 || !grad_of(step, pointers, row - 1)))
      atomicMin(&first_of_tile, threadIdx.x);
    __syncthreads();
    // most rows share the scalars of the first, and double arithmetic is slow on many devices
    const int64_t first = begin + first_of_tile;
    const bool own = active && (row == first || !same_scalars(step, row, first));
    if (own) set_scalars<Rule>(step, decision, row);
    __syncthreads();
    if (active && !own) scalars[row] = scalars[first];
    if (!found && row == first) decision.rect = scalars[row].rect;
    found = found || first_of_tile < kDecideThreads;
    __syncthreads();
  }
}

template <class Rule, int kSize>
__global__ void __launch_bounds__(kDecideThreads, 1)
    decide_kernel(const __grid_constant__ Step step, const __grid_constant__ GradPointers<kSize> pointers) {
  __shared__ StepDecision decision;
  save_grad_pointers(step, pointers);
  const Partial total = step.measure ? sum_chunks(step) : Partial{};
  if (threadIdx.x == 0) decision = decide(step, total);
  __syncthreads();
  for (int64_t group = threadIdx.x; group < step.n_groups; group += blockDim.x)
    set_rates(step, decision, group);
  __syncthreads();
  if (!decision.skipped) set_rows<Rule>(step, pointers, decision);
  __syncthreads();
  if (threadIdx.x == 0) {
    record(step, decision);
    *at<StepDecision>(step.decision) = decision;
  }
}

}  // namespace
}  // namespace fw
