// The CPU step: measure, decide and update in one parallel region over the chunks of all tensors.
// Compiled once per instruction set with FW_ISA naming it. Everything but the exported table has internal
// linkage, so that the linker can never put wide code where a narrow machine would run it.
// No mathematics here: rules.h, schedules.h and reduce.h have it.
// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <cstdlib>

#include "../decide.h"
#include "blocks.h"
#include "wide.h"

namespace fw {
namespace {

// what the update is about to read besides the gradient: fetched while the norms are added
struct Ahead {
  uint64_t param, state0, state1;
};

// one chunk's share of the measure stage, fed block by block; the lanes fix the order of the sums
struct NormLanes {
  double l1[kLanes] = {}, l2_sq[kLanes] = {};
  int64_t nonfinite = 0;

  template <class C>
  FW_LEAF void add(const C* __restrict grad, int count, const Ahead& ahead) {
    C a[kLanes] = {};
    Wide<double> b[kLanes / kWide];
    for (int k = 0; k < kLanes / kWide; ++k) b[k] = load_wide(l2_sq + k * kWide);
    int whole = count - count % kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      __builtin_prefetch(at<const void>(ahead.param + i * sizeof(C)), 1);
      __builtin_prefetch(at<const void>(ahead.state0 + i * sizeof(C)), 1);
      __builtin_prefetch(at<const void>(ahead.state1 + i * sizeof(C)), 1);
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

  // a block whose magnitudes do not sum to a finite number: count what is not finite, sum in double
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

// the squares of one chunk's parameters; the lanes fix the order of the sum
struct SquareLanes {
  double squares[kLanes] = {};

  template <class C>
  FW_LEAF void add(const C* __restrict param, int count) {
    double a[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) a[lane] = squares[lane];
    const int whole = count - count % kLanes;
    for (int i = 0; i < whole; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) accumulate_l2(a[lane], param[i + lane]);
    for (int i = whole; i < count; ++i) accumulate_l2(a[i - whole], param[i]);
    for (int lane = 0; lane < kLanes; ++lane) squares[lane] = a[lane];
  }

  double sum() const {
    double total = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) total += squares[lane];
    return total;
  }
};

template <class T>
void narrow_all(const float* __restrict from, T* __restrict to, int count) {
  for (int i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// writes a widened block back; a column that was used in place needs nothing
void store(float* block, uint64_t column, int32_t dtype, int64_t offset, int count) {
  if (dtype == kBFloat16) narrow_all(block, at<BFloat16>(column) + offset, count);
  if (dtype == kFloat16) narrow_all(block, at<Float16>(column) + offset, count);
}
void store(double*, uint64_t, int32_t, int64_t, int) {}

template <class Rule, int kStates, class C>
FW_LEAF void update_block(C* __restrict param, const C* __restrict grad, C* __restrict state0,
                          C* __restrict state1, C* __restrict state2, int count,
                          const ScalarsOf<C>& scalars) {
  // a copy that no store can alias keeps the scalars in registers
  const ScalarsOf<C> s = scalars;
  for (int i = 0; i < count; ++i) {
    C state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    if constexpr (kStates > 2) state[2] = state2[i];
    C value = param[i];
    Rule::template update<kStates>(value, grad[i], state, s);
    param[i] = value;
    if constexpr (kStates > 0) state0[i] = state[0];
    if constexpr (kStates > 1) state1[i] = state[1];
    if constexpr (kStates > 2) state2[i] = state[2];
  }
}

// the first part of an update in two: the states move, and the update that they mean is what is summed
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

// the update that the states mean, found again
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

// the sum of a power of two of numbers, each of the first half with its fellow of the second
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

// what a rule sums over a part of a piece; the lanes fix the order
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

template <class C>
FW_LEAF void average_block(C* __restrict average, const C* __restrict param, int count, C weight) {
  for (int i = 0; i < count; ++i) average_update(average[i], param[i], weight);
}

// of the parameter as it is stored, so a rounded one is read back
template <class C>
void average(const Row& row, int64_t offset, int count, C weight, C* scratch) {
  if (!row.average || !(weight > C(0))) return;
  const C* param = load<C>(row.param, row.dtype, offset, count, scratch);
  average_block(at<C>(row.average) + offset, param, count, weight);
}

// what follows the update of a block: a parameter on a sphere is summed, and averaged when it is back there
template <class C>
void finish_block(const Row& row, int64_t offset, int count, C weight, SquareLanes* squares, C* scratch) {
  if (squares)
    squares->add(load<C>(row.param, row.dtype, offset, count, scratch), count);
  else
    average<C>(row, offset, count, weight, scratch);
}

void keep_squares(const Step& step, const Chunk& chunk, const SquareLanes& squares) {
  at<double>(step.squares)[&chunk - at<Chunk>(step.chunks)] = squares.sum();
}

template <class C>
FW_LEAF void rescale_block(C* __restrict param, int count, C factor) {
  for (int i = 0; i < count; ++i) param[i] = rescale(param[i], factor);
}

template <class C>
void rescale_chunk(const Row& row, const Chunk& chunk, C factor, C weight) {
  alignas(64) C scratch[kBlock];
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int64_t offset = chunk.offset + done;
    const int count = chunk.count - done < kBlock ? chunk.count - done : kBlock;
    C* param = load<C>(row.param, row.dtype, offset, count, scratch);
    rescale_block(param, count, factor);
    store(param, row.param, row.dtype, offset, count);
    average<C>(row, offset, count, weight, scratch);
  }
}

template <class C>
Partial measure_chunk(const Row& row, uint64_t grad, const Chunk& chunk) {
  NormLanes lanes;
  alignas(64) C scratch[kBlock];
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    int count = chunk.count - done < kBlock ? chunk.count - done : kBlock;
    const C* block = load<C>(grad, row.grad_dtype, chunk.offset + done, count, scratch);
    const uint64_t here = reinterpret_cast<uint64_t>(block);
    lanes.add(block, count, Ahead{here, here, here});
  }
  return lanes.sum();
}

template <class Rule, int kStates, class C>
Partial update_chunk(const Step& step, const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grads = at<uint64_t>(step.grads)[chunk.row];
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const C weight = static_cast<C>(average_weight_of(row));
  const bool accumulate = accumulates(step) && grads;
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock];
  SquareLanes squares;
  SquareLanes* const summed = sphere_of(step, row.group) ? &squares : nullptr;
  NormLanes lanes;
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    int64_t offset = chunk.offset + done;
    int count = chunk.count - done < kBlock ? chunk.count - done : kBlock;
    C* param = load<C>(row.param, row.dtype, offset, count, param_scratch);
    if (grads) {
      const C* grad = load<C>(grads, row.grad_dtype, offset, count, grad_scratch);
      if (accumulate) {
        const uint64_t here = reinterpret_cast<uint64_t>(param), skip = offset * sizeof(C);
        // a stream that the rule does not have must not be fetched from nowhere
        lanes.add(
            grad, count,
            Ahead{here, kStates > 0 ? row.state0 + skip : here, kStates > 1 ? row.state1 + skip : here});
      }
      update_block<Rule, kStates, C>(param, grad, at<C>(row.state0) + offset, at<C>(row.state1) + offset,
                                     at<C>(row.state2) + offset, count, scalars);
      store(param, row.param, row.dtype, offset, count);
    }
    finish_block<C>(row, offset, count, weight, summed, param_scratch);
  }
  if (summed) keep_squares(step, chunk, squares);
  return lanes.sum();
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

// Memory of one thread that stays from step to step. No container of the standard library: its functions
// would be compiled for wide machines here, and the linker could take them for all.
struct Room {
  void* data = nullptr;
  size_t bytes = 0;

