// The CUDA step in two launches, or three when the norms must be known beforehand: measure, decide, update.
// A rule that needs sums over layers takes two more between decide and update: stage1 and reduce. Groups on
// a sphere take one at the end: rescale.
// Compiled once per rule with FW_RULE naming it. Sums are taken in an order that the table alone fixes, so
// that any grid gives the same bits. No mathematics here: rules.h, schedules.h, reduce.h and decide.h have
// it. SPDX-License-Identifier: Apache-2.0
#include <mutex>
#include <vector>

#include "../decide.h"
#include "device.h"
#include "launch.h"

namespace fw {
namespace {

// Five blocks of 128 threads leave each thread 96 registers, which hold the vectors of eight 16-bit elements
// with two states. The 64 bytes and more that each of the 640 threads asks for at once keep the memory busy,
// and a small tensor occupies a fifth of the processor only.
constexpr int kBlocksPerProcessor = 5;
// float64 needs more registers for as many bytes
constexpr int kBlocksPerProcessorOfDoubles = 4;
// sums in double beside the states need more registers too
constexpr int kBlocksPerProcessorOfSums = 4;
// the arithmetic of this one block is in double and takes up to 80 registers
constexpr int kDecideThreads = 512;

// addresses of gradients that travel with the first launch of a step; none when the column has them
template <int kSize>
struct GradPointers {
  int64_t count;
  uint64_t grads[kSize];
};
constexpr int kSmallCarry = 480;
// beyond 4 KiB arguments cost more to launch; this is the most that they may be
static_assert(sizeof(Step) + sizeof(GradPointers<kSmallCarry>) <= 4096, "small arguments");
static_assert(sizeof(Step) + sizeof(GradPointers<kMaxInlinePointers>) <= 32764, "arguments of a kernel");

template <int kSize>
FW_DEVICE uint64_t grad_of(const Step& step, const GradPointers<kSize>& pointers, int64_t row) {
  return pointers.count ? pointers.grads[row] : at<uint64_t>(step.grads)[row];
}

// for the launches after this one; nobody reads the column while it is written
template <int kSize>
FW_DEVICE void keep(const Step& step, const GradPointers<kSize>& pointers) {
  int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t row = first; row < pointers.count; row += int64_t(gridDim.x) * blockDim.x)
    at<uint64_t>(step.grads)[row] = pointers.grads[row];
}

// one thread's share of a chunk
struct NormSum {
  double l1 = 0.0, l2_sq = 0.0;
  int32_t nonfinite = 0;

  template <int N, class C>
  FW_DEVICE void add(const C (&grad)[N]) {
    C sum = 0;
    for (int i = 0; i < N; ++i) accumulate_l1(sum, grad[i]);
    for (int i = 0; i < N; ++i) accumulate_l2(l2_sq, grad[i]);
    if (!is_nonfinite(sum)) {
      l1 += static_cast<double>(sum);
      return;
    }
    // something is not finite, or the sum overflowed
    for (int i = 0; i < N; ++i) {
      nonfinite += is_nonfinite(grad[i]);
      accumulate_l1(l1, static_cast<double>(grad[i]));
    }
  }
};

// the sum over the first kThreads threads of a block, in thread 0
FW_DEVICE Partial block_sum(const Partial& part) {
  __shared__ Partial of_warp[kDecideThreads / kWarp];
  Partial total = part;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Partial other;
    other.l1 = __shfl_down_sync(~0u, total.l1, distance);
    other.l2_sq = __shfl_down_sync(~0u, total.l2_sq, distance);
    other.nonfinite = __shfl_down_sync(~0u, total.nonfinite, distance);
    combine(total, other);
  }
  // the sums of the chunk before may still be read
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = total;
  __syncthreads();
  return threadIdx.x == 0 ? combine_all(of_warp, kThreads / kWarp) : total;
}

// the sum over all chunks, in thread 0
FW_DEVICE Partial sum_chunks(const Step& step) {
  const Partial* partials = at<Partial>(step.partials);
  Partial total = {};
  if (threadIdx.x < kThreads) {
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < step.n_chunks; i += kThreads) {
      // other blocks wrote them, so the cache of this processor must not be asked
      Partial part;
      part.l1 = __ldcg(&partials[i].l1);
      part.l2_sq = __ldcg(&partials[i].l2_sq);
      part.nonfinite = __ldcg(&partials[i].nonfinite);
      combine(total, part);
    }
  }
  return block_sum(total);
}

FW_DEVICE void keep_chunk_sum(const Step& step, int64_t chunk, const NormSum& sum) {
  Partial total = block_sum(Partial{sum.l1, sum.l2_sq, sum.nonfinite});
  if (threadIdx.x == 0) at<Partial>(step.partials)[chunk] = total;
}

