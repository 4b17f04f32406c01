// The stages on the CPU of a rule that needs sums over layers: stage1 updates the moments and sums over
// pieces of channels, reduce turns the sums of a layer into its scalars and projection coefficients, stage2
// updates the parameter. Tensors of one chunk pass through all three at once, while they are in the cache.
// No mathematics here: rules.h and reduce.h have it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdlib>

#include "../decide.h"
#include "blocks.h"
#include "measure.h"
#include "sphere.h"
#include "wide.h"

namespace fw {
namespace {

// updates the moments, and writes the direction of the update for the sums
template <class Rule, int kStates, class C>
FW_LEAF void stage1_block(const C* __restrict param, const C* __restrict grad, C* __restrict state0,
                          C* __restrict state1, C* __restrict update, int count,
                          const ScalarsOf<C>& scalars) {
  const ScalarsOf<C> s = scalars;
  for (int i = 0; i < count; ++i) {
    C state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    Rule::template update_moments<kStates>(param[i], grad[i], state, s);
    update[i] = Rule::template direction<kStates>(param[i], grad[i], state, s);
    if constexpr (kStates > 0) state0[i] = state[0];
    if constexpr (kStates > 1) state1[i] = state[1];
  }
}

// the direction of the update once more, from the updated moments
template <class Rule, int kStates, class C>
FW_LEAF void direction_block(const C* __restrict param, const C* __restrict grad, const C* __restrict state0,
                             const C* __restrict state1, C* __restrict update, int count,
                             const ScalarsOf<C>& scalars) {
  const ScalarsOf<C> s = scalars;
  for (int i = 0; i < count; ++i) {
    C state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    update[i] = Rule::template direction<kStates>(param[i], grad[i], state, s);
  }
}

template <class Rule, class C>
FW_LEAF void stage2_block(C* __restrict param, const C* __restrict update,
                          const C* __restrict projection_coef, int count, const ScalarsOf<C>& scalars) {
  const ScalarsOf<C> s = scalars;
  for (int i = 0; i < count; ++i) {
    C value = param[i];
    Rule::apply(value, update[i], projection_coef[i], s);
    param[i] = value;
  }
}

// the sum of a power of two of numbers: each of the first half is added to its counterpart in the second
template <class S, int N>
FW_HOST_DEVICE S sum_by_halves(const S (&numbers)[N]) {
  if constexpr (N == 1) {
    return numbers[0];
  } else {
    S halves[N / 2];
    for (int i = 0; i < N / 2; ++i) halves[i] = numbers[i] + numbers[i + N / 2];
    return sum_by_halves(halves);
  }
}

// adds to the sums of a rule over a part of a piece; the lanes fix the order of the sums
template <class Rule, class C>
FW_LEAF void sum_part(double (&total)[Rule::kSums], const C* __restrict param, const C* __restrict grad,
                      const C* __restrict update, int count, const ScalarsOf<C>& scalars) {
  // as many as registers hold, whatever their width
  constexpr int kSumLanes = 32 / Rule::kSums;
  const ScalarsOf<C> s = scalars;
  // lanes of so few elements cost more than they save
  if (count < kSumLanes) {
    for (int i = 0; i < count; ++i) Rule::accumulate(total, param[i], grad[i], update[i], s);
    return;
  }
  constexpr int kWides = kSumLanes / kWide;
  Wide<double> wide[Rule::kSums][kWides] = {};
  const int whole = count - count % kSumLanes;
  for (int i = 0; i < whole; i += kSumLanes)
#pragma GCC unroll 16
    for (int k = 0; k < kWides; ++k) {
      const int j = i + k * kWide;
      Wide<double> sums[Rule::kSums];
      for (int n = 0; n < Rule::kSums; ++n) sums[n] = wide[n][k];
      Rule::accumulate(sums, load_wide(param + j), load_wide(grad + j), load_wide(update + j), s);
      for (int n = 0; n < Rule::kSums; ++n) wide[n][k] = sums[n];
    }
  for (int i = whole; i < count; ++i) Rule::accumulate(total, param[i], grad[i], update[i], s);
  for (int k = 0; k < Rule::kSums; ++k) {
    double lanes[kWide];
    store_wide(sum_by_halves(wide[k]), lanes);
    total[k] += sum_by_halves(lanes);
  }
}

// calls visit(piece, begin, count) for the parts of a chunk's pieces that lie between two of its elements
template <class Visit>
void visit_parts(const Pieces& pieces, int32_t& next, int32_t begin, int32_t end, const Visit& visit) {
  while (begin < end) {
    const Piece piece = pieces[next];
    const int32_t last = piece.begin + piece.count, stop = last < end ? last : end;
    visit(next, begin, stop - begin);
    if (stop == last) ++next;
    begin = stop;
  }
}

// Scratch memory of one thread, kept from step to step. Not a container of the standard library, whose
// functions would be compiled for a wide instruction set here, and the linker could use them everywhere.
struct Arena {
  void* data = nullptr;
  size_t bytes = 0;

