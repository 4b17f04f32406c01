// The CUDA step in two launches, decide and update, and a third for the norms: measure before them where they
// must be known, or finish where telemetry records them. A rule that needs sums over layers takes two more
// between decide and update, stage1 and reduce, which finishes. Groups on a sphere take one at the end:
// rescale. Compiled once per rule, which FW_RULE names. This file has the update and the launches;
// measure.cuh, decide.cuh, layerwise.cuh and sphere.cuh have the other kernels. No mathematics here: rules.h,
// schedules.h, reduce.h and decide.h have it. SPDX-License-Identifier: Apache-2.0
#include <mutex>
#include <vector>

#include "../decide.h"
#include "chunks.cuh"
#include "decide.cuh"
#include "layerwise.cuh"
#include "measure.cuh"
#include "sphere.cuh"
#include "totals.cuh"

namespace fw {
namespace {

// updates N elements of a parameter and their states
template <class Rule, int kStates, int N, bool kRounds, class P, class G, class C>
FW_DEVICE void update_part(StatePack<kStates, N, C, kRounds>& states, const ScalarsOf<C>& scalars, P* param,
                           const G* raw_grad, bool accumulate, NormSum<C>& sum) {
  C grad[N];
  widen_all(raw_grad, grad);
  if constexpr (N > 1)
    if (accumulate) add_pack<C>(sum, grad);
  for (int k = 0; k < N; ++k) {
    C value = static_cast<C>(widen(param[k])), state[kMaxStates] = {};
    states.read(k, state);
    Rule::template update<kStates>(value, grad[k], state, scalars);
    narrow(value, param[k]);
    states.write(k, state);
  }
}

// updates kPacks packs of N elements from i on, a stride apart; all loads come before the first result
template <class Rule, int kStates, int kPacks, int N, bool kRounds, template <class, class> class Pointers,
          class P, class G, class C>
FW_DEVICE void update_packs(const Step& step, const Pointers<P, G>& s, int32_t i, const ScalarsOf<C>& scalars,
                            C weight, bool accumulate, NormSum<C>& sum, SumSq& sum_sq) {
  constexpr int kPart = kStates == 3 && N > kPack<C> ? kPack<C> : N, kStride = kThreads * N;
  static_assert(!kRounds || kPart == N, "one draw for a pack");
  StatePack<kStates, kPart, C, kRounds> states[kPacks];
  G grad[kPacks][N];
  ParamPack<N, P, kRounds && kIsRounded<P>> param[kPacks];
  for (int p = 0; p < kPacks; ++p) states[p].draw(s, i + p * kStride, step);
  for (int p = 0; p < kPacks; ++p)
    load_half<Pointers<P, G>::kStaged>(kGradPlace, s.grad, i + p * kStride, grad[p]);
  for (int p = 0; p < kPacks; ++p) param[p].load_from(s, i + p * kStride);
  for (int k = 0; k < N; k += kPart) {
    for (int p = 0; p < kPacks; ++p) states[p].load_from(s, i + p * kStride + k);
    for (int p = 0; p < kPacks; ++p) {
      if (k == 0) param[p].widen(s);
      states[p].widen(s);
      update_part<Rule>(states[p], scalars, param[p].value + k, grad[p] + k, accumulate, sum);
      states[p].round(s);
      states[p].store_to(s, i + p * kStride + k);
    }
  }
  for (int p = 0; p < kPacks; ++p) {
    param[p].store_to(s, i + p * kStride, step, kUpdatePass);
    finish_pack<N / kPart>(s, i + p * kStride, param[p], weight, sum_sq);
  }
}

template <class Rule, int kStates, bool kRounds, class P, class G>
FW_DEVICE Partial update_states(const Step& step, const ChunkPointers<P, G>& s, const Scalars& row_scalars,
                                double average_weight, bool accumulate, SumSq& sum_sq) {
  using C = typename ChunkPointers<P, G>::C;
  constexpr int N = kPack<P>, kStride = kThreads * N;
  // two packs of float32 with two states fit into the registers of a thread
  constexpr int kPacks = sizeof(P) == sizeof(float) && kStates < 3 && !kRounds ? 2 : 1;
  const ScalarsOf<C> scalars(row_scalars);
  const C weight = static_cast<C>(average_weight);
  NormSum<C> sum;
  int32_t i = threadIdx.x * N;
  if constexpr (kPacks > 1)
#pragma unroll 1
    for (; s.whole(i + (kPacks - 1) * kStride); i += kPacks * kStride)
      update_packs<Rule, kStates, kPacks, N, kRounds>(step, s, i, scalars, weight, accumulate, sum, sum_sq);
#pragma unroll 1
  for (; i < s.count; i += kStride) {
    if (s.whole(i)) {
      if constexpr (kRounds) {
        // values with residues, and states while they are rounded, take more registers, so that half a pack
        // of 16 bits goes at a time
        const StagedPointers<P, G> staged(s);
        staged.stage_in(i);
#pragma unroll 1
        for (int32_t k = i; k < i + N; k += kPack<C>)
          update_packs<Rule, kStates, 1, kPack<C>, kRounds>(step, staged, k, scalars, weight, accumulate, sum,
                                                            sum_sq);
        staged.unstage_param(i);
        staged.unstage_states(i);
      } else {
        update_packs<Rule, kStates, 1, N, kRounds>(step, s, i, scalars, weight, accumulate, sum, sum_sq);
      }
    } else {
      if (accumulate) add_partial_pack(sum, s, i);
#pragma unroll 1
      for (int32_t k = i; k < s.end(i); ++k)
        update_packs<Rule, kStates, 1, 1, kRounds>(step, s, k, scalars, weight, false, sum, sum_sq);
    }
  }
  return total_of(sum, [&] { return sum_packs<WideSum>(s); });
}

template <class Rule>
struct Update {
  const Step& step;
  SumSq& sum_sq;
  bool rounds;

