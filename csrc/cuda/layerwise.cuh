// The stages of a rule that needs sums over layers: stage1 updates the moments and sums over pieces of
// channels, reduce turns the sums of a layer into its scalars and projection coefficients, stage2 updates the
// parameter. No mathematics here: rules.h and reduce.h have it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../decide.h"
#include "chunks.cuh"
#include "measure.cuh"
#include "pieces.cuh"
#include "sphere.cuh"

namespace fw {
namespace {

// two packs of float32 fit into the registers of a thread
template <class P>
constexpr int kLayerPacks = sizeof(P) == sizeof(float) ? 2 : 1;

// N elements of the tensors of a layer-wise rule, in registers, of states that may be rounded if kRounds
template <int kStates, int N, class P, class G, bool kRounds = true>
struct LayerPack {
  using C = typename Arithmetic<P>::type;
  StatePack<kStates, N, C, kRounds> states;
  G grad[N] = {};
  ParamPack<N, P> param;

  template <class Pointers>
  FW_DEVICE void load_from(const Pointers& s, int32_t i, bool needs_grad) {
    if (needs_grad) load_half<Pointers::kStaged>(kGradPlace, s.grad, i, grad);
    param.load_from(s, i);
    states.load_from(s, i);
  }

  // makes the values those that were loaded
  FW_DEVICE void widen(const ChunkPointers<P, G>& s) {
    param.widen(s);
    states.widen(s);
  }
};

// updates the moments of kPacks packs from i on, a stride apart, and sums over the direction of the update
// and over the gradient; all loads come before the first result. The direction is that of stage2, from the
// moments as they are stored.
template <class Rule, int kStates, int kPacks, int N, bool kRounds, template <class, class> class Pointers,
          class P, class G, class C>
FW_DEVICE void stage1_part(const Step& step, const Pointers<P, G>& s, int32_t i, int32_t stride,
                           const ScalarsOf<C>& scalars, double (&sums)[Rule::kSums], bool accumulate,
                           NormSum<C>& norms) {
  LayerPack<kStates, N, P, G, kRounds> packs[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) packs[p].states.draw(s, i + p * stride, step);
  for (int p = 0; p < kPacks; ++p) packs[p].load_from(s, i + p * stride, true);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    auto& pack = packs[p];
    pack.widen(s);
    if constexpr (N > 1)
      if (accumulate) add_pack<C>(norms, pack.grad);
    // the sums over an element, from moments in registers
    const auto add = [&](int k, C grad, const C(&state)[kMaxStates]) {
      const C param = pack.param.value[k];
      const C update = Rule::template direction<kStates>(param, grad, state, scalars);
      Rule::accumulate(sums, param, grad, update, scalars);
    };
    for (int k = 0; k < N; ++k) {
      const C grad = static_cast<C>(widen(pack.grad[k]));
      C state[kMaxStates] = {};
      pack.states.read(k, state);
      Rule::template update_moments<kStates>(pack.param.value[k], grad, state, scalars);
      if constexpr (!kRounds) add(k, grad, state);
      pack.states.write(k, state);
    }
    pack.states.round(s);
    for (int k = 0; kRounds && k < N; ++k) {
      C state[kMaxStates] = {};
      pack.states.read(k, state);
      add(k, static_cast<C>(widen(pack.grad[k])), state);
    }
    pack.states.store_to(s, i + p * stride);
  }
}

// recomputes the direction from the updated moments, and updates the parameter
template <class Rule, int kStates, int kPacks, int N, class P, class G, class C>
FW_DEVICE void stage2_part(const Step& step, const ChunkPointers<P, G>& s, int32_t i, int32_t stride,
                           const ScalarsOf<C>& scalars, C projection_coef, C weight, bool needs_grad,
                           SumSq& sum_sq) {
  LayerPack<kStates, N, P, G> packs[kPacks];
  for (int p = 0; p < kPacks; ++p) packs[p].load_from(s, i + p * stride, needs_grad);
  for (int p = 0; p < kPacks; ++p) {
    auto& pack = packs[p];
    pack.widen(s);
    for (int k = 0; k < N; ++k) {
      C& value = pack.param.value[k];
      C state[kMaxStates] = {};
      const C grad = static_cast<C>(widen(pack.grad[k]));
      pack.states.read(k, state);
      Rule::apply(value, Rule::template direction<kStates>(value, grad, state, scalars), projection_coef,
                  scalars);
    }
    pack.param.store_to(s, i + p * stride, step, kUpdatePass);
    finish_pack(s, i + p * stride, pack.param, weight, sum_sq);
  }
}

// the packs of one of `threads` threads; norms are summed in the order of the measure stage, so that they
// have the same bits
template <class Rule, int kStates, class P, class G, class C>
FW_DEVICE void stage1_packs(const Step& step, const ChunkPointers<P, G>& s, int32_t thread, int32_t threads,
                            const ScalarsOf<C>& scalars, double (&sums)[Rule::kSums], bool accumulate,
                            NormSum<C>& norms) {
  share_packs<kLayerPacks<P>>(
      s, thread, threads,
      [&](int32_t i, int32_t stride, auto packs) {
        if constexpr (kStates > 0 && kMayRoundStates<C>) {
          // rounding takes more registers, so that one pack of float32 goes at a time, and half a pack of 16
          // bits
          if (s.states.rounded) {
            const StagedPointers<P, G> staged(s);
            static_assert(!staged.kStaged || decltype(packs)::value == 1, "one pack is staged");
            staged.stage_in(i);
#pragma unroll 1
            for (int32_t k = 0; k < decltype(packs)::value * kPack<P>; k += kPack<C>)
              stage1_part<Rule, kStates, 1, kPack<C>, true>(step, staged,
                                                            i + k / kPack<P> * stride + k % kPack<P>, 0,
                                                            scalars, sums, accumulate, norms);
            staged.unstage_states(i);
            return;
          }
        }
        stage1_part<Rule, kStates, decltype(packs)::value, kPack<P>, false>(step, s, i, stride, scalars, sums,
                                                                            accumulate, norms);
      },
      [&](int32_t i) {
        if (accumulate) add_partial_pack(norms, s, i);
#pragma unroll 1
        for (int32_t k = i; k < s.end(i); ++k)
          stage1_part<Rule, kStates, 1, 1, true>(step, s, k, 0, scalars, sums, false, norms);
      });
}

// writes the coefficient that one channel is projected with if every channel is; returns 1 if the channel is
// not scale-invariant, else 0
template <class Rule>
FW_DEVICE double judge_channel(const Step& step, const Row& row, int64_t channel, int64_t channel_size,
                               const double* sums) {
  const Hyper& h = at<Hyper>(step.hypers)[row.group];
  set_projection_coef(step, row, channel, coef_in_view<Rule>(kChannelView, h, sums, sums));
  return Rule::scale_invariant(h, sums, channel_size) ? 0.0 : 1.0;
}

// a chunk of one channel, or a part of one
template <class Rule, int kStates, class P, class G>
FW_DEVICE Partial stage1_channel(const Step& step, const Row& row, uint64_t grad_address, const Chunk& chunk,
                                 double (&found)[Rule::kSums + 1], bool rounds) {
  const ScalarsOf<typename ChunkPointers<P, G>::C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  double sums[Rule::kSums] = {};
  NormSum<typename ChunkPointers<P, G>::C> norms;
  const ChunkPointers<P, G> s(row, grad_address, chunk, rounds);
  stage1_packs<Rule, kStates>(step, s, threadIdx.x, kThreads, scalars, sums, accumulates(step), norms);
  share_block_sum(sums);
  for (int k = 0; k < Rule::kSums; ++k) found[k] = sums[k];
  // a layer of one channel is tested as a layer
  if constexpr (Rule::kProjects)
    if (threadIdx.x == 0 && chunk.count == row.channel_size && Layer(step, chunk.row).channels > 1)
      found[Rule::kSums] =
          judge_channel<Rule>(step, row, chunk.offset / row.channel_size, row.channel_size, sums);
  return total_of(norms, [&] { return sum_packs<WideSum>(s); });
}

// a chunk of several channels
template <class Rule, int kStates, class P, class G>
FW_DEVICE Partial stage1_channels(const Step& step, const Row& row, uint64_t grad_address, const Chunk& chunk,
                                  double (&found)[Rule::kSums + 1], bool rounds) {
  const ScalarsOf<typename ChunkPointers<P, G>::C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const Pieces pieces(row, chunk);
  const ThreadGroup<P, G> threads(pieces, rounds);
  NormSum<typename ChunkPointers<P, G>::C> norms;
  threads.visit(pieces, row, grad_address, chunk, [&](int32_t piece, const ChunkPointers<P, G>& s) {
    double sums[Rule::kSums] = {};
    stage1_packs<Rule, kStates>(step, s, threads.lane, threads.width, scalars, sums, accumulates(step),
                                norms);
    group_sum(sums, threads.width);
    double* out = at<double>(step.sums) + (pieces.first + piece) * Rule::kSums;
    for (int k = 0; k < Rule::kSums; ++k)
      if (threads.lane == 0 && s.count > 0) out[k] = sums[k];
  });
  // wait for the sums over pieces
  __syncthreads();
  const int64_t first = chunk.offset / row.channel_size;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < chunk.count / pieces.channel_size; i += kThreads) {
    double channel[Rule::kSums] = {};
    combine_channel(channel, step, row, first + i);
    for (int k = 0; k < Rule::kSums; ++k) found[k] += channel[k];
    found[Rule::kSums] += judge_channel<Rule>(step, row, first + i, row.channel_size, channel);
  }
  share_block_sum(found);
  return total_of(norms, [&] { return sum_channels<WideSum, P, G>(row, grad_address, chunk); });
}