  void* reserve(size_t wanted) {
    if (bytes < wanted) {
      std::free(data);
      bytes = (wanted + 63) / 64 * 64;
      data = std::aligned_alloc(64, bytes);
    }
    return data;
  }
  ~Arena() { std::free(data); }
};
thread_local Arena arena;

// whether a tensor is one chunk and in this process alone, so that a thread takes it through all stages at
// once
bool is_one_chunk(const Step& step, const Chunk& chunk) {
  return !step.totals && chunk.count == at<Row>(step.rows)[chunk.row].numel;
}

// where a tensor of one chunk keeps its update between the stages; null for a longer one, which computes it
// twice
template <class C>
C* kept_update(const Step& step, const Chunk& chunk) {
  return is_one_chunk(step, chunk) ? static_cast<C*>(arena.reserve(chunk.count * sizeof(C))) : nullptr;
}

template <class Rule, int kStates, class C>
Partial stage1_chunk(const Step& step, const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grad_address = at<uint64_t>(step.grads)[chunk.row];
  if (!grad_address) return Partial{};
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const bool accumulate = accumulates(step);
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock], update_scratch[kBlock];
  StateBlocks<kStates, C> states;
  const int64_t t = at<StepDecision>(step.decision)->t;
  C* const kept = kept_update<C>(step, chunk);
  const Pieces pieces(row, chunk);
  double* out = at<double>(step.sums) + pieces.first * Rule::kSums;
  for (int64_t i = 0; i < int64_t(pieces.count) * Rule::kSums; ++i) out[i] = 0.0;
  int32_t next = 0;
  NormLanes lanes;
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int64_t offset = chunk.offset + done;
    const int count = block_size(chunk, done);
    const C* param = load_param<C>(row, offset, count, param_scratch);
    const C* grad = load<C>(grad_address, row.grad_dtype, offset, count, grad_scratch);
    if (accumulate) lanes.add(grad, count);
    C* update = kept ? kept + done : update_scratch;
    states.load(row, offset, count);
    stage1_block<Rule, kStates, C>(param, grad, states.state[0], states.state[1], update, count, scalars);
    if (has_rounded_states(row)) {
      states.store(row, t, offset, count);
      // the direction that stage2 finds, from the moments as they are stored
      states.load(row, offset, count);
      direction_block<Rule, kStates, C>(param, grad, states.state[0], states.state[1], update, count,
                                        scalars);
    }
    visit_parts(pieces, next, done, done + count, [&](int32_t piece, int32_t begin, int32_t size) {
      auto& sums = *reinterpret_cast<double (*)[Rule::kSums]>(out + int64_t(piece) * Rule::kSums);
      const int32_t k = begin - done;
      sum_part<Rule, C>(sums, param + k, grad + k, update + k, size, scalars);
    });
  }
  return lanes.sum();
}