  void* of(size_t wanted) {
    if (bytes < wanted) {
      std::free(data);
      bytes = (wanted + 63) / 64 * 64;
      data = std::aligned_alloc(64, bytes);
    }
    return data;
  }
  ~Room() { std::free(data); }
};
thread_local Room room;

// where the updates of a row of one chunk stay, so that they need not be found again
template <class C>
C* room_for_updates(const Row& row, const Chunk& chunk) {
  return chunk.count < row.numel ? nullptr : static_cast<C*>(room.of(chunk.count * sizeof(C)));
}

template <class Rule, int kStates, class C>
Partial stage1_chunk(const Step& step, const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grads = at<uint64_t>(step.grads)[chunk.row];
  if (!grads) return Partial{};
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const bool accumulate = accumulates(step);
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock], update_scratch[kBlock];
  C* const kept = room_for_updates<C>(row, chunk);
  const Pieces pieces(row, chunk);
  double* out = at<double>(step.sums) + pieces.first * Rule::kSums;
  for (int64_t i = 0; i < int64_t(pieces.count) * Rule::kSums; ++i) out[i] = 0.0;
  int32_t next = 0;
  NormLanes lanes;
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    int64_t offset = chunk.offset + done;
    int count = chunk.count - done < kBlock ? chunk.count - done : kBlock;
    const C* param = load<C>(row.param, row.dtype, offset, count, param_scratch);
    const C* grad = load<C>(grads, row.grad_dtype, offset, count, grad_scratch);
    if (accumulate) {
      const uint64_t here = reinterpret_cast<uint64_t>(param), skip = offset * sizeof(C);
      lanes.add(grad, count,
                Ahead{here, kStates > 0 ? row.state0 + skip : here, kStates > 1 ? row.state1 + skip : here});
    }
    C* update = kept ? kept + done : update_scratch;
    stage1_block<Rule, kStates, C>(param, grad, at<C>(row.state0) + offset, at<C>(row.state1) + offset,
                                   update, count, scalars);
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
  const Scalars& s = at<Scalars>(step.scalars)[chunk.row];
  const uint64_t grads = at<uint64_t>(step.grads)[chunk.row];
  const bool needs_grad = Rule::needs_grad(at<Hyper>(step.hypers)[row.group], row.n_states);
  const ScalarsOf<C> scalars(s);
  const C weight = static_cast<C>(average_weight_of(row));
  const Pieces pieces(row, chunk);
  const double* projection_coefs = at<double>(step.projection_coefs) + pieces.first;
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock] = {}, update_scratch[kBlock],
                                       projection_coef[kBlock] = {};
  const C* const kept = room_for_updates<C>(row, chunk);
  SquareLanes squares;
  SquareLanes* const summed = sphere_of(step, row.group) ? &squares : nullptr;
  int32_t next = 0;
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    int64_t offset = chunk.offset + done;
    int count = chunk.count - done < kBlock ? chunk.count - done : kBlock;
    C* param = load<C>(row.param, row.dtype, offset, count, param_scratch);
    if (grads) {
      if (!kept) {
        const C* grad = grad_scratch;
        if (needs_grad) grad = load<C>(grads, row.grad_dtype, offset, count, grad_scratch);
        direction_block<Rule, kStates, C>(param, grad, at<C>(row.state0) + offset, at<C>(row.state1) + offset,
                                          update_scratch, count, scalars);
      }
      if constexpr (Rule::kProjects) {
        visit_parts(pieces, next, done, done + count, [&](int32_t piece, int32_t begin, int32_t size) {
          const C value = static_cast<C>(projection_coefs[piece]);
          for (int32_t i = 0; i < size; ++i) projection_coef[begin - done + i] = value;
        });
      }
      stage2_block<Rule, C>(param, kept ? kept + done : update_scratch, projection_coef, count, scalars);
      store(param, row.param, row.dtype, offset, count);
    }
    finish_block<C>(row, offset, count, weight, summed, param_scratch);
  }
  if (summed) keep_squares(step, chunk, squares);
}

