// The preconditioner of the next step on the CPU, in one parallel region over the chunks of all tensors.
// Compiled once per instruction set, as step.cpp is. No mathematics here: rules.h and preconditioner.h have
// it. SPDX-License-Identifier: Apache-2.0
#include "../preconditioner.h"

#include "blocks.h"
#include "step.h"

namespace fw {
namespace {

template <class Rule, int kStates, class C>
FW_LEAF void preconditioner_block(const C* __restrict param, const C* __restrict grad,
                                  const C* __restrict state0, const C* __restrict state1,
                                  const C* __restrict state2, C* __restrict out, int count,
                                  const ScalarsOf<C>& scalars) {
  const ScalarsOf<C> s = scalars;
  for (int i = 0; i < count; ++i) {
    C state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    if constexpr (kStates > 2) state[2] = state2[i];
    out[i] = inverse_preconditioner<Rule, kStates>(param[i], grad[i], state, s);
  }
}

template <class C, class V>
FW_LEAF void scale_block(const C* __restrict inverse, C factor, V* __restrict out, int count) {
  for (int i = 0; i < count; ++i) out[i] = static_cast<V>(scale_of(inverse[i], factor));
}

template <class Rule, int kStates, class C, class V>
void preconditioner_chunk(const Step& step, const PreconditionerOp& call, const StepDecision& decision,
                          const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grad_address = at<uint64_t>(step.grads)[chunk.row];
  const ScalarsOf<C> scalars(next_scalars<Rule>(step, decision, chunk.row));
  const C factor = static_cast<C>(lr_over_threshold(step, call, decision, chunk.row));
  const int64_t place = at<int64_t>(call.offsets)[chunk.row] + chunk.offset;
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock], out[kBlock];
  StateBlocks<kStates, C> states;
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int64_t offset = chunk.offset + done;
    const int count = block_size(chunk, done);
    const C* param = load_param<C>(row, offset, count, param_scratch);
    const C* grad = load<C>(grad_address, row.grad_dtype, offset, count, grad_scratch);
    states.load(row, offset, count);
    preconditioner_block<Rule, kStates, C>(param, grad, states.state[0], states.state[1], states.state[2],
                                           out, count, scalars);
    if (call.scale) scale_block(out, C(1), at<V>(call.scale) + place + done, count);
    if (call.scaled) scale_block(out, factor, at<V>(call.scaled) + place + done, count);
  }
}

template <class Rule, class C, class V, int kStates>
void with_states(const Step& step, const PreconditionerOp& call, const StepDecision& decision,
                 const Chunk& chunk, int32_t n_states) {
  if constexpr (kStates < Rule::kMaxStates)
    if (n_states > kStates)
      return with_states<Rule, C, V, kStates + 1>(step, call, decision, chunk, n_states);
  preconditioner_chunk<Rule, kStates, C, V>(step, call, decision, chunk);
}

template <class Rule>
void run(const Step& step, const PreconditionerOp& call, int threads) {
  const Chunk* chunks = at<Chunk>(step.chunks);
  const StepDecision decision = next_decision(step, call);
  for (int64_t group = 0; group < step.n_groups; ++group)
    at<Rates>(call.rates)[group] = rates_of(step, decision, group);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const Chunk& chunk = chunks[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    if (at<int64_t>(call.offsets)[chunk.row] < 0) continue;
    if (row.dtype == kFloat64)
      with_states<Rule, double, double, Rule::kMinStates>(step, call, decision, chunk, row.n_states);
    else if (call.doubles)
      with_states<Rule, float, double, Rule::kMinStates>(step, call, decision, chunk, row.n_states);
    else
      with_states<Rule, float, float, Rule::kMinStates>(step, call, decision, chunk, row.n_states);
  }
}

#define FW_ENTRY(Rule) run<Rule>,
const PreconditionerFunction kPreconditioners[] = {FW_PRECONDITIONED(FW_ENTRY)};
#undef FW_ENTRY

}  // namespace

extern const PreconditionerFunction* const FW_JOIN(preconditioners_, FW_ISA);
const PreconditionerFunction* const FW_JOIN(preconditioners_, FW_ISA) = kPreconditioners;

}  // namespace fw