template <class T>
FW_DEVICE T* column(uint64_t address, int64_t offset) {
  return address ? at<T>(address) + offset : nullptr;
}

// the columns of one row from the start of a chunk on; null where the row has none
template <class P, class G>
struct Streams {
  using C = typename Arithmetic<P>::type;
  P* param;
  const G* grad;
  C *state0, *state1, *state2, *average;
  int32_t count;
  bool aligned;

  FW_DEVICE Streams(const Row& row, uint64_t grads, const Chunk& chunk)
      : param(column<P>(row.param, chunk.offset)),
        grad(column<const G>(grads, chunk.offset)),
        state0(column<C>(row.state0, chunk.offset)),
        state1(column<C>(row.state1, chunk.offset)),
        state2(column<C>(row.state2, chunk.offset)),
        average(column<C>(row.average, chunk.offset)),
        count(chunk.count) {
    // chunks begin at multiples of 16 bytes of their row, but for those of channels of odd lengths
    uint64_t addresses = row.param | grads | row.state0 | row.state1 | row.state2 | row.average;
    aligned = addresses % kVectorBytes == 0 && chunk.offset % kPack<P> == 0;
  }

  // whether a pack may be taken as vectors; else it is taken one by one, up to the end of the chunk
  FW_DEVICE bool whole(int32_t i) const { return aligned && i + kPack<P> <= count; }
  FW_DEVICE int32_t end(int32_t i) const { return i + kPack<P> < count ? i + kPack<P> : count; }
};

// a pack enters the sums in the runs that a thread updates at a time
template <class C, int N, class G>
FW_DEVICE void add_pack(NormSum& sum, const G (&raw)[N]) {
  static_assert(N % kPack<C> == 0, "whole runs");
  for (int i = 0; i < N; i += kPack<C>) {
    C grad[kPack<C>];
    widen_all(raw + i, grad);
    sum.add(grad);
  }
}

// a pack that is not whole enters them as if zeros followed it, so that alignment changes no bit
template <class P, class G>
FW_DEVICE void add_odd(NormSum& sum, const Streams<P, G>& s, int32_t begin) {
  G grad[kPack<P>] = {};
  for (int i = 0; i < kPack<P>; ++i)
    if (begin + i < s.count) grad[i] = *global(s.grad + begin + i);
  add_pack<typename Streams<P, G>::C>(sum, grad);
}

template <class P, class G>
FW_DEVICE NormSum measure_chunk(const Row& row, uint64_t grads, const Chunk& chunk) {
  const Streams<P, G> s(row, grads, chunk);
  NormSum sum;
#pragma unroll 2
  for (int32_t i = threadIdx.x * kPack<P>; i < s.count; i += kThreads * kPack<P>) {
    if (s.whole(i)) {
      G grad[kPack<P>];
      load(s.grad + i, grad);
      add_pack<typename Streams<P, G>::C>(sum, grad);
    } else {
      add_odd(sum, s, i);
    }
  }
  return sum;
}

// one thread's share of the squares of the parameters in a chunk, as they are stored
struct SquareSum {
  double squares = 0.0;
  bool wanted;

  template <class P, int N>
  FW_DEVICE void add(const P (&param)[N]) {
    if (!wanted) return;
    using C = typename Arithmetic<P>::type;
    for (int i = 0; i < N; ++i) accumulate_l2(squares, static_cast<C>(widen(param[i])));
  }
};

template <int N, class P, class C>
FW_DEVICE void average_part(C* column, const P* param, C weight) {
  C average[N];
  load(column, average);
  for (int k = 0; k < N; ++k) average_update(average[k], static_cast<C>(widen(param[k])), weight);
  store(average, column);
}

// elements from i on; all loads come before the first result is needed
template <class Rule, int kStates, int N, class P, class G, class C>
FW_DEVICE void update_part(const Streams<P, G>& s, int32_t i, const ScalarsOf<C>& scalars, P* param,
                           const G* raw_grad, bool accumulate, NormSum& sum) {
  C state0[N], state1[N], state2[N], grad[N];
  if constexpr (kStates > 0) load(s.state0 + i, state0);
  if constexpr (kStates > 1) load(s.state1 + i, state1);
  if constexpr (kStates > 2) load(s.state2 + i, state2);
  widen_all(raw_grad, grad);
  if constexpr (N > 1)
    if (accumulate) add_pack<C>(sum, grad);
  for (int k = 0; k < N; ++k) {
    C value = static_cast<C>(widen(param[k])), state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = state0[k];
    if constexpr (kStates > 1) state[1] = state1[k];
    if constexpr (kStates > 2) state[2] = state2[k];
    Rule::template update<kStates>(value, grad[k], state, scalars);
    narrow(value, param[k]);
    if constexpr (kStates > 0) state0[k] = state[0];
    if constexpr (kStates > 1) state1[k] = state[1];
    if constexpr (kStates > 2) state2[k] = state[2];
  }
  if constexpr (kStates > 0) store(state0, s.state0 + i);
  if constexpr (kStates > 1) store(state1, s.state1 + i);
  if constexpr (kStates > 2) store(state2, s.state2 + i);
}