// calls visit with the type of the arithmetic and the number of states of a row
template <class Rule, int kStates, class Visit>
Partial with_states(const Row& row, const Visit& visit) {
  if constexpr (kStates < Rule::kMaxStates)
    if (row.n_states > kStates) return with_states<Rule, kStates + 1>(row, visit);
  if (row.dtype == kFloat64) return visit.template run<kStates, double>();
  return visit.template run<kStates, float>();
}

template <class Rule>
struct Update {
  const Step& step;
  const Chunk& chunk;

  template <int kStates, class C>
  Partial run() const {
    if constexpr (Rule::kSums == 0) {
      return update_chunk<Rule, kStates, C>(step, chunk);
    } else {
      stage2_chunk<Rule, kStates, C>(step, chunk);
      return Partial{};
    }
  }
};

template <class Rule>
struct Propose {
  const Step& step;
  const Chunk& chunk;

  template <int kStates, class C>
  Partial run() const {
    return stage1_chunk<Rule, kStates, C>(step, chunk);
  }
};

template <class Rule>
StepDecision decide_step(const Step& step, const Partial& total) {
  const uint64_t* grads = at<uint64_t>(step.grads);
  StepDecision decision = decide(step, total);
  for (int64_t group = 0; group < step.n_groups; ++group) set_rates(step, decision, group);
  int64_t last = -1;
  for (int64_t row = 0; row < step.n_rows && !decision.skipped; ++row) {
    const Row& r = at<Row>(step.rows)[row];
    count_average(step, decision, r);
    if (!grads[row]) continue;
    count_update(r);
    if (last >= 0 && same_scalars(step, row, last)) {
      at<Scalars>(step.scalars)[row] = at<Scalars>(step.scalars)[last];
    } else {
      set_scalars<Rule>(step, decision, row);
    }
    if (last < 0) decision.rect = at<Scalars>(step.scalars)[row].rect;
    last = row;
  }
  record(step, decision);
  return decision;
}