  template <class P, class G>
  FW_DEVICE Partial run(const Row& row, uint64_t grad_address, const Chunk& chunk) const {
    ChunkPointers<P, G> s(row, grad_address, chunk, rounds);
    // parameters of a group on a sphere are averaged later, in rescale_kernel()
    if (!s.average || !(average_weight_of(row) > 0.0) || sum_sq.wanted) s.average = nullptr;
    if constexpr (Rule::kSums == 0) {
      if (s.grad) return with_states<Rule::kMinStates>(s, row, chunk.row);
    } else if (s.grad) {
      stage2_states<Rule, Rule::kMinStates, P, G>(step, row, grad_address, chunk, sum_sq, rounds);
      return Partial{};
    }
    finish_chunk(s, static_cast<typename ChunkPointers<P, G>::C>(average_weight_of(row)), sum_sq);
    return Partial{};
  }

  template <int kStates, class P, class G>
  FW_DEVICE Partial with_states(const ChunkPointers<P, G>& s, const Row& row, int32_t index) const {
    if constexpr (kStates < Rule::kMaxStates)
      if (row.n_states > kStates) return with_states<kStates + 1>(s, row, index);
    const Scalars& scalars = at<Scalars>(step.scalars)[index];
    // apart from rounding to nearest, which goes through whole packs
    if constexpr (kIsRounded<P> || (kStates > 0 && kMayRoundStates<P>))
      if (s.rounding != kNearest || (kStates > 0 && s.states.rounded))
        return update_states<Rule, kStates, true>(step, s, scalars, average_weight_of(row), accumulates(step),
                                                  sum_sq);
    return update_states<Rule, kStates, false>(step, s, scalars, average_weight_of(row), accumulates(step),
                                               sum_sq);
  }
};

// two packs of AdamP and SGDP need more registers too, and LAMB, which takes fewer, finds room for a fifth
// block
template <class Rule, bool kAllKinds>
constexpr int kBlocksOfUpdate =
    Rule::kSums == 0 ? (kAllKinds ? kBlocksPerProcessorOfAllKinds : kBlocksPerProcessor)
                     : (kAllKinds ? kBlocksPerProcessorOfSumsOfAllKinds : kBlocksPerProcessorOfSums);

template <class Rule, bool kAllKinds>
__global__ void __launch_bounds__(kThreads, kBlocksOfUpdate<Rule, kAllKinds>)
    update_kernel(const __grid_constant__ Step step) {
  StepDecision& decision = *at<StepDecision>(step.decision);
  if (decision.skipped) return;
  const bool norms = Rule::kSums == 0 && accumulates(step);
  const uint32_t tiles = tiles_of_chunk(step), units = step.n_chunks * tiles;
  for (uint32_t i = blockIdx.x; i < units; i += gridDim.x) {
    // last chunk first: the gradients measured last are still in the cache
    const Tile tile(step, step.n_chunks - 1 - i / tiles, i % tiles);
    if (tile.is_empty()) continue;
    const uint64_t grad_address = at<uint64_t>(step.grads)[tile.part.row];
    const Row& row = at<Row>(step.rows)[tile.part.row];
    SumSq sum_sq{0.0, sphere_of(step, row.group) != nullptr};
    const Partial sum = visit<kAllKinds>(Update<Rule>{step, sum_sq, kAllKinds}, row, grad_address, tile.part);
    if (norms) store_sum(tile.partial(step), sum);
    if (!sum_sq.wanted) continue;
    double total[1] = {sum_sq.sum_sq};
    share_block_sum(total);
    if (threadIdx.x == 0) at<double>(step.squares)[tile.chunk] = total[0];
  }
  if (step.spheres && !step.totals && arrives_last(&decision.finished)) finish_spheres(step);
}

// Records the norms that an update has summed; where rows are spread over processes, one block does that and
// sets the factors of groups on a sphere. A launch of its own, because a block of the update that waited
// for its writes to be seen by others would keep its place from the next one.
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Step step) {
  StepDecision& decision = *at<StepDecision>(step.decision);
  if (decision.skipped) return;
  if (step.totals) {
    if (step.spheres) finish_spheres(step);
    if (accumulates(step)) finish_norms(step, decision);
    return;
  }
  if (tiles_of_chunk(step) > 1) combine_tiles(step);
  // the sums that another thread of this block has combined; a single block reads them in the threads that
  // did
  if (gridDim.x > 1) {
    __syncthreads();
    if (!arrives_last(&decision.summed)) return;
  }
  finish_norms(step, decision);
}

// the host side

struct Grids {
  int64_t measure = 0, decide = 0, stage1 = 0, reduce = 0, update = 0, finish = 0, rescale = 0, fold = 0;
};

// grid sizes on the current device; the first call loads the kernels
template <class Rule, bool kAllKinds>
Grids grids_on(int device) {
  static std::mutex mutex;
  static std::vector<Grids> known;
  std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(device + 1);
  Grids& grids = known[device];
  if (grids.update == 0) {
    resident_blocks(measure_kernel<kMaxInlinePointers>, device);
    resident_blocks(decide_kernel<Rule, kMaxInlinePointers>, device, kDecideThreads);
    grids.decide = resident_blocks(decide_kernel<Rule, kFewPointers>, device, kDecideThreads);
    grids.measure = resident_blocks(measure_kernel<kFewPointers>, device);
    if constexpr (Rule::kSums > 0) {
      grids.stage1 = resident_blocks(stage1_kernel<Rule, kAllKinds>, device);
      grids.reduce = resident_blocks(reduce_layers_kernel<Rule>, device);
    }
    grids.rescale = resident_blocks(rescale_kernel<kAllKinds>, device);
    grids.finish = resident_blocks(finish_kernel, device);
    grids.fold = resident_blocks(fold_kernel<Rule>, device);
    grids.update = resident_blocks(update_kernel<Rule, kAllKinds>, device);
  }
  return grids;
}

template <class Rule, bool kAllKinds, int kSize>
void launch_all(const Launch& how, const Step& step) {
  const Grids grids = grids_on<Rule, kAllKinds>(how.device);
  const int64_t row_tiles = (step.n_rows + kDecideThreads - 1) / kDecideThreads;
  const int64_t decides = grid(grids.decide, how.max_blocks, row_tiles);
  const int threads = threads_of_chunk(step);
  const bool small = threads < kThreads;
  GradPointers<kSize> pointers;
  pointers.count = how.n_grads;
  memcpy(pointers.grads, how.grads, how.n_grads * sizeof(uint64_t));
  const int64_t tiles = tiles_of_chunk(step), units = step.n_chunks * tiles;
  const bool norms = Rule::kSums == 0 && accumulates(step);
  // the blocks of a launch that adds up the sums over tiles
  const int64_t sums = norms && tiles > 1 ? (step.n_chunks + kThreads - 1) / kThreads : 1;
  const auto fold = [&](Stage stage, int64_t blocks) {
    if (step.totals && (how.stages & stage))
      launch(fold_kernel<Rule>, grid(grids.fold, how.max_blocks, blocks), kThreads, how, step,
             static_cast<int32_t>(stage));
  };
  if ((how.stages & kMeasureStage) && step.measure)
    launch(measure_kernel<kSize>, grid(small ? step.n_chunks : grids.measure, how.max_blocks, step.n_chunks),
           threads, how, step, pointers);
  fold(kMeasureStage, 1);
  if (how.stages & kUpdateStage) {
    GradPointers<kFewPointers> none;
    none.count = 0;
    if (step.measure)
      launch(decide_kernel<Rule, kFewPointers>, decides, kDecideThreads, how, step, none);
    else
      launch(decide_kernel<Rule, kSize>, decides, kDecideThreads, how, step, pointers);
  }
  if constexpr (Rule::kSums > 0) {
    if (how.stages & kUpdateStage)
      launch(stage1_kernel<Rule, kAllKinds>, grid(grids.stage1, how.max_blocks, step.n_chunks), kThreads, how,
             step);
    fold(kUpdateStage, step.n_rows);
    if (how.stages & kLayerStage)
      launch(reduce_layers_kernel<Rule>, grid(grids.reduce, how.max_blocks, step.n_rows), kThreads, how,
             step);
  }
  constexpr Stage kLast = Rule::kSums > 0 ? kLayerStage : kUpdateStage;
  // as many blocks as tiles, or as small chunks: the device starts one where another ends
  if (how.stages & kLast)
    launch(update_kernel<Rule, kAllKinds>,
           grid(tiles > 1 || small ? units : grids.update, how.max_blocks, units), threads, how, step);
  if (norms || step.spheres) fold(kLast, sums);
  if (!(how.stages & kFinishStage)) return;
  if (norms || (step.totals && step.spheres))
    launch(finish_kernel, grid(grids.finish, how.max_blocks, step.totals ? 1 : sums), kThreads, how, step);
  if (step.spheres)
    launch(rescale_kernel<kAllKinds>, grid(grids.rescale, how.max_blocks, step.n_chunks), kThreads, how,
           step);
}

template <class Rule, bool kAllKinds>
void run_sized(const Launch& how, const Step& step) {
  if (how.n_grads > kFewPointers)
    launch_all<Rule, kAllKinds, kMaxInlinePointers>(how, step);
  else
    launch_all<Rule, kAllKinds, kFewPointers>(how, step);
}

template <class Rule>
void run(const Launch& how, const Step& step) {
  const OnDevice guard(how.device);
  if (how.all_kinds)
    run_sized<Rule, true>(how, step);
  else
    run_sized<Rule, false>(how, step);
}

template <class Rule>
void prepare(int device, bool all_kinds) {
  const OnDevice guard(device);
  if (all_kinds)
    grids_on<Rule, true>(device);
  else
    grids_on<Rule, false>(device);
}

}  // namespace

const CudaKernels FW_JOIN(cuda_, FW_RULE) = {FW_TEXT(FW_RULE), prepare<FW_RULE>, run<FW_RULE>,
                                             reinterpret_cast<const void*>(finish_kernel)};

}  // namespace fw