template <class Rule, int kStates, int N, class P, class G, class C>
FW_DEVICE void update_pack(const Streams<P, G>& s, int32_t i, const ScalarsOf<C>& scalars, C weight,
                           bool accumulate, NormSum& sum, SquareSum& squares) {
  constexpr int kPart = kStates == 3 && N > kPack<C> ? kPack<C> : N;
  G grad[N];
  P param[N];
  load(s.grad + i, grad);
  load(s.param + i, param);
  for (int k = 0; k < N; k += kPart)
    update_part<Rule, kStates, kPart>(s, i + k, scalars, param + k, grad + k, accumulate, sum);
  store(param, s.param + i);
  squares.add(param);
  // of the parameter as it is stored
  if (s.average)
    for (int k = 0; k < N; k += kPart) average_part<kPart>(s.average + i + k, param + k, weight);
}

template <class Rule, int kStates, class P, class G>
FW_DEVICE NormSum update_states(const Streams<P, G>& s, const Scalars& row_scalars, double average_weight,
                                bool accumulate, SquareSum& squares) {
  using C = typename Streams<P, G>::C;
  const ScalarsOf<C> scalars(row_scalars);
  const C weight = static_cast<C>(average_weight);
  NormSum sum;
#pragma unroll 1
  for (int32_t i = threadIdx.x * kPack<P>; i < s.count; i += kThreads * kPack<P>) {
    if (s.whole(i)) {
      update_pack<Rule, kStates, kPack<P>>(s, i, scalars, weight, accumulate, sum, squares);
    } else {
      if (accumulate) add_odd(sum, s, i);
#pragma unroll 1
      for (int32_t k = i; k < s.end(i); ++k)
        update_pack<Rule, kStates, 1>(s, k, scalars, weight, false, sum, squares);
    }
  }
  return sum;
}

// the sums over a group of neighbouring threads of a warp, in the first of them
template <int N>
FW_DEVICE void group_sum(double (&sums)[N], int32_t width) {
#pragma unroll 1
  for (int32_t distance = width / 2; distance > 0; distance /= 2)
    for (int k = 0; k < N; ++k) sums[k] += __shfl_down_sync(~0u, sums[k], distance);
}

// The threads of a block in groups that take a piece of a channel each: as many as the piece has work for,
// but no more than a warp. All threads come to every call of visit(piece, its number, its columns), for they
// may exchange sums there; those without a piece come with an empty one.
template <class P, class G>
struct Team {
  int32_t width, lane, group, groups;

  FW_DEVICE explicit Team(const Pieces& pieces) : width(1) {
    const int32_t most = pieces.channel_size < kPiece ? pieces.channel_size : kPiece;
    while (width < kWarp && width * kPack<P> < most) width *= 2;
    lane = threadIdx.x % width, group = threadIdx.x / width, groups = kThreads / width;
  }

  template <class Visit>
  FW_DEVICE void visit(const Pieces& pieces, const Row& row, uint64_t grads, const Chunk& chunk,
                       const Visit& visit) const {
#pragma unroll 1
    for (int32_t first = 0; first < pieces.count; first += groups) {
      const int32_t i = first + group;
      const Piece piece = i < pieces.count ? pieces[i] : Piece{0, 0};
      visit(i, Streams<P, G>(row, grads, Chunk{chunk.offset + piece.begin, piece.count, chunk.row}));
    }
  }

  // calls pack(i) for whole packs from element i on, and element(i) for the elements of others
  template <class Pack, class Element>
  FW_DEVICE void share(const Streams<P, G>& s, const Pack& pack, const Element& element) const {
#pragma unroll 1
    for (int32_t i = lane * kPack<P>; i < s.count; i += width * kPack<P>) {
      if (s.whole(i)) {
        pack(i);
      } else {
#pragma unroll 1
        for (int32_t k = i; k < s.end(i); ++k) element(k);
      }
    }
  }
};