template <class Rule, int kStates, class P, class G>
FW_DEVICE void stage2_chunk(const Step& step, const Row& row, uint64_t grad_address, const Chunk& chunk,
                            SumSq& sum_sq, bool rounds) {
  using C = typename ChunkPointers<P, G>::C;
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const C weight = static_cast<C>(average_weight_of(row));
  const bool needs_grad = Rule::needs_grad(at<Hyper>(step.hypers)[row.group], row.n_states);
  const Pieces pieces(row, chunk);
  const ThreadGroup<P, G> threads(pieces, rounds);
  LayerProjection layer = {};
  if constexpr (Rule::kProjects) layer = at<LayerProjection>(step.layer_projections)[chunk.row];
  threads.visit(pieces, row, grad_address, chunk, [&](int32_t piece, ChunkPointers<P, G> s) {
    if (!(weight > C(0)) || sum_sq.wanted) s.average = nullptr;
    C projection_coef = static_cast<C>(layer.coef);
    if (layer.view == kChannelView && s.count > 0)
      projection_coef = static_cast<C>(at<double>(step.projection_coefs)[pieces.first + piece]);
    share_packs<kLayerPacks<P>>(
        s, threads.lane, threads.width,
        [&](int32_t i, int32_t stride, auto packs) {
          stage2_part<Rule, kStates, decltype(packs)::value, kPack<P>>(
              step, s, i, stride, scalars, projection_coef, weight, needs_grad, sum_sq);
        },
        [&](int32_t i) {
#pragma unroll 1
          for (int32_t k = i; k < s.end(i); ++k)
            stage2_part<Rule, kStates, 1, 1>(step, s, k, 0, scalars, projection_coef, weight, needs_grad,
                                             sum_sq);
        });
  });
}

