// What follows the update of a pack: the weight average, or for a group on a sphere the sum of squares of its
// parameters, from which rescale_kernel() brings the group back and averages it.
// No mathematics here: rules.h and decide.h have it.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../decide.h"
#include "measure.cuh"

namespace fw {
namespace {

// one thread's part of the sum of squares of the parameters in a chunk, as they are stored
struct SumSq {
  double sum_sq = 0.0;
  bool wanted;

  template <class P, int N>
  FW_DEVICE void add(const P (&param)[N]) {
    if (!wanted) return;
    using C = typename Arithmetic<P>::type;
    for (int i = 0; i < N; ++i) accumulate_l2(sum_sq, static_cast<C>(widen(param[i])));
  }
};

template <int N, class P, class C>
FW_DEVICE void average_part(C* column, const P* param, C weight) {
  C average[N];
  load(column, average);
  for (int k = 0; k < N; ++k) average_update(average[k], static_cast<C>(widen(param[k])), weight);
  store(average, column);
}

// what follows the update of a pack at i, from its values as they are stored
template <int kParts = 1, int N, bool kRounds, class P, class G, class C>
FW_DEVICE void finish_pack(const ChunkPointers<P, G>& s, int32_t i, ParamPack<N, P, kRounds>& param, C weight,
                           SumSq& sum_sq) {
  if (!sum_sq.wanted && !s.average) return;
  param.widen(s);
  sum_sq.add(param.value);
  if (s.average)
    for (int k = 0; k < N; k += N / kParts)
      average_part<N / kParts>(s.average + i + k, param.value + k, weight);
}

// what follows the update of a chunk, where it has had no gradient
template <class P, class G, class C>
FW_DEVICE void finish_chunk(const ChunkPointers<P, G>& s, C weight, SumSq& sum_sq) {
  if (!sum_sq.wanted && !s.average) return;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < s.count; i += kThreads) {
    ParamPack<1, P> param;
    param.load_from(s, i);
    finish_pack(s, i, param, weight, sum_sq);
  }
}

// the sum of squares of the parameters of a group, by one block; those of one slot unless it is negative
FW_DEVICE double sum_squares(const Step& step, const Sphere& sphere, int64_t slot) {
  const double* sum_sq = at<double>(step.squares);
  const Chunk* chunks = at<Chunk>(step.chunks);
  double total[1] = {};
  // written by other blocks: bypass L1
  for (int64_t i = sphere.first_chunk + threadIdx.x; i < sphere.first_chunk + sphere.n_chunks; i += kThreads)
    if (slot < 0 || spread_of(step, chunks[i].row).slot == slot) total[0] += __ldcg(sum_sq + i);
  share_block_sum(total);
  return total[0];
}

// the factors of all groups on a sphere, by one block
FW_DEVICE void finish_spheres(const Step& step) {
  for (int64_t group = 0; group < step.n_groups; ++group) {
    Sphere* sphere = sphere_of(step, group);
    if (!sphere) continue;
    const double sum_sq = step.totals ? combine_slots(step, group) : sum_squares(step, *sphere, -1);
    if (threadIdx.x == 0) set_factor(*sphere, sum_sq);
  }
}

// the second pass over a chunk of a group on a sphere, with or without a gradient
struct Rescale {
  const Step& step;
  double factor, average_weight;
  bool rounds;

  template <class P, class G>
  FW_DEVICE Partial run(const Row& row, uint64_t, const Chunk& chunk) const {
    using C = typename Arithmetic<P>::type;
    ChunkPointers<P, P> s(row, row.param, chunk, rounds);
    if (!(average_weight > 0.0)) s.average = nullptr;
#pragma unroll 1
    for (int32_t i = threadIdx.x * kPack<P>; i < s.count; i += kThreads * kPack<P>) {
      if (s.whole(i)) {
        rescale_pack<kPack<P>, P, C>(s, i);
      } else {
#pragma unroll 1
        for (int32_t k = i; k < s.end(i); ++k) rescale_pack<1, P, C>(s, k);
      }
    }
    return Partial{};
  }

  template <int N, class P, class C>
  FW_DEVICE void rescale_pack(const ChunkPointers<P, P>& s, int32_t i) const {
    ParamPack<N, P> param;
    param.load_from(s, i);
    param.widen(s);
    for (C& value : param.value) value = rescale(value, static_cast<C>(factor));
    param.store_to(s, i, step, kSpherePass);
    SumSq none{0.0, false};
    finish_pack(s, i, param, static_cast<C>(average_weight), none);
  }
};

template <bool kAllKinds>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    rescale_kernel(const __grid_constant__ Step step) {
  const StepDecision& decision = *at<StepDecision>(step.decision);
  if (decision.skipped) return;
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const Sphere* sphere = sphere_of(step, row.group);
    if (sphere)
      visit<kAllKinds>(Rescale{step, sphere->factor, average_weight_of(row), kAllKinds}, row, row.param,
                       chunk);
  }
}

}  // namespace
}  // namespace fw
