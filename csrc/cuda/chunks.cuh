// Shared by the kernels of a step: launch bounds, gradient pointers in kernel arguments, the pointers to the
// data of one chunk, and the dispatch on its types.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../table.h"
#include "device.h"
#include "launch.h"
#include "states.cuh"

namespace fw {
namespace {

// Five blocks of 128 threads leave each thread 96 registers, enough for eight 16-bit elements with two
// states. Each of the 640 threads has at least 64 bytes in flight, which saturates the memory, and a small
// tensor occupies only a fifth of a multiprocessor.
constexpr int kBlocksPerProcessor = 5;
// float64 needs more registers for as many bytes, and so do rounding modes
constexpr int kBlocksPerProcessorOfAllKinds = 4;
constexpr int kBlocksPerProcessorOfSumsOfAllKinds = 3;
// the bits that states are rounded with stand beside their sums
constexpr int kBlocksPerProcessorOfMomentsOfAllKinds = 2;
// sums in double beside the states need more registers too
constexpr int kBlocksPerProcessorOfSums = 4;
// the decide stage is one block, whose arithmetic is in double and takes up to 80 registers
constexpr int kDecideThreads = 512;

// gradient pointers passed by value to the first kernel of a step; count is 0 when the column has them
// already
template <int kSize>
struct GradPointers {
  int64_t count;
  uint64_t grads[kSize];
};
// 32,764 bytes is CUDA's limit
static_assert(sizeof(Step) + sizeof(GradPointers<kFewPointers>) <= 4096, "small arguments");
static_assert(sizeof(Step) + sizeof(GradPointers<kMaxInlinePointers>) <= 32764, "arguments of a kernel");

template <int kSize>
FW_DEVICE uint64_t grad_of(const Step& step, const GradPointers<kSize>& pointers, int64_t row) {
  return pointers.count ? pointers.grads[row] : at<uint64_t>(step.grads)[row];
}

// persists the gradient pointers for later kernels; no kernel reads the column while it is written
template <int kSize>
FW_DEVICE void save_grad_pointers(const Step& step, const GradPointers<kSize>& pointers) {
  int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t row = first; row < pointers.count; row += int64_t(gridDim.x) * blockDim.x)
    at<uint64_t>(step.grads)[row] = pointers.grads[row];
}

// Tiles of the longest chunk. Blocks that run together take neighbouring tiles, and so memory that lies
// together; sums over layers and spheres go by whole chunks.
FW_HOST_DEVICE uint32_t tiles_of_chunk(const Step& step) {
  return step.spheres ? 1 : static_cast<uint32_t>(step.n_tiles);
}

// Threads of a block of measure and update. Fewer than kThreads take chunks of no more packs than threads, so
// that every sum is that of a block of kThreads.
FW_HOST_DEVICE int threads_of_chunk(const Step& step) {
  return step.spheres ? kThreads : static_cast<int>(step.block_threads);
}

// one of the tiles of a chunk; part has its elements
struct Tile {
  int64_t chunk;
  int32_t index, count;
  Chunk part;

  FW_DEVICE Tile(const Step& step, int64_t chunk, int32_t index)
      : chunk(chunk), index(index), count(1), part(at<Chunk>(step.chunks)[chunk]) {
    if (tiles_of_chunk(step) == 1) return;
    const int32_t most = elements_of_tile(at<Row>(step.rows)[part.row].dtype), begin = index * most;
    if (part.count <= most) return;
    count = (part.count + most - 1) / most;
    part.offset += begin;
    part.count = part.count - begin < most ? part.count - begin : most;
  }

  // true if the chunk has fewer tiles than the longest one
  FW_DEVICE bool is_empty() const { return index >= count; }

  // where the sums over it are stored
  FW_DEVICE Partial& partial(const Step& step) const {
    return count == 1 ? at<Partial>(step.partials)[chunk]
                      : at<Partial>(step.tile_partials)[chunk * step.n_tiles + index];
  }
};

// pointers to the tensors of one row from the start of a chunk on; null for a tensor that the row does not
// have
template <class P, class G>
struct ChunkPointers {
  using C = typename Arithmetic<P>::type;
  static constexpr bool kStaged = false;
  const Row* row;
  P* param;
  const G* grad;
  StatePointers<C> states;
  C* average;
  int32_t count, rounding;
  bool aligned;

