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

// the sum over the first kThreads threads of a block, in thread 0
FW_DEVICE Partial block_sum(Partial total) {
  __shared__ Partial of_warp[kDecideThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Partial other;
    other.l1 = __shfl_down_sync(~0u, total.l1, distance);
    other.l2_sq = __shfl_down_sync(~0u, total.l2_sq, distance);
    other.nonfinite = __shfl_down_sync(~0u, total.nonfinite, distance);
    combine(total, other);
  }
  // other threads may still read the sums of the previous chunk
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = total;
  __syncthreads();
  const int warps = (blockDim.x < kThreads ? blockDim.x : kThreads) / kWarp;
  return threadIdx.x == 0 ? combine_all(of_warp, warps) : total;
}

// written by other blocks: bypass L1
FW_DEVICE Partial load_partial(const Partial* from) {
  Partial part;
  part.l1 = __ldcg(&from->l1);
  part.l2_sq = __ldcg(&from->l2_sq);
  part.nonfinite = __ldcg(&from->nonfinite);
  return part;
}

// the sum over all chunks, in thread 0
FW_DEVICE Partial sum_chunks(const Step& step) {
  const Partial* partials = at<Partial>(step.partials);
  Partial total = {};
  if (threadIdx.x < kThreads) {
#pragma unroll 16
    for (int64_t i = threadIdx.x; i < step.n_chunks; i += kThreads)
      combine(total, load_partial(partials + i));
  }
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
    share_packs(
        s, threads.lane, threads.width,
        [&](int32_t i) {
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
    const Partial* parts = &tile.partial(step);
    Partial total = {};
#pragma unroll 4
    for (int32_t t = 0; t < tile.count; ++t) combine(total, parts[t]);
    at<Partial>(step.partials)[i] = total;
  }
}

// records the norms that an update has summed, by one block
FW_DEVICE void finish_norms(const Step& step, StepDecision& decision) {
  const Partial total = sum_norms(step);
  if (threadIdx.x == 0) record_norms(step, decision, total);
}

struct Measure {
  template <class P, class G>
  FW_DEVICE Partial run(const Row& row, uint64_t grad_address, const Chunk& chunk) const {
    if (!grad_address) return Partial{};
    if (has_channels(row, chunk)) return measure_channels<P, G>(row, grad_address, chunk);
    return measure_chunk<P, G>(row, grad_address, chunk);
  }
};

template <int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessorOfSums)
    measure_kernel(const __grid_constant__ Step step, const __grid_constant__ GradPointers<kSize> pointers) {
  save_grad_pointers(step, pointers);
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const int32_t index = at<Chunk>(step.chunks)[i].row;
    const Row& row = at<Row>(step.rows)[index];
    const uint64_t grad_address = grad_of(step, pointers, index);
    Partial total = {};
    // tile by tile, as an update sums them
#pragma unroll 1
    for (int32_t t = 0, count = 1; t < count; ++t) {
      const Tile tile(step, i, t);
      count = tile.count;
      combine(total, block_sum(visit<true>(Measure{}, row, grad_address, tile.part)));
    }
    if (threadIdx.x == 0) at<Partial>(step.partials)[i] = total;
  }
}

}  // namespace
}  // namespace fw