// the first part of an update in two: the states move, and the update that they mean is what is summed
template <class Rule, int kStates, int N, class P, class G, class C>
FW_DEVICE void stage1_pack(const Streams<P, G>& s, int32_t i, const ScalarsOf<C>& scalars,
                           double (&sums)[Rule::kSums]) {
  C state0[N], state1[N];
  G raw_grad[N];
  P raw_param[N];
  load(s.grad + i, raw_grad);
  load(s.param + i, raw_param);
  if constexpr (kStates > 0) load(s.state0 + i, state0);
  if constexpr (kStates > 1) load(s.state1 + i, state1);
  for (int k = 0; k < N; ++k) {
    const C param = static_cast<C>(widen(raw_param[k])), grad = static_cast<C>(widen(raw_grad[k]));
    C state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = state0[k];
    if constexpr (kStates > 1) state[1] = state1[k];
    Rule::template update_moments<kStates>(param, grad, state, scalars);
    const C update = Rule::template direction<kStates>(param, grad, state, scalars);
    Rule::accumulate(sums, param, grad, update, scalars);
    if constexpr (kStates > 0) state0[k] = state[0];
    if constexpr (kStates > 1) state1[k] = state[1];
  }
  if constexpr (kStates > 0) store(state0, s.state0 + i);
  if constexpr (kStates > 1) store(state1, s.state1 + i);
}

// the second part, which finds the update again from the states
template <class Rule, int kStates, int N, class P, class G, class C>
FW_DEVICE void stage2_pack(const Streams<P, G>& s, int32_t i, const ScalarsOf<C>& scalars, C projection_coef,
                           C weight, bool needs_grad, SquareSum& squares) {
  C state0[N], state1[N];
  G raw_grad[N] = {};
  P param[N];
  if (needs_grad) load(s.grad + i, raw_grad);
  load(s.param + i, param);
  if constexpr (kStates > 0) load(s.state0 + i, state0);
  if constexpr (kStates > 1) load(s.state1 + i, state1);
  for (int k = 0; k < N; ++k) {
    C value = static_cast<C>(widen(param[k])), state[kMaxStates] = {};
    const C grad = static_cast<C>(widen(raw_grad[k]));
    if constexpr (kStates > 0) state[0] = state0[k];
    if constexpr (kStates > 1) state[1] = state1[k];
    Rule::apply(value, Rule::template direction<kStates>(value, grad, state, scalars), projection_coef,
                scalars);
    narrow(value, param[k]);
  }
  store(param, s.param + i);
  squares.add(param);
  // of the parameter as it is stored
  if (s.average) average_part<N>(s.average + i, param, weight);
}

template <class Rule, int kStates, class P, class G>
FW_DEVICE void stage1_chunk(const Step& step, const Row& row, uint64_t grads, const Chunk& chunk) {
  using C = typename Streams<P, G>::C;
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const Pieces pieces(row, chunk);
  const Team<P, G> team(pieces);
  team.visit(pieces, row, grads, chunk, [&](int32_t piece, const Streams<P, G>& s) {
    double sums[Rule::kSums] = {};
    team.share(
        s, [&](int32_t i) { stage1_pack<Rule, kStates, kPack<P>>(s, i, scalars, sums); },
        [&](int32_t i) { stage1_pack<Rule, kStates, 1>(s, i, scalars, sums); });
    group_sum(sums, team.width);
    double* out = at<double>(step.sums) + (pieces.first + piece) * Rule::kSums;
    for (int k = 0; k < Rule::kSums; ++k)
      if (team.lane == 0 && s.count > 0) out[k] = sums[k];
  });
}

template <class Rule, int kStates, class P, class G>
FW_DEVICE void stage2_chunk(const Step& step, const Row& row, uint64_t grads, const Chunk& chunk,
                            SquareSum& squares) {
  using C = typename Streams<P, G>::C;
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const C weight = static_cast<C>(average_weight_of(row));
  const bool needs_grad = Rule::needs_grad(at<Hyper>(step.hypers)[row.group], row.n_states);
  const Pieces pieces(row, chunk);
  const Team<P, G> team(pieces);
  team.visit(pieces, row, grads, chunk, [&](int32_t piece, Streams<P, G> s) {
    if (!(weight > C(0)) || squares.wanted) s.average = nullptr;
    C projection_coef = C(0);
    if (Rule::kProjects && s.count > 0)
      projection_coef = static_cast<C>(at<double>(step.projection_coefs)[pieces.first + piece]);
    team.share(
        s,
        [&](int32_t i) {
          stage2_pack<Rule, kStates, kPack<P>>(s, i, scalars, projection_coef, weight, needs_grad, squares);
        },
        [&](int32_t i) {
          stage2_pack<Rule, kStates, 1>(s, i, scalars, projection_coef, weight, needs_grad, squares);
        });
  });
}

