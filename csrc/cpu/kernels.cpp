// The CPU step: measure, decide and update in one parallel region over the chunks of all tensors.
// Compiled once per instruction set with FW_ISA naming it. Everything but the exported table has internal
// linkage, so that the linker can never put wide code where a narrow machine would run it.
// No mathematics here: rules.h, schedules.h and reduce.h have it.
// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include "../decide.h"
#include "blocks.h"

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
    double b[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) b[lane] = l2_sq[lane];
    int whole = count - count % kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      __builtin_prefetch(at<const void>(ahead.param + i * sizeof(C)), 1);
      __builtin_prefetch(at<const void>(ahead.state0 + i * sizeof(C)), 1);
      __builtin_prefetch(at<const void>(ahead.state1 + i * sizeof(C)), 1);
      for (int lane = 0; lane < kLanes; ++lane) accumulate_l1(a[lane], grad[i + lane]);
      for (int lane = 0; lane < kLanes; ++lane) accumulate_l2(b[lane], grad[i + lane]);
    }
    for (int i = whole; i < count; ++i) {
      accumulate_l1(a[i - whole], grad[i]);
      accumulate_l2(b[i - whole], grad[i]);
    }
    C sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      l2_sq[lane] = b[lane];
      sum += a[lane];
    }
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

template <class C>
FW_LEAF void average_block(C* __restrict average, const C* __restrict param, int count, C weight) {
  for (int i = 0; i < count; ++i) average_update(average[i], param[i], weight);
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
Partial update_chunk(const Step& step, const Verdict& verdict, const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grads = at<uint64_t>(step.grads)[chunk.row];
  const ScalarsOf<C> scalars(at<Scalars>(step.scalars)[chunk.row]);
  const C weight = static_cast<C>(verdict.average_weight);
  const bool accumulate = accumulates(step) && grads;
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock];
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
    if (row.average && weight > C(0)) {
      // the average is of the parameter as it is stored, so a rounded one is read back
      param = load<C>(row.param, row.dtype, offset, count, param_scratch);
      average_block(at<C>(row.average) + offset, param, count, weight);
    }
  }
  return lanes.sum();
}

template <class Rule, class C, int kStates>
Partial update_states(const Step& step, const Verdict& verdict, const Chunk& chunk, int32_t n_states) {
  if constexpr (kStates < Rule::kMaxStates)
    if (n_states > kStates) return update_states<Rule, C, kStates + 1>(step, verdict, chunk, n_states);
  return update_chunk<Rule, kStates, C>(step, verdict, chunk);
}

template <class Rule>
Verdict decide(const Step& step, const Partial& total) {
  const uint64_t* grads = at<uint64_t>(step.grads);
  Verdict verdict = judge(step, total);
  for (int64_t group = 0; group < step.n_groups; ++group) set_rates(step, verdict, group);
  int64_t last = -1;
  for (int64_t row = 0; row < step.n_rows && !verdict.skipped; ++row) {
    if (!grads[row]) continue;
    *at<int64_t>(at<Row>(step.rows)[row].step) += 1;
    if (last >= 0 && same_scalars(step, row, last)) {
      at<Scalars>(step.scalars)[row] = at<Scalars>(step.scalars)[last];
    } else {
      set_scalars<Rule>(step, verdict, row);
    }
    if (last < 0) verdict.rect = at<Scalars>(step.scalars)[row].rect;
    last = row;
  }
  record(step, verdict);
  return verdict;
}

template <class Rule>
void run(const Step& step, int threads) {
  const Row* rows = at<Row>(step.rows);
  const Chunk* chunks = at<Chunk>(step.chunks);
  const uint64_t* grads = at<uint64_t>(step.grads);
  Partial* partials = at<Partial>(step.partials);
  Verdict verdict;
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
    verdict = decide<Rule>(step, step.measure ? combine_all(partials, step.n_chunks) : Partial{});
    if (!verdict.skipped) {
      // last chunk first: the gradients measured last are still in the cache
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = step.n_chunks - 1; i >= 0; --i) {
        const Chunk& chunk = chunks[i];
        const Row& row = rows[chunk.row];
        Partial part = row.dtype == kFloat64
                           ? update_states<Rule, double, Rule::kMinStates>(step, verdict, chunk, row.n_states)
                           : update_states<Rule, float, Rule::kMinStates>(step, verdict, chunk, row.n_states);
        if (!step.measure) partials[i] = part;
      }
    }
  }
  if (accumulates(step) && !verdict.skipped)
    record_norms(step, verdict, combine_all(partials, step.n_chunks));
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
