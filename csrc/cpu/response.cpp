// The pre-conditioner of the step about to be made, on the CPU, in one parallel region over the chunks of all
// tensors. Compiled once per instruction set, like kernels.cpp. No mathematics here: rules.h and response.h
// have it. SPDX-License-Identifier: Apache-2.0
#include "../response.h"

#include "blocks.h"
#include "kernels.h"

namespace fw {
namespace {

template <class Rule, int kStates, class C>
FW_LEAF void response_block(const C* __restrict param, const C* __restrict grad, const C* __restrict state0,
                            const C* __restrict state1, const C* __restrict state2, C* __restrict out,
                            int count, const ScalarsOf<C>& scalars) {
  const ScalarsOf<C> s = scalars;
  for (int i = 0; i < count; ++i) {
    C state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    if constexpr (kStates > 2) state[2] = state2[i];
    out[i] = response<Rule, kStates>(param[i], grad[i], state, s);
  }
}

template <class C, class V>
FW_LEAF void scale_block(const C* __restrict response, C fold, V* __restrict out, int count) {
  for (int i = 0; i < count; ++i) out[i] = static_cast<V>(scale_of(response[i], fold));
}

template <class Rule, int kStates, class C, class V>
void response_chunk(const Step& step, const Response& call, const Verdict& verdict, const Chunk& chunk) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grads = at<uint64_t>(step.grads)[chunk.row];
  const ScalarsOf<C> scalars(scalars_ahead<Rule>(step, verdict, chunk.row));
  const C fold = static_cast<C>(fold_of(step, call, verdict, chunk.row));
  const int64_t place = at<int64_t>(call.offsets)[chunk.row] + chunk.offset;
  alignas(64) C param_scratch[kBlock], grad_scratch[kBlock], out[kBlock];
  for (int32_t done = 0; done < chunk.count; done += kBlock) {
    const int64_t offset = chunk.offset + done;
    const int count = chunk.count - done < kBlock ? chunk.count - done : kBlock;
    const C* param = load<C>(row.param, row.dtype, offset, count, param_scratch);
    const C* grad = load<C>(grads, row.grad_dtype, offset, count, grad_scratch);
    response_block<Rule, kStates, C>(param, grad, at<C>(row.state0) + offset, at<C>(row.state1) + offset,
                                     at<C>(row.state2) + offset, out, count, scalars);
    if (call.scale) scale_block(out, C(1), at<V>(call.scale) + place + done, count);
    if (call.folded) scale_block(out, fold, at<V>(call.folded) + place + done, count);
  }
}

template <class Rule, class C, class V, int kStates>
void with_states(const Step& step, const Response& call, const Verdict& verdict, const Chunk& chunk,
                 int32_t n_states) {
  if constexpr (kStates < Rule::kMaxStates)
    if (n_states > kStates) return with_states<Rule, C, V, kStates + 1>(step, call, verdict, chunk, n_states);
  response_chunk<Rule, kStates, C, V>(step, call, verdict, chunk);
}

template <class Rule>
void run(const Step& step, const Response& call, int threads) {
  const Chunk* chunks = at<Chunk>(step.chunks);
  const Verdict verdict = verdict_ahead(step, call);
  for (int64_t group = 0; group < step.n_groups; ++group)
    at<Rates>(call.rates)[group] = rates_of(step, verdict, group);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < step.n_chunks; ++i) {
    const Chunk& chunk = chunks[i];
    const Row& row = at<Row>(step.rows)[chunk.row];
    if (at<int64_t>(call.offsets)[chunk.row] < 0) continue;
    if (row.dtype == kFloat64)
      with_states<Rule, double, double, Rule::kMinStates>(step, call, verdict, chunk, row.n_states);
    else if (call.doubles)
      with_states<Rule, float, double, Rule::kMinStates>(step, call, verdict, chunk, row.n_states);
    else
      with_states<Rule, float, float, Rule::kMinStates>(step, call, verdict, chunk, row.n_states);
  }
}

#define FW_ENTRY(Rule) run<Rule>,
const ResponseFunction kResponses[] = {FW_PRECONDITIONED(FW_ENTRY)};
#undef FW_ENTRY

}  // namespace

extern const ResponseFunction* const FW_JOIN(responses_, FW_ISA);
const ResponseFunction* const FW_JOIN(responses_, FW_ISA) = kResponses;

}  // namespace fw