// a row without a gradient stays, but its average moves
template <class P, class G>
FW_DEVICE void average_chunk(const Streams<P, G>& s, double average_weight) {
  using C = typename Streams<P, G>::C;
  const C weight = static_cast<C>(average_weight);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < s.count; i += kThreads) {
    average_part<1>(s.average + i, global(s.param + i), weight);
  }
}

// the update of a chunk whose types are known
template <class Rule>
struct Update {
  const Step& step;
  SquareSum& squares;

  template <class P, class G>
  FW_DEVICE NormSum run(const Row& row, uint64_t grads, const Chunk& chunk) const {
    Streams<P, G> s(row, grads, chunk);
    // what is on a sphere is averaged when it is back there
    if (!s.average || !(average_weight_of(row) > 0.0) || squares.wanted) s.average = nullptr;
    if constexpr (Rule::kSums == 0) {
      if (s.grad) return with_states<Rule::kMinStates>(s, row, chunk.row);
    } else if (s.grad) {
      stage2<Rule::kMinStates, P, G>(row, grads, chunk);
      return NormSum{};
    }
    if (squares.wanted) squares.squares = measure_chunk<P, P>(row, row.param, chunk).l2_sq;
    if (s.average) average_chunk(s, average_weight_of(row));
    return NormSum{};
  }

  template <int kStates, class P, class G>
  FW_DEVICE NormSum with_states(const Streams<P, G>& s, const Row& row, int32_t index) const {
    if constexpr (kStates < Rule::kMaxStates)
      if (row.n_states > kStates) return with_states<kStates + 1>(s, row, index);
    return update_states<Rule, kStates>(s, at<Scalars>(step.scalars)[index], average_weight_of(row),
                                        accumulates(step), squares);
  }

  template <int kStates, class P, class G>
  FW_DEVICE void stage2(const Row& row, uint64_t grads, const Chunk& chunk) const {
    if constexpr (kStates < Rule::kMaxStates)
      if (row.n_states > kStates) return stage2<kStates + 1, P, G>(row, grads, chunk);
    stage2_chunk<Rule, kStates, P, G>(step, row, grads, chunk, squares);
  }
};

// the first part of an update whose types are known
template <class Rule>
struct Propose {
  const Step& step;

  template <class P, class G>
  FW_DEVICE NormSum run(const Row& row, uint64_t grads, const Chunk& chunk) const {
    if (!grads) return NormSum{};
    with_states<Rule::kMinStates, P, G>(row, grads, chunk);
    // once more, from the cache: in the order of the measure stage the norms are the same bits
    return accumulates(step) ? measure_chunk<P, G>(row, grads, chunk) : NormSum{};
  }

  template <int kStates, class P, class G>
  FW_DEVICE void with_states(const Row& row, uint64_t grads, const Chunk& chunk) const {
    if constexpr (kStates < Rule::kMaxStates)
      if (row.n_states > kStates) return with_states<kStates + 1, P, G>(row, grads, chunk);
    stage1_chunk<Rule, kStates, P, G>(step, row, grads, chunk);
  }
};

// The second pass over a chunk of a group on a sphere, whatever its gradient is.
struct Rescale {
  double factor, average_weight;

  template <class P, class G>
  FW_DEVICE NormSum run(const Row& row, uint64_t, const Chunk& chunk) const {
    using C = typename Arithmetic<P>::type;
    Streams<P, P> s(row, row.param, chunk);
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
    return NormSum{};
  }

  template <int N, class P, class C>
  FW_DEVICE void rescale_pack(const Streams<P, P>& s, int32_t i) const {
    P param[N];
    load(s.param + i, param);
    for (int k = 0; k < N; ++k)
      narrow(rescale(static_cast<C>(widen(param[k])), static_cast<C>(factor)), param[k]);
    store(param, s.param + i);
    if (s.average) average_part<N>(s.average + i, param, static_cast<C>(average_weight));
  }
};

struct Measure {
  template <class P, class G>
  FW_DEVICE NormSum run(const Row& row, uint64_t grads, const Chunk& chunk) const {
    return grads ? measure_chunk<P, G>(row, grads, chunk) : NormSum{};
  }
};

// a gradient has the type of its parameter, or is float32
template <class P, class Visitor>
FW_DEVICE NormSum visit_grad(const Visitor& visitor, const Row& row, uint64_t grads, const Chunk& chunk) {
  if (row.grad_dtype == row.dtype) return visitor.template run<P, P>(row, grads, chunk);
  return visitor.template run<P, float>(row, grads, chunk);
}

