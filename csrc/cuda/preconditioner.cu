// The preconditioner of the next step, one launch. Compiled once for all rules that have one. Each block
// computes the scalars of its rows itself, so that the table of the step is only read. No mathematics here:
// rules.h and preconditioner.h have it. SPDX-License-Identifier: Apache-2.0
#include "../preconditioner.h"
#include "device.h"
#include "launch.h"
#include "states.cuh"

namespace fw {
namespace {

constexpr int kBlocksPerProcessor = 3;

// pointers to the tensors of a row and the results from the start of a chunk on; null for one that is not
// given
template <class P, class G, class V>
struct ChunkPointers {
  using C = typename Arithmetic<P>::type;
  static constexpr bool kStaged = false;
  const Row* row;
  const P* param;
  const G* grad;
  StatePointers<C> states;
  V *scale, *scaled;
  int32_t count, rounding;
  bool aligned;

  FW_DEVICE ChunkPointers(const Row& row, uint64_t grad_address, const PreconditionerOp& call,
                          const Chunk& chunk, int64_t place)
      : row(&row),
        param(at<const P>(row.param) + chunk.offset),
        grad(at<const G>(grad_address) + chunk.offset),
        states(row, chunk.offset, true),
        scale(call.scale ? at<V>(call.scale) + place : nullptr),
        scaled(call.scaled ? at<V>(call.scaled) + place : nullptr),
        count(chunk.count),
        rounding(row.rounding) {
    uint64_t addresses =
        row.param | grad_address | row.state0 | row.state1 | row.state2 | call.scale | call.scaled;
    if constexpr (kIsRounded<P>) addresses |= row.residue;
    // chunks begin at multiples of 16 bytes of their row
    aligned = (addresses | static_cast<uint64_t>(place) * sizeof(V)) % kVectorBytes == 0;
  }
};

template <int N, class C, class V>
FW_DEVICE void store_scales(const C (&inverse)[N], C factor, V* to) {
  V out[N];
  for (int k = 0; k < N; ++k) out[k] = static_cast<V>(scale_of(inverse[k], factor));
  store(out, to);
}

template <class Rule, int kStates, int N, class P, class G, class V, class C>
FW_DEVICE void preconditioner_pack(const ChunkPointers<P, G, V>& s, int32_t i, const ScalarsOf<C>& scalars,
                                   C factor) {
  C inverse[N];
  ParamPack<N, P> param;
  G grad[N];
  StatePack<kStates, N, C> states;
  param.load_from(s, i);
  load(s.grad + i, grad);
  states.load_from(s, i);
  param.widen(s);
  states.widen(s);
  for (int k = 0; k < N; ++k) {
    C state[kMaxStates] = {};
    states.read(k, state);
    const C g = static_cast<C>(widen(grad[k]));
    inverse[k] = inverse_preconditioner<Rule, kStates>(param.value[k], g, state, scalars);
  }
  if (s.scale) store_scales(inverse, C(1), s.scale + i);
  if (s.scaled) store_scales(inverse, factor, s.scaled + i);
}

// the scalars of one row, and the factor from its preconditioned sharpness to the edge ratio
struct RowScalars {
  Scalars scalars;
  double factor;
};

template <class Rule, class P, class G, class V, int kStates>
FW_DEVICE void with_states(const ChunkPointers<P, G, V>& s, int32_t n_states, const RowScalars& row_scalars) {
  if constexpr (kStates < Rule::kMaxStates)
    if (n_states > kStates) return with_states<Rule, P, G, V, kStates + 1>(s, n_states, row_scalars);
  using C = typename Arithmetic<P>::type;
  const ScalarsOf<C> scalars(row_scalars.scalars);
  const C factor = static_cast<C>(row_scalars.factor);
#pragma unroll 1
  for (int32_t i = threadIdx.x * kPack<P>; i < s.count; i += kThreads * kPack<P>) {
    if (s.aligned && i + kPack<P> <= s.count) {
      // as many elements of 16 bits as of their arithmetic, which the registers have room for
#pragma unroll 1
      for (int32_t k = i; k < i + kPack<P>; k += kPack<C>)
        preconditioner_pack<Rule, kStates, kPack<C>>(s, k, scalars, factor);
    } else {
#pragma unroll 1
      for (int32_t k = i; k < i + kPack<P> && k < s.count; ++k)
        preconditioner_pack<Rule, kStates, 1>(s, k, scalars, factor);
    }
  }
}

template <class Rule, class P, class V>
FW_DEVICE void visit_grad(const Row& row, uint64_t grad_address, const PreconditionerOp& call,
                          const Chunk& chunk, int64_t place, const RowScalars& row_scalars) {
  constexpr int kMin = Rule::kMinStates;
  // a gradient has the type of its parameter, or is float32
  if (row.grad_dtype == row.dtype)
    return with_states<Rule, P, P, V, kMin>(ChunkPointers<P, P, V>(row, grad_address, call, chunk, place),
                                            row.n_states, row_scalars);
  with_states<Rule, P, float, V, kMin>(ChunkPointers<P, float, V>(row, grad_address, call, chunk, place),
                                       row.n_states, row_scalars);
}

template <class Rule, class V>
FW_DEVICE void visit(const Step& step, const PreconditionerOp& call, const Chunk& chunk,
                     const RowScalars& row_scalars) {
  const Row& row = at<Row>(step.rows)[chunk.row];
  const uint64_t grad_address = at<uint64_t>(step.grads)[chunk.row];
  const int64_t place = at<int64_t>(call.offsets)[chunk.row] + chunk.offset;
  // float64 rows have float64 vectors
  if constexpr (sizeof(V) == sizeof(double))
    if (row.dtype == kFloat64)
      return visit_grad<Rule, double, V>(row, grad_address, call, chunk, place, row_scalars);
  if (row.dtype == kBFloat16)
    return visit_grad<Rule, BFloat16, V>(row, grad_address, call, chunk, place, row_scalars);
  if (row.dtype == kFloat16)
    return visit_grad<Rule, Float16, V>(row, grad_address, call, chunk, place, row_scalars);
  visit_grad<Rule, float, V>(row, grad_address, call, chunk, place, row_scalars);
}

template <class Rule, class V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    preconditioner_kernel(const __grid_constant__ Step step, const __grid_constant__ PreconditionerOp call) {
  __shared__ StepDecision decision;
  __shared__ RowScalars row_scalars;
  if (threadIdx.x == 0) decision = next_decision(step, call);
  __syncthreads();
  if (blockIdx.x == 0)
    for (int64_t group = threadIdx.x; group < step.n_groups; group += kThreads)
      at<Rates>(call.rates)[group] = rates_of(step, decision, group);
  for (int64_t i = blockIdx.x; i < step.n_chunks; i += gridDim.x) {
    const Chunk chunk = at<Chunk>(step.chunks)[i];
    if (at<int64_t>(call.offsets)[chunk.row] < 0) continue;
    // other threads may still read the scalars of the previous chunk
    __syncthreads();
    if (threadIdx.x == 0) {
      row_scalars.scalars = next_scalars<Rule>(step, decision, chunk.row);
      row_scalars.factor = lr_over_threshold(step, call, decision, chunk.row);
    }
    __syncthreads();
    visit<Rule, V>(step, call, chunk, row_scalars);
  }
}

template <class Rule, class V>
void launch_rule(const Launch& how, const Step& step, const PreconditionerOp& call) {
  // not cached, because it is asked once per measurement
  const int64_t resident = resident_blocks(preconditioner_kernel<Rule, V>, how.device);
  launch(preconditioner_kernel<Rule, V>, grid(resident, how.max_blocks, step.n_chunks), kThreads, how, step,
         call);
}

template <class Rule>
void run(const Launch& how, const Step& step, const PreconditionerOp& call) {
  if (call.doubles)
    launch_rule<Rule, double>(how, step, call);
  else
    launch_rule<Rule, float>(how, step, call);
}

#define FW_ENTRY(Rule) run<Rule>,
constexpr void (*kPreconditioners[])(const Launch&, const Step&,
                                     const PreconditionerOp&) = {FW_PRECONDITIONED(FW_ENTRY)};
#undef FW_ENTRY

}  // namespace

void run_preconditioner(const Launch& how, int rule, const Step& step, const PreconditionerOp& call) {
  const OnDevice guard(how.device);
  kPreconditioners[rule](how, step, call);
}

}  // namespace fw
