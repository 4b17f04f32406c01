// Every schedule as a function of the number of steps made, once for the CPU and CUDA; reference/schedules.py
// has the same statements in the same order.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "table.h"

namespace fw {

// multiplier of one segment at its own step t >= 0; after the segment its end value is kept
FW_HOST_DEVICE double segment_value(const Segment& segment, int64_t t) {
  double start = segment.start, end = segment.end, shape = segment.shape;
  if (segment.kind == kInverseSqrt) return start / sqrt(1.0 + static_cast<double>(t) / shape);
  if (segment.kind == kWarmup) t = t + 1;
  if (segment.steps > 0 && t >= segment.steps) return end;
  double x = segment.steps > 0 ? static_cast<double>(t) / static_cast<double>(segment.steps) : 0.0;
  switch (segment.kind) {
    case kWarmup:
    case kLinear:
      return start + (end - start) * x;
    case kCosine:
      return start + (end - start) * (0.5 * (1.0 - cos_of_pi(x)));
    case kExponential:
      return start * pow(end / start, x);
    case kPolynomial:
      return start + (end - start) * (1.0 - pow(1.0 - x, shape));
    case kTable:
      return at<double>(segment.table)[t];
    default:
      return start;
  }
}

// multiplier at step t of a chain of segments; an empty chain is the constant 1
FW_HOST_DEVICE double multiplier(const Segment* segments, int32_t count, int64_t t) {
  if (count == 0) return 1.0;
  int32_t i = 0;
  while (i + 1 < count && t >= segments[i + 1].begin) i = i + 1;
  return segment_value(segments[i], t - segments[i].begin);
}

// whether update number `step` enters the average
FW_HOST_DEVICE bool is_averaged(int32_t kind, int64_t start, int64_t every, int64_t step) {
  return kind != kAverageNone && step >= start && (step - start) % every == 0;
}

// weight of the parameter in its average, which it enters as value number `n_averaged`
FW_HOST_DEVICE double average_weight(int32_t kind, double decay, int64_t n_averaged) {
  if (kind == kAverageSwa) return 1.0 / static_cast<double>(n_averaged);
  return n_averaged == 1 ? 1.0 : 1.0 - decay;
}

}  // namespace fw
