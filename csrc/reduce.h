// Norms of the gradients: the statement per element, and the combination of chunk sums in a fixed order.
// Sums end in double, so no finite float32 gradient overflows them; no float atomics anywhere.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "table.h"

namespace fw {

// the squares decide about clipping and are summed in double; magnitudes are only reported, so that a short
// run of them may be summed in the type of the arithmetic
template <class C>
FW_HD void accumulate_l2(double& l2_sq, C grad) {
  double x = static_cast<double>(grad);
  l2_sq = multiply_add(x, x, l2_sq);
}

template <class C>
FW_HD void accumulate_l1(C& l1, C grad) {
  l1 += magnitude(grad);
}

template <class C>
FW_HD bool is_nonfinite(C x) {
  return !(x - x == C(0));
}

FW_HD void combine(Partial& total, const Partial& part) {
  total.l1 += part.l1;
  total.l2_sq += part.l2_sq;
  total.nonfinite += part.nonfinite;
}

FW_HD Partial combine_all(const Partial* partials, int64_t count) {
  Partial total = {};
  for (int64_t i = 0; i < count; ++i) combine(total, partials[i]);
  return total;
}

}  // namespace fw
