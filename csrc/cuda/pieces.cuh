// Packs of a chunk, and pieces of its channels, shared out among the threads of a block.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <type_traits>

#include "../reduce.h"
#include "chunks.cuh"

namespace fw {
namespace {

template <int N>
using Packs = std::integral_constant<int, N>;

// The packs of one of `threads` threads: calls whole(i, stride, Packs<N>()) for N packs at element i and
// every stride on that may be accessed as vectors, kPacks of them as long as there are so many, and
// incomplete(i) for any other pack.
template <int kPacks, class P, class G, class Whole, class Incomplete>
FW_DEVICE void share_packs(const ChunkPointers<P, G>& s, int32_t thread, int32_t threads, const Whole& whole,
                           const Incomplete& incomplete) {
  const int32_t stride = threads * kPack<P>;
  int32_t i = thread * kPack<P>;
  if constexpr (kPacks > 1)
#pragma unroll 1
    for (; s.whole(i + (kPacks - 1) * stride); i += kPacks * stride) whole(i, stride, Packs<kPacks>());
#pragma unroll 1
  for (; i < s.count; i += stride) {
    if (s.whole(i))
      whole(i, stride, Packs<1>());
    else
      incomplete(i);
  }
}

// whether a chunk has several channels; otherwise all of it is one channel, or a part of one
FW_DEVICE bool has_channels(const Row& row, const Chunk& chunk) { return row.channel_size < chunk.count; }

// Splits the threads of a block into groups, each of which takes one piece of a channel. A group has as many
// threads as the piece has packs, but at most a warp. All threads of the block make every call of visit, so
// that they may exchange sums inside it; a group without a piece gets an empty one.
template <class P, class G>
struct ThreadGroup {
  int32_t width, lane, group, groups;
  bool rounds;

  FW_DEVICE explicit ThreadGroup(const Pieces& pieces, bool rounds = false) : width(1), rounds(rounds) {
    const int32_t most = pieces.channel_size < kPiece ? pieces.channel_size : kPiece;
    while (width < kWarp && width * kPack<P> < most) width *= 2;
    lane = threadIdx.x % width;
    group = threadIdx.x / width;
    groups = kThreads / width;
  }

  // calls visit with the number of a piece and the pointers to its data
  template <class Visit>
  FW_DEVICE void visit(const Pieces& pieces, const Row& row, uint64_t grad_address, const Chunk& chunk,
                       const Visit& visit) const {
#pragma unroll 1
    for (int32_t first = 0; first < pieces.count; first += groups) {
      const int32_t i = first + group;
      const Piece piece = i < pieces.count ? pieces[i] : Piece{0, 0};
      visit(i, ChunkPointers<P, G>(row, grad_address,
                                   Chunk{chunk.offset + piece.begin, piece.count, chunk.row}, rounds));
    }
  }
};

}  // namespace
}  // namespace fw