template <class Rule, int kStates, class P, class G>
FW_DEVICE void stage2_states(const Step& step, const Row& row, uint64_t grad_address, const Chunk& chunk,
                             SumSq& sum_sq, bool rounds) {
  if constexpr (kStates < Rule::kMaxStates)
    if (row.n_states > kStates)
      return stage2_states<Rule, kStates + 1, P, G>(step, row, grad_address, chunk, sum_sq, rounds);
  stage2_chunk<Rule, kStates, P, G>(step, row, grad_address, chunk, sum_sq, rounds);
}

template <class Rule>
struct Stage1 {
  const Step& step;
  int64_t index;
  bool rounds;

  template <class P, class G>
  FW_DEVICE Partial run(const Row& row, uint64_t grad_address, const Chunk& chunk) const {
    return grad_address ? with_states<Rule::kMinStates, P, G>(row, grad_address, chunk) : Partial{};
  }

  template <int kStates, class P, class G>
  FW_DEVICE Partial with_states(const Row& row, uint64_t grad_address, const Chunk& chunk) const {
    if constexpr (kStates < Rule::kMaxStates)
      if (row.n_states > kStates) return with_states<kStates + 1, P, G>(row, grad_address, chunk);
    double found[Rule::kSums + 1] = {};
    const Partial norms = sum<kStates, P, G>(row, grad_address, chunk, found);
    double* out = at<double>(step.chunk_sums) + index * (Rule::kSums + 1);
    for (int k = 0; k <= Rule::kSums; ++k)
      if (threadIdx.x == 0) out[k] = found[k];
    return norms;
  }

  template <int kStates, class P, class G>
  FW_DEVICE Partial sum(const Row& row, uint64_t grad_address, const Chunk& chunk,
                        double (&found)[Rule::kSums + 1]) const {
    if constexpr (Rule::kProjects)
      if (has_channels(row, chunk))
        return stage1_channels<Rule, kStates, P, G>(step, row, grad_address, chunk, found, rounds);
    return stage1_channel<Rule, kStates, P, G>(step, row, grad_address, chunk, found, rounds);
  }
};

