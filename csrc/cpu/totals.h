// The sums over the rows of this process on the CPU, which the processes add up between two stages.
// No mathematics here: reduce.h and totals.h have it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../decide.h"

namespace fw {
namespace {

// the sums over the gradients, by slot
void fold_norms(const Step& step) {
  for (int64_t slot = 0; slot < step.n_slots; ++slot)
    for (int k = 0; k < 2; ++k) norms_of_slot(step, slot)[k] = 0.0;
  int64_t nonfinite = 0;
  // without norms of their own, partials are those of an earlier step
  for (int64_t i = 0; i < step.n_chunks && (step.measure || accumulates(step)); ++i) {
    const Partial& part = at<Partial>(step.partials)[i];
    double* norms = norms_of_slot(step, spread_of(step, at<Chunk>(step.chunks)[i].row).slot);
    norms[0] += part.l1;
    norms[1] += part.l2_sq;
    nonfinite += part.nonfinite;
  }
  flags_of(step)[0] = static_cast<double>(nonfinite);
  flags_of(step)[1] = step.found_inf && *at<float>(step.found_inf) != 0.0f ? 1.0 : 0.0;
}

// the squares of the parameters of groups on a sphere, by slot
void fold_squares(const Step& step) {
  for (int64_t i = 0; i < step.n_groups * step.n_slots; ++i) squares_of_group(step, 0)[i] = 0.0;
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const int32_t row = at<Chunk>(step.chunks)[i].row, group = at<Row>(step.rows)[row].group;
    if (sphere_of(step, group))
      squares_of_group(step, group)[spread_of(step, row).slot] += at<double>(step.squares)[i];
  }
}

}  // namespace
}  // namespace fw
