// The CPU step: measure, decide and update in one parallel region over the chunks of all tensors. Where rows
// are spread over processes it stops between stages, for the processes to add their sums up. Compiled
// once per instruction set, which FW_ISA names. Everything but the exported table has internal linkage, so
// that the linker can never use wide code where a narrow machine would run it. This file has the update of
// element-wise rules; measure.h, layerwise.h, sphere.h and totals.h have the other stages.
// No mathematics here: rules.h, schedules.h and reduce.h have it.
// SPDX-License-Identifier: Apache-2.0
#include "step.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../decide.h"
#include "blocks.h"
#include "layerwise.h"
#include "measure.h"
#include "sphere.h"
#include "totals.h"

namespace fw {
namespace {

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

template <class Rule, int kStates, class C>
Partial update_chunk(const Step& step, const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grad_address = at<uint64_t>(step.grads)[chunk.row];
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const C weight = static_cast<C>(average_weight_of(row));
  const int64_t t = at<StepDecision>(step.decision)->t;
  const RandomKey key(row, t, kUpdatePass);
  const bool accumulate = accumulates(step) && grad_address;
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock];
  StateBlocks<kStates, C> states;
  SumSqLanes sum_sq_lanes;
  SumSqLanes* const sum_sq = sphere_of(step, row.group) ? &sum_sq_lanes : nullptr;
  // without a gradient there may be no states either
  if (!grad_address && !sum_sq && !(weight > C(0))) return Partial{};
  NormLanes lanes;
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int64_t offset = chunk.offset + done;
    const int count = block_size(chunk, done);
    C* param = load_param<C>(row, offset, count, param_scratch);
    if (grad_address) {
      const C* grad = load<C>(grad_address, row.grad_dtype, offset, count, grad_scratch);
      if (accumulate) lanes.add(grad, count);
      states.load(row, offset, count);
      update_block<Rule, kStates, C>(param, grad, states.state[0], states.state[1], states.state[2], count,
                                     scalars);
      states.store(row, t, offset, count);
      store_param(param, row, key, offset, count);
    }
    finish_block<C>(row, offset, count, weight, sum_sq, param_scratch);
  }
  if (sum_sq) store_sum_sq(step, chunk, *sum_sq);
  return lanes.sum();
}

template <class Rule>
struct Update {
  const Step& step;
  const Chunk& chunk;

  template <int kStates, class C>
  Partial run() const {
    return update_chunk<Rule, kStates, C>(step, chunk);
  }
};

template <class Rule>
void update(const Step& step) {
  // last run first: the gradients measured last are still in the cache
  visit_chunks<Runs::kBackwards>(step.n_chunks, [&](int64_t i) {
    const Chunk& chunk = at<Chunk>(step.chunks)[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    const Partial part = with_states<Rule, Rule::kMinStates>(row, Update<Rule>{step, chunk});
    if (!step.measure) at<Partial>(step.partials)[i] = part;
  });
}

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
      set_scalars<Rule>(step, decision, at<Rates>(step.rates)[r.group], row);
    }
    if (last < 0) decision.rect = at<Scalars>(step.scalars)[row].rect;
    last = row;
  }
  record(step, decision);
  return decision;
}

// the sums over the gradients
Partial norms_of(const Step& step) {
  return step.totals ? combine_slots(step) : combine_all(at<Partial>(step.partials), step.n_chunks);
}

// adds up what the next stage needs of all processes
template <class Rule>
void fold(const Step& step, int stages) {
  const bool updated = stages & kUpdateStage;
  if ((stages & kMeasureStage) || (updated && accumulates(step))) fold_norms(step);
  if (step.spheres && (stages & (Rule::kSums > 0 ? kLayerStage : kUpdateStage))) fold_squares(step);
}

template <class Rule>
void run(const Step& step, int threads, int stages) {
  StepDecision& decision = *at<StepDecision>(step.decision);
  // Threads meet only where one needs the results of another: on a loaded machine each meeting may take as
  // long as the scheduler leaves a thread waiting.
  if ((stages & kMeasureStage) && step.measure) {
#pragma omp parallel num_threads(threads)
    measure_chunks(step);
  }
  if (stages & kUpdateStage) decision = decide_step<Rule>(step, step.measure ? norms_of(step) : Partial{});
  if (stages > kMeasureStage && decision.skipped) return;
  if (stages > kMeasureStage) {
    const bool one_chunk_each = Rule::kSums > 0 && all_one_chunk(step);
#pragma omp parallel num_threads(threads)
    {
      if constexpr (Rule::kSums > 0)
        update_layers<Rule>(step, stages, one_chunk_each);
      else if (stages & kUpdateStage)
        update<Rule>(step);
      if (step.spheres && (stages & kFinishStage)) {
#pragma omp barrier
        rescale_chunks(step);
      }
    }
  }
  if (accumulates(step) && (stages & kFinishStage)) record_norms(step, decision, norms_of(step));
  if (step.totals) fold<Rule>(step, stages);
}

#define FW_ENTRY(Rule) run<Rule>,
const StepFunction kSteps[] = {FW_RULES(FW_ENTRY)};
#undef FW_ENTRY

#if defined(__x86_64__)
// __builtin_cpu_supports() knows this one with recent compilers only
[[maybe_unused]] bool converts_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#define FW_IS_baseline() true
#define FW_IS_avx2()                                                                                    \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && \
   converts_halves())
#define FW_IS_avx512()                                                                        \
  (FW_IS_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))

bool supported() { return FW_JOIN(FW_IS_, FW_ISA)(); }

}  // namespace

extern const Kernels FW_JOIN(kernels_, FW_ISA);
const Kernels FW_JOIN(kernels_, FW_ISA) = {FW_TEXT(FW_ISA), supported, kSteps};

}  // namespace fw