template <class Rule, bool kAllKinds>
__global__ void __launch_bounds__(kThreads, kAllKinds ? kBlocksPerProcessorOfMomentsOfAllKinds
                                                      : kBlocksPerProcessorOfSums)
    stage1_kernel(const __grid_constant__ Step step) {
  if (at<StepDecision>(step.decision)->skipped) return;
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    const uint64_t grad_address = at<uint64_t>(step.grads)[chunk.row];
    const Partial sum = visit<kAllKinds>(Stage1<Rule>{step, i, kAllKinds}, at<Row>(step.rows)[chunk.row],
                                         grad_address, chunk);
    if (accumulates(step)) store_sum(at<Partial>(step.partials)[i], sum);
  }
}

// The sums over one tensor and the number of its channels that are not scale-invariant, in all threads. A
// single channel is not tested on its own, because its sums are those of the layer.
template <class Rule>
FW_DEVICE void sum_layer(const Step& step, int64_t index, double (&found)[Rule::kSums + 1]) {
  const Row& row = at<Row>(step.rows)[index];
  const int64_t channels = row.numel / row.channel_size;
  if (Rule::kProjects && row.n_chunks > channels && Layer(step, index).channels > 1) {
    // channels longer than a chunk, which no block of stage1 has whole
    const int64_t each = row.n_chunks / channels;
    for (int64_t i = threadIdx.x; i < channels; i += kThreads) {
      double channel[Rule::kSums + 1] = {};
      combine_chunks(channel, step, row.first_chunk + i * each, each);
      channel[Rule::kSums] = judge_channel<Rule>(step, row, i, row.channel_size, channel);
      combine(found, channel);
    }
  } else {
    combine_every<4>(found, threadIdx.x, row.n_chunks, kThreads,
                     [&](double (&sums)[Rule::kSums + 1], int64_t i) {
                       combine_chunks(sums, step, row.first_chunk + i, 1);
                     });
  }
  share_block_sum(found);
}

// the same of a tensor that is spread over processes, from the sums that they have added up
template <class Rule>
FW_DEVICE void read_layer(const Step& step, int64_t index, double (&found)[Rule::kSums + 1]) {
  const Spread& spread = spread_of(step, index);
  const double* sums = sums_of_layer(step, spread);
  if (!spread.is_cut) {
    combine(found, sums);
    return;
  }
  const Row& row = at<Row>(step.rows)[index];
  const int64_t channels = row.numel / row.channel_size, channel_size = Layer(step, index).channel_size;
  for (int64_t i = threadIdx.x; i < spread.channels; i += kThreads) {
    double channel[Rule::kSums + 1] = {};
    for (int k = 0; k < Rule::kSums; ++k) channel[k] = sums[i * Rule::kSums + k];
    const int64_t here = i - spread.first_channel;
    if (here >= 0 && here < channels)
      channel[Rule::kSums] = judge_channel<Rule>(step, row, here, channel_size, channel);
    else
      channel[Rule::kSums] =
          Rule::scale_invariant(at<Hyper>(step.hypers)[row.group], channel, channel_size) ? 0.0 : 1.0;
    combine(found, channel);
  }
  share_block_sum(found);
}

// turns the sums of one tensor into its scalars and what its update is projected in
template <class Rule>
FW_DEVICE void reduce_layer(const Step& step, int64_t index) {
  const Row& row = at<Row>(step.rows)[index];
  const Hyper& h = at<Hyper>(step.hypers)[row.group];
  double found[Rule::kSums + 1] = {}, sums[Rule::kSums];
  if (step.totals)
    read_layer<Rule>(step, index, found);
  else
    sum_layer<Rule>(step, index, found);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < Rule::kSums; ++k) sums[k] = found[k];
  const Layer layer(step, index);
  const View view =
      projection_view(Rule::kProjects && row.projects, layer.channels > 1 && found[Rule::kSums] == 0.0,
                      Rule::scale_invariant(h, sums, layer.numel));
  Rule::layer_scalars(h, sums, view != kNoView, at<Scalars>(step.scalars)[index]);
  if constexpr (Rule::kProjects)
    at<LayerProjection>(step.layer_projections)[index] = {coef_in_view<Rule>(view, h, sums, sums), view, 0};
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorOfSums)
    reduce_layers_kernel(const __grid_constant__ Step step) {
  StepDecision& decision = *at<StepDecision>(step.decision);
  if (decision.skipped) return;
  for (int64_t row = blockIdx.x; row < step.n_rows; row += gridDim.x)
    if (at<uint64_t>(step.grads)[row] && at<Row>(step.rows)[row].numel > 0) reduce_layer<Rule>(step, row);
  // the block that is likely to have the shortest layer
  if (blockIdx.x == gridDim.x - 1 && accumulates(step)) finish_norms(step, decision);
}

}  // namespace
}  // namespace fw
