// Sums that processes add up, where rows are spread over several. They lie in one stretch of doubles: for
// each group the squares of its parameters by slot, for each slot the magnitudes and the squares of the
// gradients, the numbers of non-finite elements and of overflows that a GradScaler found, and the sums of the
// layers. A slot has the sums over rows that are spread over the same processes. SPDX-License-Identifier:
// Apache-2.0
#pragma once
#include "reduce.h"

namespace fw {

FW_HOST_DEVICE double* squares_of_group(const Step& step, int64_t group) {
  return at<double>(step.totals) + group * step.n_slots;
}

FW_HOST_DEVICE double* norms_of_slot(const Step& step, int64_t slot) {
  return squares_of_group(step, step.n_groups) + 2 * slot;
}

FW_HOST_DEVICE double* flags_of(const Step& step) { return norms_of_slot(step, step.n_slots); }

FW_HOST_DEVICE double* sums_of_layer(const Step& step, const Spread& spread) {
  return flags_of(step) + 2 + spread.first_total;
}

FW_HOST_DEVICE const Spread& spread_of(const Step& step, int64_t row) {
  return at<Spread>(step.spreads)[row];
}

// the sums over the gradients of all processes
FW_HOST_DEVICE Partial combine_slots(const Step& step) {
  Partial total = {};
  for (int64_t slot = 0; slot < step.n_slots; ++slot) {
    const double* norms = norms_of_slot(step, slot);
    combine(total, Partial{norms[0], norms[1], 0});
  }
  total.nonfinite = static_cast<int64_t>(flags_of(step)[0]);
  return total;
}

// the sum of squares of all parameters of a group in all processes
FW_HOST_DEVICE double combine_slots(const Step& step, int64_t group) {
  double total = 0.0;
  for (int64_t slot = 0; slot < step.n_slots; ++slot) total += squares_of_group(step, group)[slot];
  return total;
}

// the layer that a row is, or is a part of
struct Layer {
  int64_t numel, channels, channel_size;

  FW_HOST_DEVICE Layer(const Step& step, int64_t index) {
    const Row& row = at<Row>(step.rows)[index];
    numel = step.totals ? spread_of(step, index).numel : row.numel;
    channels = step.totals ? spread_of(step, index).channels : row.numel / row.channel_size;
    channel_size = numel / channels;
  }
};

// whether other processes have parts of the channels of a row
FW_HOST_DEVICE bool is_cut(const Step& step, int64_t row) {
  return step.totals && spread_of(step, row).is_cut;
}

}  // namespace fw