// what the sums over a row and its channels say; the channels are looked at before the row as a whole
template <class Rule>
void reduce_layer(const Step& step, int64_t index) {
  const Row& row = at<Row>(step.rows)[index];
  const Hyper& h = at<Hyper>(step.hypers)[row.group];
  const int64_t channels = row.numel / row.channel_size;
  const bool projects = Rule::kProjects && row.projects;
  double layer[Rule::kSums] = {};
  bool by_channel = projects;
  for (int64_t i = 0; i < channels; ++i) {
    double channel[Rule::kSums] = {};
    combine_channel(channel, step, row, i);
    by_channel = by_channel && Rule::scale_invariant(h, channel, row.channel_size);
    combine(layer, channel);
  }
  const bool by_layer = projects && !by_channel && Rule::scale_invariant(h, layer, row.numel);
  Rule::layer_scalars(h, layer, by_channel || by_layer, at<Scalars>(step.scalars)[index]);
  for (int64_t i = 0; i < channels && Rule::kProjects; ++i) {
    double channel[Rule::kSums] = {};
    if (by_channel) combine_channel(channel, step, row, i);
    set_projection_coef(
        step, row, i,
        by_channel ? Rule::projection_coef(h, channel) : (by_layer ? Rule::projection_coef(h, layer) : 0.0));
  }
}

// whether every row is done with in its only chunk
bool rows_are_whole(const Step& step) {
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    if (chunk.count < at<Row>(step.rows)[chunk.row].numel) return false;
  }
  return true;
}