template <class Rule, int kStates, class C>
void stage2_chunk(const Step& step, const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grad_address = at<uint64_t>(step.grads)[chunk.row];
  const bool needs_grad = Rule::needs_grad(at<Hyper>(step.hypers)[row.group], row.n_states);
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const RandomKey key(row, at<StepDecision>(step.decision)->t, kUpdatePass);
  const C weight = static_cast<C>(average_weight_of(row));
  const Pieces pieces(row, chunk);
  const double* projection_coefs = at<double>(step.projection_coefs) + pieces.first;
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock] = {}, update_scratch[kBlock],
                                       projection_coef[kBlock] = {};
  StateBlocks<kStates, C> states;
  const C* const kept = kept_update<C>(step, chunk);
  SumSqLanes lanes;
  SumSqLanes* const sum_sq = sphere_of(step, row.group) ? &lanes : nullptr;
  int32_t next = 0;
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int64_t offset = chunk.offset + done;
    const int count = block_size(chunk, done);
    C* param = load_param<C>(row, offset, count, param_scratch);
    if (grad_address) {
      if (!kept) {
        const C* grad = grad_scratch;
        if (needs_grad) grad = load<C>(grad_address, row.grad_dtype, offset, count, grad_scratch);
        states.load(row, offset, count);
        direction_block<Rule, kStates, C>(param, grad, states.state[0], states.state[1], update_scratch,
                                          count, scalars);
      }
      if constexpr (Rule::kProjects) {
        visit_parts(pieces, next, done, done + count, [&](int32_t piece, int32_t begin, int32_t size) {
          const C value = static_cast<C>(projection_coefs[piece]);
          for (int32_t i = 0; i < size; ++i) projection_coef[begin - done + i] = value;
        });
      }
      stage2_block<Rule, C>(param, kept ? kept + done : update_scratch, projection_coef, count, scalars);
      store_param(param, row, key, offset, count);
    }
    finish_block<C>(row, offset, count, weight, sum_sq, param_scratch);
  }
  if (sum_sq) store_sum_sq(step, chunk, *sum_sq);
}

template <class Rule>
struct Stage1 {
  const Step& step;
  const Chunk& chunk;

  template <int kStates, class C>
  Partial run() const {
    return stage1_chunk<Rule, kStates, C>(step, chunk);
  }
};

template <class Rule>
struct Stage2 {
  const Step& step;
  const Chunk& chunk;

  template <int kStates, class C>
  Partial run() const {
    stage2_chunk<Rule, kStates, C>(step, chunk);
    return Partial{};
  }
};

// the sums over a layer, and the number of its channels that are not scale-invariant
template <int N>
struct LayerSums {
  double layer[N] = {}, failed = 0.0;
};

// the sums over channels of a layer, the i-th of which are read(i)
template <class Rule, class Read>
LayerSums<Rule::kSums> sum_channels(const Step& step, int64_t index, int64_t channels, const Read& read) {
  const Hyper& h = at<Hyper>(step.hypers)[at<Row>(step.rows)[index].group];
  const int64_t channel_size = Layer(step, index).channel_size;
  LayerSums<Rule::kSums> sums;
  for (int64_t i = 0; i < channels; ++i) {
    double channel[Rule::kSums] = {};
    read(i, channel);
    if (!Rule::scale_invariant(h, channel, channel_size)) sums.failed += 1.0;
    combine(sums.layer, channel);
  }
  return sums;
}

// the sums over those channels of a tensor that are in this process
template <class Rule>
LayerSums<Rule::kSums> sum_layer(const Step& step, int64_t index) {
  const Row& row = at<Row>(step.rows)[index];
  return sum_channels<Rule>(step, index, row.numel / row.channel_size,
                            [&](int64_t i, auto& channel) { combine_channel(channel, step, row, i); });
}

// the sums over a tensor in all processes
template <class Rule>
LayerSums<Rule::kSums> read_layer(const Step& step, int64_t index) {
  const Spread& spread = spread_of(step, index);
  const double* sums = sums_of_layer(step, spread);
  if (spread.is_cut)
    return sum_channels<Rule>(step, index, spread.channels,
                              [&](int64_t i, auto& channel) { combine(channel, sums + i * Rule::kSums); });
  LayerSums<Rule::kSums> found;
  combine(found.layer, sums);
  found.failed = sums[Rule::kSums];
  return found;
}

