// The measure stage: L1 norm, squared L2 norm and non-finite count of the gradients, chunk by chunk. The
// order of every sum depends on the table alone, so that any grid gives the same bits. No mathematics here:
// reduce.h has it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <type_traits>

#include "../decide.h"
#include "chunks.cuh"
#include "pieces.cuh"

namespace fw {
namespace {

// one thread's part of the sums over a chunk, in double
struct WideSum {
  double l1 = 0.0, l2_sq = 0.0;
  int32_t nonfinite = 0;

  template <int N, class C>
  FW_DEVICE void add(const C (&grad)[N]) {
    for (int i = 0; i < N; ++i) {
      nonfinite += is_nonfinite(grad[i]);
      accumulate_l1(l1, static_cast<double>(grad[i]));
      accumulate_l2(l2_sq, grad[i]);
    }
  }
};

// the same without double arithmetic, as long as the numbers are in the range of pairs
struct PairSum {
  FloatPair l1, l2_sq;
  bool fits = true;

  template <int N>
  FW_DEVICE void add(const float (&grad)[N]) {
    static_assert(N <= 4, "see fits_pair");
    float sum = 0.0f;
    for (int i = 0; i < N; ++i) accumulate_l1(sum, grad[i]);
    fits = fits && fits_pair(sum);
    l1.add(sum);
    for (int i = 0; i < N; ++i) l2_sq.add_square(grad[i]);
  }
};

template <class C>
using NormSum = std::conditional_t<std::is_same<C, double>::value, WideSum, PairSum>;

FW_DEVICE Partial total_of(const WideSum& sum) { return {sum.l1, sum.l2_sq, sum.nonfinite}; }

// the sums of a thread; again() makes its WideSum, from numbers that are not all in the range of pairs
template <class Again>
FW_DEVICE Partial total_of(const PairSum& sum, const Again& again) {
  return sum.fits ? Partial{sum.l1.value(), sum.l2_sq.value(), 0} : total_of(again());
}
template <class Again>
FW_DEVICE Partial total_of(const WideSum& sum, const Again&) {
  return total_of(sum);
}

// the sum over a warp, in its first thread
FW_DEVICE Partial warp_sum(Partial total) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Partial other;
    other.l1 = __shfl_down_sync(~0u, total.l1, distance);
    other.l2_sq = __shfl_down_sync(~0u, total.l2_sq, distance);
    other.nonfinite = __shfl_down_sync(~0u, total.nonfinite, distance);
    combine(total, other);
  }
  return total;
}

// the sum over the first kThreads threads of a block, from those over its warps
FW_DEVICE Partial combine_warps(const Partial* of_warp) {
  return combine_all(of_warp, (blockDim.x < kThreads ? blockDim.x : kThreads) / kWarp);
}

// the sum over the first kThreads threads of a block, in thread 0
FW_DEVICE Partial block_sum(const Partial& part) {
  __shared__ Partial of_warp[kDecideThreads / kWarp];
  const Partial total = warp_sum(part);
  // other threads may still read the sums of the previous chunk
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = total;
  __syncthreads();
  return threadIdx.x == 0 ? combine_warps(of_warp) : total;
}

// written by other blocks: bypass L1
FW_DEVICE Partial load_partial(const Partial* from) {
  Partial part;
  part.l1 = __ldcg(&from->l1);
  part.l2_sq = __ldcg(&from->l2_sq);
  part.nonfinite = __ldcg(&from->nonfinite);
  return part;
}

// Adds the sums at begin, begin + stride and so on up to end, so many loads in flight: without zeros behind
// the last one, the compiler would load the rest one by one.
template <int kBatch, class Sum, class Load>
FW_DEVICE void combine_every(Sum& total, int64_t begin, int64_t end, int64_t stride, const Load& load_sum) {
#pragma unroll 1
  for (int64_t i = begin; i < end; i += kBatch * stride) {
    Sum batch[kBatch] = {};
    for (int k = 0; k < kBatch; ++k)
      if (i + k * stride < end) load_sum(batch[k], i + k * stride);
    for (int k = 0; k < kBatch; ++k) combine(total, batch[k]);
  }
}

FW_DEVICE void combine_partials(Partial& total, const Partial* parts, int64_t begin, int64_t end,
                                int64_t stride) {
  combine_every<16>(total, begin, end, stride,
                    [&](Partial& part, int64_t i) { part = load_partial(parts + i); });
}