// The first part of an update in two. Rows of one chunk are done with at once, while they are in the cache.
template <class Rule>
void stage1(const Step& step, bool whole) {
  Partial* partials = at<Partial>(step.partials);
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const Partial part = with_states<Rule, Rule::kMinStates>(row, Propose<Rule>{step, chunk});
    if (!step.measure) partials[i] = part;
    if (chunk.count < row.numel) continue;
    if (at<uint64_t>(step.grads)[chunk.row]) reduce_layer<Rule>(step, chunk.row);
    with_states<Rule, Rule::kMinStates>(row, Update<Rule>{step, chunk});
  }
  // each loop is one more wait for all threads
  if (whole) return;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const bool first_of_many = chunk.offset == 0 && chunk.count < at<Row>(step.rows)[chunk.row].numel;
    if (first_of_many && at<uint64_t>(step.grads)[chunk.row]) reduce_layer<Rule>(step, chunk.row);
  }
}

// The groups on a sphere once more, when all their squares are known.
void rescale_all(const Step& step) {
#pragma omp single
  for (int64_t group = 0; group < step.n_groups; ++group)
    if (Sphere* sphere = sphere_of(step, group)) set_factor(*sphere, combine_squares(step, *sphere));
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const Sphere* sphere = sphere_of(step, row.group);
    if (!sphere) continue;
    const double factor = sphere->factor, weight = average_weight_of(row);
    if (row.dtype == kFloat64)
      rescale_chunk<double>(row, chunk, factor, weight);
    else
      rescale_chunk<float>(row, chunk, static_cast<float>(factor), static_cast<float>(weight));
  }
}

template <class Rule>
void run(const Step& step, int threads) {
  const Row* rows = at<Row>(step.rows);
  const Chunk* chunks = at<Chunk>(step.chunks);
  const uint64_t* grads = at<uint64_t>(step.grads);
  Partial* partials = at<Partial>(step.partials);
  StepDecision decision;
  const bool whole = Rule::kSums > 0 && rows_are_whole(step);
#pragma omp parallel num_threads(threads)
  {
    if (step.measure) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < step.n_chunks; ++i) {
        const Chunk& chunk = chunks[i];
        const Row& row = rows[chunk.row];
        if (!grads[chunk.row])
          partials[i] = Partial{};
        else if (row.dtype == kFloat64)
          partials[i] = measure_chunk<double>(row, grads[chunk.row], chunk);
        else
          partials[i] = measure_chunk<float>(row, grads[chunk.row], chunk);
      }
    }
#pragma omp single
    decision = decide_step<Rule>(step, step.measure ? combine_all(partials, step.n_chunks) : Partial{});
    if constexpr (Rule::kSums > 0)
      if (!decision.skipped) stage1<Rule>(step, whole);
    if (!decision.skipped && !whole) {
      // last chunk first: the gradients measured last are still in the cache
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = step.n_chunks - 1; i >= 0; --i) {
        const Chunk& chunk = chunks[i];
        const Row& row = rows[chunk.row];
        if (Rule::kSums > 0 && chunk.count == row.numel) continue;
        const Partial part = with_states<Rule, Rule::kMinStates>(row, Update<Rule>{step, chunk});
        if (Rule::kSums == 0 && !step.measure) partials[i] = part;
      }
    }
    if (step.spheres && !decision.skipped) rescale_all(step);
  }
  if (accumulates(step) && !decision.skipped)
    record_norms(step, decision, combine_all(partials, step.n_chunks));
}

#define FW_ENTRY(Rule) run<Rule>,
const StepFunction kSteps[] = {FW_RULES(FW_ENTRY)};
#undef FW_ENTRY

#define FW_IS_baseline() true
#define FW_IS_avx2() \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
#define FW_IS_avx512()                                                         \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma") &&       \
   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && \
   __builtin_cpu_supports("avx512vl"))
#define FW_TEXT_(a) #a
#define FW_TEXT(a) FW_TEXT_(a)

bool supported() { return FW_JOIN(FW_IS_, FW_ISA)(); }

}  // namespace

extern const Kernels FW_JOIN(kernels_, FW_ISA);
const Kernels FW_JOIN(kernels_, FW_ISA) = {FW_TEXT(FW_ISA), supported, kSteps};

}  // namespace fw