template <bool kDoubles, class Visitor>
FW_DEVICE NormSum visit(const Visitor& visitor, const Row& row, uint64_t grads, const Chunk& chunk) {
  if constexpr (kDoubles)
    if (row.dtype == kFloat64) return visit_grad<double>(visitor, row, grads, chunk);
  if (row.dtype == kBFloat16) return visit_grad<BFloat16>(visitor, row, grads, chunk);
  if (row.dtype == kFloat16) return visit_grad<Float16>(visitor, row, grads, chunk);
  return visitor.template run<float, float>(row, grads, chunk);
}

template <int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    measure_kernel(const __grid_constant__ Step step, const __grid_constant__ GradPointers<kSize> pointers) {
  keep(step, pointers);
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    const uint64_t grads = grad_of(step, pointers, chunk.row);
    keep_chunk_sum(step, i, visit<true>(Measure{}, at<Row>(step.rows)[chunk.row], grads, chunk));
  }
}

// counters and scalars of all rows that have a gradient
template <class Rule, int kSize>
FW_DEVICE void set_rows(const Step& step, const GradPointers<kSize>& pointers, StepDecision& decision) {
  __shared__ int first_of_tile;
  const Row* rows = at<Row>(step.rows);
  Scalars* scalars = at<Scalars>(step.scalars);
  bool found = false;
  for (int64_t begin = 0; begin < step.n_rows; begin += blockDim.x) {
    const int64_t row = begin + threadIdx.x;
    const bool active = row < step.n_rows && grad_of(step, pointers, row);
    if (row < step.n_rows) count_average(step, decision, rows[row]);
    if (active) count_update(rows[row]);
    if (threadIdx.x == 0) first_of_tile = kDecideThreads;
    __syncthreads();
    if (active && (threadIdx.x == 0 || !grad_of(step, pointers, row - 1)))
      atomicMin(&first_of_tile, threadIdx.x);
    __syncthreads();
    // most rows share the scalars of the first, and double arithmetic is slow on many devices
    const int64_t first = begin + first_of_tile;
    const bool own = active && (row == first || !same_scalars(step, row, first));
    if (own) set_scalars<Rule>(step, decision, row);
    __syncthreads();
    if (active && !own) scalars[row] = scalars[first];
    if (!found && row == first) decision.rect = scalars[row].rect;
    found = found || first_of_tile < kDecideThreads;
    __syncthreads();
  }
}

template <class Rule, int kSize>
__global__ void __launch_bounds__(kDecideThreads, 1)
    decide_kernel(const __grid_constant__ Step step, const __grid_constant__ GradPointers<kSize> pointers) {
  __shared__ StepDecision decision;
  keep(step, pointers);
  const Partial total = step.measure ? sum_chunks(step) : Partial{};
  if (threadIdx.x == 0) decision = decide(step, total);
  __syncthreads();
  for (int64_t group = threadIdx.x; group < step.n_groups; group += blockDim.x)
    set_rates(step, decision, group);
  __syncthreads();
  if (!decision.skipped) set_rows<Rule>(step, pointers, decision);
  __syncthreads();
  if (threadIdx.x == 0) {
    record(step, decision);
    *at<StepDecision>(step.decision) = decision;
  }
}

template <class Rule, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorOfSums)
    stage1_kernel(const __grid_constant__ Step step) {
  if (at<StepDecision>(step.decision)->skipped) return;
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    const uint64_t grads = at<uint64_t>(step.grads)[chunk.row];
    const NormSum sum = visit<kDoubles>(Propose<Rule>{step}, at<Row>(step.rows)[chunk.row], grads, chunk);
    if (accumulates(step)) keep_chunk_sum(step, i, sum);
  }
}

// the sums over a block, in all threads of it
template <int N>
FW_DEVICE void share_block_sum(double (&sums)[N]) {
  __shared__ double of_warp[kThreads / kWarp][N];
  group_sum(sums, kWarp);
  // the sums of the row before may still be read
  __syncthreads();
  for (int k = 0; k < N; ++k)
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][k] = sums[k];
  __syncthreads();
  for (int k = 0; k < N; ++k) {
    sums[k] = 0.0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sums[k] += of_warp[warp][k];
  }
}

// whether this block is the last to arrive, which sees what all of them wrote
FW_DEVICE bool arrives_last(StepDecision& decision) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&decision.finished_blocks, 1) + 1 == static_cast<int>(gridDim.x);
    __threadfence();
  }
  __syncthreads();
  return last;
}