// the sum over all chunks, in thread 0
FW_DEVICE Partial sum_chunks(const Step& step) {
  Partial total = {};
  if (threadIdx.x < kThreads)
    combine_partials(total, at<Partial>(step.partials), threadIdx.x, step.n_chunks, kThreads);
  return block_sum(total);
}

// the sums over the gradients, of all processes where rows are spread over several, in thread 0
FW_DEVICE Partial sum_norms(const Step& step) { return step.totals ? combine_slots(step) : sum_chunks(step); }

FW_DEVICE void store_sum(Partial& out, const Partial& part) {
  const Partial total = block_sum(part);
  if (threadIdx.x == 0) out = total;
}

// adds a pack in runs of the length that a thread updates at a time
template <class C, int N, class G, class Sum>
FW_DEVICE void add_pack(Sum& sum, const G (&raw)[N]) {
  static_assert(N % kPack<C> == 0, "whole runs");
  for (int i = 0; i < N; i += kPack<C>) {
    C grad[kPack<C>];
    widen_all(raw + i, grad);
    sum.add(grad);
  }
}

// adds an incomplete or unaligned pack as if zeros followed it, so that alignment changes no bit
template <class P, class G, class Sum>
FW_DEVICE void add_partial_pack(Sum& sum, const ChunkPointers<P, G>& s, int32_t begin) {
  G grad[kPack<P>] = {};
  for (int i = 0; i < kPack<P>; ++i)
    if (begin + i < s.count) grad[i] = *global(s.grad + begin + i);
  add_pack<typename ChunkPointers<P, G>::C>(sum, grad);
}

// the packs that a thread has of a chunk or tile
template <class Sum, class P, class G>
FW_DEVICE Sum sum_packs(const ChunkPointers<P, G>& s) {
  using C = typename ChunkPointers<P, G>::C;
  constexpr int N = kPack<P>, kStride = kThreads * N;
  // four loads in flight, and one where numbers are read once more
  constexpr int kPacks = std::is_same<Sum, NormSum<C>>::value ? 4 * kVectorBytes / (N * sizeof(G)) : 1;
  Sum sum;
  int32_t i = threadIdx.x * N;
#pragma unroll 1
  for (; s.whole(i + (kPacks - 1) * kStride); i += kPacks * kStride) {
    G grad[kPacks][N];
    for (int p = 0; p < kPacks; ++p) load(s.grad + i + p * kStride, grad[p]);
    for (int p = 0; p < kPacks; ++p) add_pack<C>(sum, grad[p]);
  }
#pragma unroll 1
  for (; i < s.count; i += kStride) {
    if (s.whole(i)) {
      G grad[N];
      load(s.grad + i, grad);
      add_pack<C>(sum, grad);
    } else {
      add_partial_pack(sum, s, i);
    }
  }
  return sum;
}

template <class P, class G>
FW_DEVICE Partial measure_chunk(const Row& row, uint64_t grad_address, const Chunk& chunk) {
  const ChunkPointers<P, G> s(row, grad_address, chunk);
  return total_of(sum_packs<NormSum<typename ChunkPointers<P, G>::C>>(s),
                  [&] { return sum_packs<WideSum>(s); });
}

// the same for a chunk of several channels, in the order in which stage1 sums over them
template <class Sum, class P, class G>
FW_DEVICE Sum sum_channels(const Row& row, uint64_t grad_address, const Chunk& chunk) {
  using C = typename ChunkPointers<P, G>::C;
  const Pieces pieces(row, chunk);
  const ThreadGroup<P, G> threads(pieces);
  Sum sum;
  threads.visit(pieces, row, grad_address, chunk, [&](int32_t, const ChunkPointers<P, G>& s) {
    share_packs<1>(
        s, threads.lane, threads.width,
        [&](int32_t i, int32_t, Packs<1>) {
          G grad[kPack<P>];
          load(s.grad + i, grad);
          add_pack<C>(sum, grad);
        },
        [&](int32_t i) { add_partial_pack(sum, s, i); });
  });
  return sum;
}

