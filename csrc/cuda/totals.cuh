// The sums over the rows of this process, which the processes add up between two stages. No mathematics here:
// reduce.h and totals.h have it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "layerwise.cuh"
#include "sphere.cuh"

namespace fw {
namespace {

// the sums over the gradients by slot, by one block
FW_DEVICE void fold_norms(const Step& step) {
  // without norms of their own, partials are those of an earlier step
  const int64_t n_chunks = step.measure || accumulates(step) ? step.n_chunks : 0;
  int64_t nonfinite = 0;
  for (int64_t slot = 0; slot < step.n_slots; ++slot) {
    Partial total = {};
    combine_every<16>(total, threadIdx.x, n_chunks, kThreads, [&](Partial& part, int64_t i) {
      if (spread_of(step, at<Chunk>(step.chunks)[i].row).slot == slot)
        part = load_partial(at<Partial>(step.partials) + i);
    });
    total = block_sum(total);
    if (threadIdx.x != 0) continue;
    norms_of_slot(step, slot)[0] = total.l1;
    norms_of_slot(step, slot)[1] = total.l2_sq;
    nonfinite += total.nonfinite;
  }
  if (threadIdx.x != 0) return;
  flags_of(step)[0] = static_cast<double>(nonfinite);
  flags_of(step)[1] = step.found_inf && *at<float>(step.found_inf) != 0.0f ? 1.0 : 0.0;
}

// the squares of the parameters of groups on a sphere by slot, by one block
FW_DEVICE void fold_squares(const Step& step) {
  for (int64_t group = 0; group < step.n_groups; ++group)
    for (int64_t slot = 0; slot < step.n_slots; ++slot) {
      const Sphere* sphere = sphere_of(step, group);
      const double total = sphere ? sum_squares(step, *sphere, slot) : 0.0;
      if (threadIdx.x == 0) squares_of_group(step, group)[slot] = total;
    }
}

// the sums over one channel of a row, which stage1 has by chunks or by pieces
template <class Rule>
FW_DEVICE void sum_channel(const Step& step, const Row& row, int64_t channel, double (&sums)[Rule::kSums]) {
  const int64_t channels = row.numel / row.channel_size, each = row.n_chunks / channels;
  int64_t first = row.first_chunk + channel * each, count = each;
  if (each == 0) {
    // chunks of several channels, the last of which may have one
    first = row.first_chunk + row.n_chunks - 1;
    count = channel == channels - 1 && !has_channels(row, at<Chunk>(step.chunks)[first]) ? 1 : 0;
  }
  if (count == 0) {
    combine_channel(sums, step, row, channel);
    return;
  }
  double found[Rule::kSums + 1] = {};
  combine_chunks(found, step, first, count);
  for (int k = 0; k < Rule::kSums; ++k) sums[k] = found[k];
}

// the sums over one tensor, by one block
template <class Rule>
FW_DEVICE void fold_layer(const Step& step, int64_t index) {
  const Row& row = at<Row>(step.rows)[index];
  const Spread& spread = spread_of(step, index);
  const bool is_here = at<uint64_t>(step.grads)[index] && row.numel > 0;
  double* sums = sums_of_layer(step, spread);
  if (!spread.is_cut) {
    double found[Rule::kSums + 1] = {};
    if (is_here) sum_layer<Rule>(step, index, found);
    for (int k = 0; k <= Rule::kSums; ++k)
      if (threadIdx.x == 0) sums[k] = found[k];
    return;
  }
  const int64_t channels = is_here ? row.numel / row.channel_size : 0;
  for (int64_t i = threadIdx.x; i < spread.channels; i += kThreads) {
    const int64_t channel = i - spread.first_channel;
    double found[Rule::kSums] = {};
    if (channel >= 0 && channel < channels) sum_channel<Rule>(step, row, channel, found);
    for (int k = 0; k < Rule::kSums; ++k) sums[i * Rule::kSums + k] = found[k];
  }
}

// adds up what the next stage needs of all processes
template <class Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorOfSums)
    fold_kernel(const __grid_constant__ Step step, int32_t stage) {
  StepDecision& decision = *at<StepDecision>(step.decision);
  if (stage == kMeasureStage) {
    fold_norms(step);
    return;
  }
  if (decision.skipped) return;
  const bool norms = stage == kUpdateStage && accumulates(step);
  if constexpr (Rule::kSums > 0) {
    for (int64_t row = blockIdx.x; row < step.n_rows && stage == kUpdateStage; row += gridDim.x)
      fold_layer<Rule>(step, row);
    if (blockIdx.x != 0) return;
  } else {
    if (norms && tiles_of_chunk(step) > 1) combine_tiles(step);
    if (gridDim.x > 1) {
      __syncthreads();
      if (!arrives_last(&decision.summed)) return;
    }
  }
  if (norms) fold_norms(step);
  if (step.spheres && stage == (Rule::kSums > 0 ? kLayerStage : kUpdateStage)) fold_squares(step);
}

}  // namespace
}  // namespace fw