FW_DEVICE void finish_norms(const Step& step, StepDecision& decision) {
  const Partial total = sum_chunks(step);
  if (threadIdx.x == 0) record_norms(step, decision, total);
}

// the factors of all groups on a sphere, by one block
FW_DEVICE void finish_spheres(const Step& step) {
  for (int64_t group = 0; group < step.n_groups; ++group) {
    Sphere* sphere = sphere_of(step, group);
    if (!sphere) continue;
    const double* squares = at<double>(step.squares) + sphere->first_chunk;
    double total[1] = {};
    // other blocks wrote them, so the cache of this processor must not be asked
    for (int64_t i = threadIdx.x; i < sphere->n_chunks; i += kThreads) total[0] += __ldcg(squares + i);
    share_block_sum(total);
    if (threadIdx.x == 0) set_factor(*sphere, total[0]);
  }
}

// What the sums over a row and its channels say. The channels are looked at before the row as a whole; of a
// single one, both say the same.
template <class Rule>
FW_DEVICE void reduce_layer(const Step& step, int64_t index) {
  constexpr int kSums = Rule::kSums;
  const Row& row = at<Row>(step.rows)[index];
  const Hyper& h = at<Hyper>(step.hypers)[row.group];
  const int64_t channels = row.numel / row.channel_size, pieces = channels * pieces_of_channel(row);
  const double* sums = at<double>(step.sums) + row.first_piece * kSums;
  // the last counts channels that have something along the gradient
  double found[kSums + 1] = {}, layer[kSums];
  if (channels == 1)
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < pieces; i += kThreads)
      for (int k = 0; k < kSums; ++k) found[k] += sums[i * kSums + k];
  else
    for (int64_t i = threadIdx.x; i < channels; i += kThreads) {
      double channel[kSums] = {};
      combine_channel(channel, step, row, i);
      found[kSums] += Rule::scale_invariant(h, channel, row.channel_size) ? 0.0 : 1.0;
      for (int k = 0; k < kSums; ++k) found[k] += channel[k];
    }
  share_block_sum(found);
  for (int k = 0; k < kSums; ++k) layer[k] = found[k];
  const bool projects = Rule::kProjects && row.projects;
  const bool by_channel = projects && channels > 1 && found[kSums] == 0.0;
  const bool by_layer = projects && !by_channel && Rule::scale_invariant(h, layer, row.numel);
  if (threadIdx.x == 0)
    Rule::layer_scalars(h, layer, by_channel || by_layer, at<Scalars>(step.scalars)[index]);
  if constexpr (Rule::kProjects) {
    const double projection_coef = by_layer ? Rule::projection_coef(h, layer) : 0.0;
    for (int64_t i = threadIdx.x; i < pieces && !by_channel; i += kThreads)
      at<double>(step.projection_coefs)[row.first_piece + i] = projection_coef;
    for (int64_t i = threadIdx.x; i < channels && by_channel; i += kThreads) {
      double channel[kSums] = {};
      combine_channel(channel, step, row, i);
      set_projection_coef(step, row, i, Rule::projection_coef(h, channel));
    }
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorOfSums)
    reduce_layers_kernel(const __grid_constant__ Step step) {
  StepDecision& decision = *at<StepDecision>(step.decision);
  if (decision.skipped) return;
  for (int64_t row = blockIdx.x; row < step.n_rows; row += gridDim.x)
    if (at<uint64_t>(step.grads)[row] && at<Row>(step.rows)[row].numel > 0) reduce_layer<Rule>(step, row);
  if (blockIdx.x == 0 && accumulates(step)) {
    const Partial total = sum_chunks(step);
    if (threadIdx.x == 0) record_norms(step, decision, total);
  }
}

template <class Rule, bool kDoubles>
__global__ void __launch_bounds__(kThreads, kDoubles ? kBlocksPerProcessorOfDoubles : kBlocksPerProcessor)
    update_kernel(const __grid_constant__ Step step) {
  StepDecision& decision = *at<StepDecision>(step.decision);
  if (decision.skipped) return;
  // last chunk first: the gradients measured last are still in the cache
  for (int64_t i = step.n_chunks - 1 - blockIdx.x; i >= 0; i -= gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    const uint64_t grads = at<uint64_t>(step.grads)[chunk.row];
    const Row& row = at<Row>(step.rows)[chunk.row];
    SquareSum squares{0.0, sphere_of(step, row.group) != nullptr};
    const NormSum sum = visit<kDoubles>(Update<Rule>{step, squares}, row, grads, chunk);
    if (Rule::kSums == 0 && accumulates(step)) keep_chunk_sum(step, i, sum);
    if (!squares.wanted) continue;
    double total[1] = {squares.squares};
    share_block_sum(total);
    if (threadIdx.x == 0) at<double>(step.squares)[i] = total[0];
  }
  const bool norms = Rule::kSums == 0 && accumulates(step);
  if (!(norms || step.spheres) || !arrives_last(decision)) return;
  if (norms) finish_norms(step, decision);
  if (step.spheres) finish_spheres(step);
}