template <class P, class G>
FW_DEVICE Partial measure_channels(const Row& row, uint64_t grad_address, const Chunk& chunk) {
  return total_of(sum_channels<NormSum<typename ChunkPointers<P, G>::C>, P, G>(row, grad_address, chunk),
                  [&] { return sum_channels<WideSum, P, G>(row, grad_address, chunk); });
}

// the sums over all chunks that have several tiles, from the sums over those
FW_DEVICE void combine_tiles(const Step& step) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < step.n_chunks; i += stride) {
    const Tile tile(step, i, 0);
    if (tile.count == 1) continue;
    Partial total = {};
    combine_partials(total, &tile.partial(step), 0, tile.count, 1);
    at<Partial>(step.partials)[i] = total;
  }
}

// records the norms that an update has summed, by one block
FW_DEVICE void finish_norms(const Step& step, StepDecision& decision) {
  const Partial total = sum_norms(step);
  if (threadIdx.x == 0) record_norms(step, decision, total);
}

// by tile and warp; a chunk has at most as many tiles as a warp has threads
using WarpSums = Partial[kWarp][kThreads / kWarp];

FW_DEVICE void store_warp_sum(WarpSums& sums, int32_t tile, const Partial& part) {
  const Partial total = warp_sum(part);
  if (threadIdx.x % kWarp == 0) sums[tile][threadIdx.x / kWarp] = total;
}

// The sums over the whole tiles of a chunk whose packs may be accessed as vectors; returns how many those
// are. The next tile is loaded before the sums over one are taken.
struct MeasureTiles {
  WarpSums& sums;

  template <class P, class G>
  FW_DEVICE int32_t run(const Row& row, uint64_t grad_address, const Chunk& chunk) const {
    using C = typename ChunkPointers<P, G>::C;
    constexpr int N = kPack<P>, kStride = kThreads * N, kTile = kTileBytes / sizeof(P),
                  kPacks = kTile / kStride;
    const ChunkPointers<P, G> s(row, grad_address, chunk);
    if (!s.grad || !s.aligned) return 0;
    const int32_t count = s.count / kTile;
    const G* from = s.grad + threadIdx.x * N;
    G grad[kPacks][N], next[kPacks][N] = {};
    if (count > 0)
      for (int p = 0; p < kPacks; ++p) load(from + p * kStride, next[p]);
#pragma unroll 1
    for (int32_t t = 0; t < count; ++t) {
      memcpy(grad, next, sizeof grad);
      from += kTile;
      if (t + 1 < count)
        for (int p = 0; p < kPacks; ++p) load(from + p * kStride, next[p]);
      NormSum<C> sum;
      for (int p = 0; p < kPacks; ++p) add_pack<C>(sum, grad[p]);
      store_warp_sum(sums, t, total_of(sum, [&] {
                       const Chunk tile{chunk.offset + t * kTile, kTile, chunk.row};
                       return sum_packs<WideSum>(ChunkPointers<P, G>(row, grad_address, tile));
                     }));
    }
    return count;
  }
};

struct Measure {
  template <class P, class G>
  FW_DEVICE Partial run(const Row& row, uint64_t grad_address, const Chunk& chunk) const {
    if (!grad_address) return Partial{};
    if (has_channels(row, chunk)) return measure_channels<P, G>(row, grad_address, chunk);
    return measure_chunk<P, G>(row, grad_address, chunk);
  }
};

template <int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    measure_kernel(const __grid_constant__ Step step, const __grid_constant__ GradPointers<kSize> pointers) {
  __shared__ WarpSums sums;
  save_grad_pointers(step, pointers);
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const uint64_t grad_address = grad_of(step, pointers, chunk.row);
    // tile by tile, as an update sums them, but no warp waits for another before the last one
    const int32_t count = Tile(step, i, 0).count;
    const int32_t begun = count > 1 ? visit<true>(MeasureTiles{sums}, row, grad_address, chunk) : 0;
#pragma unroll 1
    for (int32_t t = begun; t < count; ++t)
      store_warp_sum(sums, t, visit<true>(Measure{}, row, grad_address, Tile(step, i, t).part));
    __syncthreads();
    if (threadIdx.x < count) sums[threadIdx.x][0] = combine_warps(sums[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x != 0) continue;
    Partial total = {};
    for (int32_t t = 0; t < count; ++t) combine(total, sums[t][0]);
    at<Partial>(step.partials)[i] = total;
  }
}

}  // namespace
}  // namespace fw
