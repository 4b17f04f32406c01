// The decide stage: clipping, counters, learning rates, the scalars of every row, and the telemetry row. Each
// block takes some rows; all of them make the same decision, and the last one to finish records it. No
// mathematics here: decide.h calls rules.h and schedules.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "measure.cuh"

namespace fw {
namespace {

// the least number that any thread of a block brings
FW_DEVICE int32_t block_min(int32_t number) {
  __shared__ int32_t of_warp[kDecideThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_down_sync(~0u, number, distance);
    number = other < number ? other : number;
  }
  // other threads may still read the numbers of the previous call
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = number;
  __syncthreads();
  int32_t least = of_warp[0];
  for (int warp = 1; warp < kDecideThreads / kWarp; ++warp)
    if (of_warp[warp] < least) least = of_warp[warp];
  return least;
}

// counters and scalars of one tile of rows, one for each thread
template <class Rule, int kSize>
FW_DEVICE void set_rows(const Step& step, const GradPointers<kSize>& pointers, const StepDecision& decision,
                        int64_t begin) {
  __shared__ int32_t copies[kDecideThreads];
  constexpr int kWords = sizeof(Scalars) / sizeof(uint64_t);
  const int64_t row = begin + threadIdx.x;
  const Row* rows = at<Row>(step.rows);
  const bool active = row < step.n_rows && grad_of(step, pointers, row);
  if (row < step.n_rows) count_average(step, decision, rows[row]);
  if (active) count_update(rows[row]);
  const int64_t first = begin + block_min(active ? static_cast<int32_t>(threadIdx.x) : kDecideThreads);
  // most rows share the scalars of the first, and double arithmetic is slow on many devices
  const bool own = active && (row == first || !same_scalars(step, row, first));
  if (own) set_scalars<Rule>(step, decision, rates_of(step, decision, rows[row].group), row);
  copies[threadIdx.x] = active && !own;
  __syncthreads();
  // neighbouring threads write neighbouring words
  uint64_t* words = at<uint64_t>(step.scalars);
  for (int i = threadIdx.x; i < kDecideThreads * kWords; i += kDecideThreads)
    if (copies[i / kWords]) words[begin * kWords + i] = words[first * kWords + i % kWords];
}

// the rectification of the first row that has a gradient, by one block
FW_DEVICE double first_rect(const Step& step) {
  for (int64_t begin = 0; begin < step.n_rows; begin += kDecideThreads) {
    const int64_t row = begin + threadIdx.x;
    const bool active = row < step.n_rows && __ldcg(at<uint64_t>(step.grads) + row);
    const int32_t first = block_min(active ? static_cast<int32_t>(threadIdx.x) : kDecideThreads);
    if (first < kDecideThreads) return __ldcg(&at<Scalars>(step.scalars)[begin + first].rect);
  }
  return NAN;
}

template <class Rule, int kSize>
__global__ void __launch_bounds__(kDecideThreads, 1)
    decide_kernel(const __grid_constant__ Step step, const __grid_constant__ GradPointers<kSize> pointers) {
  __shared__ StepDecision decision;
  save_grad_pointers(step, pointers);
  const Partial total = step.measure ? sum_norms(step) : Partial{};
  if (threadIdx.x == 0) decision = decide(step, total);
  __syncthreads();
  const int64_t stride = int64_t(gridDim.x) * kDecideThreads;
  const int64_t begin = int64_t(blockIdx.x) * kDecideThreads;
  for (int64_t group = begin + threadIdx.x; group < step.n_groups; group += stride)
    set_rates(step, decision, group);
  for (int64_t row = begin; row < step.n_rows && !decision.skipped; row += stride)
    set_rows<Rule>(step, pointers, decision, row);
  StepDecision& shared = *at<StepDecision>(step.decision);
  if (gridDim.x > 1 && !arrives_last(&shared.decided)) return;
  const double rect = decision.skipped ? NAN : first_rect(step);
  if (threadIdx.x == 0) {
    decision.rect = rect;
    record(step, decision);
    shared = decision;
  }
}

}  // namespace
}  // namespace fw