template <bool kDoubles>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    rescale_kernel(const __grid_constant__ Step step) {
  const StepDecision& decision = *at<StepDecision>(step.decision);
  if (decision.skipped) return;
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const Sphere* sphere = sphere_of(step, row.group);
    if (sphere) visit<kDoubles>(Rescale{sphere->factor, average_weight_of(row)}, row, row.param, chunk);
  }
}

// the host side

struct Grids {
  int64_t measure = 0, stage1 = 0, reduce = 0, update = 0, rescale = 0;
};

// sizes of the grids on the current device, whose kernels are loaded at the first call
template <class Rule, bool kDoubles>
Grids grids_on(int device) {
  static std::mutex mutex;
  static std::vector<Grids> known;
  std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(device + 1);
  Grids& grids = known[device];
  if (grids.update == 0) {
    resident_blocks(measure_kernel<kMaxInlinePointers>, device);
    resident_blocks(decide_kernel<Rule, kSmallCarry>, device);
    resident_blocks(decide_kernel<Rule, kMaxInlinePointers>, device);
    grids.measure = resident_blocks(measure_kernel<kSmallCarry>, device);
    if constexpr (Rule::kSums > 0) {
      grids.stage1 = resident_blocks(stage1_kernel<Rule, kDoubles>, device);
      grids.reduce = resident_blocks(reduce_layers_kernel<Rule>, device);
    }
    grids.rescale = resident_blocks(rescale_kernel<kDoubles>, device);
    grids.update = resident_blocks(update_kernel<Rule, kDoubles>, device);
  }
  return grids;
}

template <class Rule, bool kDoubles, int kSize>
void launch_all(const Launch& how, const Step& step) {
  const Grids grids = grids_on<Rule, kDoubles>(how.device);
  GradPointers<kSize> pointers;
  pointers.count = how.n_grads;
  memcpy(pointers.grads, how.grads, how.n_grads * sizeof(uint64_t));
  if (step.measure) {
    launch(measure_kernel<kSize>, grid(grids.measure, how.max_blocks, step.n_chunks), kThreads, how.stream,
           step, pointers);
    GradPointers<kSmallCarry> none;
    none.count = 0;
    launch(decide_kernel<Rule, kSmallCarry>, 1, kDecideThreads, how.stream, step, none);
  } else {
    launch(decide_kernel<Rule, kSize>, 1, kDecideThreads, how.stream, step, pointers);
  }
  if constexpr (Rule::kSums > 0) {
    launch(stage1_kernel<Rule, kDoubles>, grid(grids.stage1, how.max_blocks, step.n_chunks), kThreads,
           how.stream, step);
    launch(reduce_layers_kernel<Rule>, grid(grids.reduce, how.max_blocks, step.n_rows), kThreads, how.stream,
           step);
  }
  launch(update_kernel<Rule, kDoubles>, grid(grids.update, how.max_blocks, step.n_chunks), kThreads,
         how.stream, step);
  if (step.spheres)
    launch(rescale_kernel<kDoubles>, grid(grids.rescale, how.max_blocks, step.n_chunks), kThreads, how.stream,
           step);
}

template <class Rule, bool kDoubles>
void run_sized(const Launch& how, const Step& step) {
  if (how.n_grads > kSmallCarry)
    launch_all<Rule, kDoubles, kMaxInlinePointers>(how, step);
  else
    launch_all<Rule, kDoubles, kSmallCarry>(how, step);
}

template <class Rule>
void run(const Launch& how, const Step& step) {
  const OnDevice guard(how.device);
  if (how.doubles)
    run_sized<Rule, true>(how, step);
  else
    run_sized<Rule, false>(how, step);
}

template <class Rule>
void prepare(int device, bool doubles) {
  const OnDevice guard(device);
  doubles ? grids_on<Rule, true>(device) : grids_on<Rule, false>(device);
}

#define FW_JOIN_(a, b) a##b
#define FW_JOIN(a, b) FW_JOIN_(a, b)
#define FW_TEXT_(a) #a
#define FW_TEXT(a) FW_TEXT_(a)

}  // namespace

const CudaKernels FW_JOIN(cuda_, FW_RULE) = {FW_TEXT(FW_RULE), prepare<FW_RULE>, run<FW_RULE>};

}  // namespace fw