// the sums over the tensors of this process, which the processes add up
template <class Rule>
void fold_layers(const Step& step) {
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t index = 0; index < step.n_rows; ++index) {
    const Row& row = at<Row>(step.rows)[index];
    const Spread& spread = spread_of(step, index);
    const bool is_here = at<uint64_t>(step.grads)[index] && row.numel > 0;
    double* sums = sums_of_layer(step, spread);
    if (!spread.is_cut) {
      const LayerSums<Rule::kSums> found = is_here ? sum_layer<Rule>(step, index) : LayerSums<Rule::kSums>{};
      for (int k = 0; k < Rule::kSums; ++k) sums[k] = found.layer[k];
      sums[Rule::kSums] = found.failed;
      continue;
    }
    for (int64_t i = 0; i < spread.channels * Rule::kSums; ++i) sums[i] = 0.0;
    for (int64_t i = 0; is_here && i < row.numel / row.channel_size; ++i) {
      double channel[Rule::kSums] = {};
      combine_channel(channel, step, row, i);
      for (int k = 0; k < Rule::kSums; ++k) sums[(spread.first_channel + i) * Rule::kSums + k] = channel[k];
    }
  }
}

// turns the sums of one tensor into its scalars and projection coefficients
template <class Rule>
void reduce_layer(const Step& step, int64_t index) {
  const Row& row = at<Row>(step.rows)[index];
  const Hyper& h = at<Hyper>(step.hypers)[row.group];
  const LayerSums<Rule::kSums> sums =
      step.totals ? read_layer<Rule>(step, index) : sum_layer<Rule>(step, index);
  const View view = projection_view(Rule::kProjects && row.projects, sums.failed == 0.0,
                                    Rule::scale_invariant(h, sums.layer, Layer(step, index).numel));
  Rule::layer_scalars(h, sums.layer, view != kNoView, at<Scalars>(step.scalars)[index]);
  for (int64_t i = 0; i < row.numel / row.channel_size && Rule::kProjects; ++i) {
    double channel[Rule::kSums] = {};
    if (view == kChannelView && is_cut(step, index))
      combine(channel, sums_of_layer(step, spread_of(step, index)) +
                           (spread_of(step, index).first_channel + i) * Rule::kSums);
    else if (view == kChannelView)
      combine_channel(channel, step, row, i);
    set_projection_coef(step, row, i, coef_in_view<Rule>(view, h, channel, sums.layer));
  }
}

bool all_one_chunk(const Step& step) {
  for (int64_t i = 0; i < step.n_chunks; ++i)
    if (!is_one_chunk(step, at<Chunk>(step.chunks)[i])) return false;
  return true;
}

template <class Rule>
void stage1(const Step& step) {
  visit_chunks<Runs::kForwards>(step.n_chunks, [&](int64_t i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const Partial part = with_states<Rule, Rule::kMinStates>(row, Stage1<Rule>{step, chunk});
    if (!step.measure) at<Partial>(step.partials)[i] = part;
    if (!is_one_chunk(step, chunk)) return;
    if (at<uint64_t>(step.grads)[chunk.row]) reduce_layer<Rule>(step, chunk.row);
    with_states<Rule, Rule::kMinStates>(row, Stage2<Rule>{step, chunk});
  });
}

// for tensors of more than one chunk, once each
template <class Rule>
void reduce_layers(const Step& step) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const bool first_of_many = chunk.offset == 0 && !is_one_chunk(step, chunk);
    if (first_of_many && at<uint64_t>(step.grads)[chunk.row]) reduce_layer<Rule>(step, chunk.row);
  }
}

template <class Rule>
void stage2(const Step& step) {
  // last run first: what the first stage took last is still in the cache
  visit_chunks<Runs::kBackwards>(step.n_chunks, [&](int64_t i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    if (is_one_chunk(step, chunk)) return;
    with_states<Rule, Rule::kMinStates>(at<Row>(step.rows)[chunk.row], Stage2<Rule>{step, chunk});
  });
}

// all stages; the loops over longer tensors are left out where there are none, because each needs a barrier
template <class Rule>
void update_layers(const Step& step, int stages, bool one_chunk_each) {
  if (stages & kUpdateStage) {
    stage1<Rule>(step);
    if (one_chunk_each) return;
#pragma omp barrier
    if (step.totals) fold_layers<Rule>(step);
  }
  if (!(stages & kLayerStage)) return;
  reduce_layers<Rule>(step);
  stage2<Rule>(step);
}

}  // namespace
}  // namespace fw
