// Norms of the gradients: the statement per element, and the combination of chunk sums in a fixed order.
// Sums run in double, so no finite float32 gradient overflows them; no float atomics anywhere.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "table.h"

namespace fw {

template <class C>
FW_HD void accumulate_norms(double& l1, double& l2_sq, C grad) {
  double x = static_cast<double>(grad);
  l1 += fabs(x);
  l2_sq += x * x;
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