  // rounds: whether the row may have another rounding mode than nearest, or rounded states, a constant of the
  // kernel
  FW_DEVICE ChunkPointers(const Row& row, uint64_t grad_address, const Chunk& chunk, bool rounds = false)
      : row(&row),
        param(column<P>(row.param, chunk.offset)),
        grad(column<const G>(grad_address, chunk.offset)),
        states(row, chunk.offset, rounds),
        average(column<C>(row.average, chunk.offset)),
        count(chunk.count),
        rounding(kIsRounded<P> && rounds ? row.rounding : kNearest) {
    // chunks begin at multiples of 16 bytes of their row, except those of channels of odd lengths
    uint64_t addresses = row.param | grad_address | row.state0 | row.state1 | row.state2 | row.average;
    if (kIsRounded<P> && rounds) addresses |= row.residue;
    aligned = addresses % kVectorBytes == 0 && chunk.offset % kPack<P> == 0;
  }

  // whether the pack at i may be accessed as vectors; otherwise its elements are taken singly, up to end(i)
  FW_DEVICE bool whole(int32_t i) const { return aligned && i + kPack<P> <= count; }
  FW_DEVICE int32_t end(int32_t i) const { return i + kPack<P> < count ? i + kPack<P> : count; }
};

// the same where the pack at hand has been staged
template <class P, class G>
struct StagedPointers : ChunkPointers<P, G> {
  static constexpr bool kStaged = sizeof(P) == 2;

  FW_DEVICE explicit StagedPointers(const ChunkPointers<P, G>& s) : ChunkPointers<P, G>(s) {}

  FW_DEVICE void stage_in(int32_t i) const {
    if constexpr (kStaged) {
      stage(kParamPlace, this->param + i);
      if constexpr (sizeof(G) == 2) stage(kGradPlace, this->grad + i);
      if (has_short_residue(this->rounding)) stage(kResiduePlace, residue(i));
      if (this->states.rounded) each_state(i, [](int place, uint16_t* state) { stage(place, state); });
    }
  }

  FW_DEVICE void unstage_param(int32_t i) const {
    if constexpr (kStaged) {
      unstage(kParamPlace, this->param + i);
      if (has_short_residue(this->rounding)) unstage(kResiduePlace, residue(i));
    }
  }

  FW_DEVICE void unstage_states(int32_t i) const {
    if constexpr (kStaged)
      if (this->states.rounded) each_state(i, [](int place, uint16_t* state) { unstage(place, state); });
  }

 private:
  FW_DEVICE uint16_t* residue(int32_t i) const { return residue_of<uint16_t>(*this->row, this->param + i); }

  template <class Visit>
  FW_DEVICE void each_state(int32_t i, const Visit& visit) const {
    auto* states = &this->states;
    if (states->state0) visit(kStatePlace, reinterpret_cast<uint16_t*>(states->state0) + i);
    if (states->state1) visit(kStatePlace + 1, reinterpret_cast<uint16_t*>(states->state1) + i);
    if (states->state2) visit(kStatePlace + 2, reinterpret_cast<uint16_t*>(states->state2) + i);
  }
};

// a gradient has the type of its parameter, or is float32
template <class P, class Visitor>
FW_DEVICE auto visit_grad(const Visitor& visitor, const Row& row, uint64_t grad_address, const Chunk& chunk) {
  if (row.grad_dtype == row.dtype) return visitor.template run<P, P>(row, grad_address, chunk);
  return visitor.template run<P, float>(row, grad_address, chunk);
}

// Calls visitor.run with the types of the parameter and the gradient of a row. A kernel is compiled twice:
// for rows of any kind, and, in fewer registers, for those that are not float64 and have nothing but
// parameters that are rounded to nearest.
template <bool kAllKinds, class Visitor>
FW_DEVICE auto visit(const Visitor& visitor, const Row& row, uint64_t grad_address, const Chunk& chunk) {
  if constexpr (kAllKinds)
    if (row.dtype == kFloat64) return visit_grad<double>(visitor, row, grad_address, chunk);
  if (row.dtype == kBFloat16) return visit_grad<BFloat16>(visitor, row, grad_address, chunk);
  if (row.dtype == kFloat16) return visit_grad<Float16>(visitor, row, grad_address, chunk);
  return visitor.template run<float, float>(row, grad_address, chunk);
}

}  // namespace
}  // namespace fw
