// The measure stage on the CPU: L1 norm, squared L2 norm and non-finite count of a gradient, chunk by chunk.
// No mathematics here: reduce.h has it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../reduce.h"
#include "blocks.h"
#include "runs.h"
#include "wide.h"

namespace fw {
namespace {

// the sums over one chunk, block by block; the lanes fix the order of the sums
struct NormLanes {
  double l1[kLanes] = {}, l2_sq[kLanes] = {};
  int64_t nonfinite = 0;

  template <class C>
  FW_LEAF void add(const C* __restrict grad, int count) {
    C a[kLanes] = {};
    Wide<double> b[kLanes / kWide];
    for (int k = 0; k < kLanes / kWide; ++k) b[k] = load_wide(l2_sq + k * kWide);
    const int whole = count - count % kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) accumulate_l1(a[lane], grad[i + lane]);
      for (int k = 0; k < kLanes / kWide; ++k) accumulate_l2(b[k], load_wide(grad + i + k * kWide));
    }
    for (int k = 0; k < kLanes / kWide; ++k) store_wide(b[k], l2_sq + k * kWide);
    for (int i = whole; i < count; ++i) {
      accumulate_l1(a[i - whole], grad[i]);
      accumulate_l2(l2_sq[i - whole], grad[i]);
    }
    C sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += a[lane];
    if (is_nonfinite(sum)) {
      add_slowly(grad, count);
      return;
    }
    for (int lane = 0; lane < kLanes; ++lane) l1[lane] += static_cast<double>(a[lane]);
  }

  // for a block whose L1 norm is not finite: counts the non-finite elements and sums in double
  template <class C>
  FW_LEAF void add_slowly(const C* __restrict grad, int count) {
    for (int i = 0; i < count; ++i) {
      nonfinite += is_nonfinite(grad[i]);
      accumulate_l1(l1[i % kLanes], static_cast<double>(grad[i]));
    }
  }

  Partial sum() const {
    Partial total = {};
    for (int lane = 0; lane < kLanes; ++lane) combine(total, Partial{l1[lane], l2_sq[lane], 0});
    total.nonfinite = nonfinite;
    return total;
  }
};

template <class C>
Partial measure_chunk(const Row& row, uint64_t grad, const Chunk& chunk) {
  NormLanes lanes;
  alignas(64) C scratch[kBlock];
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int count = block_size(chunk, done);
    lanes.add(load<C>(grad, row.grad_dtype, chunk.offset + done, count, scratch), count);
  }
  return lanes.sum();
}

// the sums of every chunk; a chunk without a gradient has zeros
void measure_chunks(const Step& step) {
  Partial* partials = at<Partial>(step.partials);
  visit_chunks<Runs::kForwards>(step.n_chunks, [&](int64_t i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const uint64_t grad = at<uint64_t>(step.grads)[chunk.row];
    if (!grad)
      partials[i] = Partial{};
    else if (row.dtype == kFloat64)
      partials[i] = measure_chunk<double>(row, grad, chunk);
    else
      partials[i] = measure_chunk<float>(row, grad, chunk);
  });
}

}  // namespace
}  // namespace fw
