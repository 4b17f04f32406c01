// The plain structs that Python and the kernels share; fused_warmup/plan/structs.py has the same fields in
// the same order. Each struct is a list of (type, name), which generates the struct and the layout that the
// bindings report and the tests compare with numpy. Fields must leave no padding. Addresses are stored as
// uint64. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "platform.h"

namespace fw {

constexpr int kMaxStates = 3;
// elements of a piece: a channel is summed piece by piece
constexpr int kPiece = 2048;
// bytes of a tile of a parameter, the part of a chunk that a block of the update takes
constexpr int kTileBytes = 8192;

enum DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

FW_HOST_DEVICE int32_t elements_of_tile(int32_t dtype) {
  return kTileBytes / (dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2);
}
// the stages of a step, which follow one another: between two the sums over processes are added up, where
// rows are spread over processes
enum Stage : int32_t {
  kMeasureStage = 1,
  kUpdateStage = 2,
  kLayerStage = 4,
  kFinishStage = 8,
  kAllStages = 15
};
enum InitKind : int32_t { kInitZeros = 0, kInitGrad = 1, kInitRandom = 2 };
enum AverageKind : int32_t { kAverageNone = 0, kAverageEma = 1, kAverageSwa = 2 };
enum SegmentKind : int32_t {
  kWarmup = 0,
  kConstant = 1,
  kLinear = 2,
  kCosine = 3,
  kExponential = 4,
  kPolynomial = 5,
  kInverseSqrt = 6,
  kTable = 7
};

// One tensor. States and average are float32, or float64 for a float64 parameter; states may be bfloat16, as
// state_dtype says. Its channels are contiguous and follow one another; first_piece is the index of the first
// of their pieces, first_chunk that of the first chunk. step and n_averaged are the addresses of the counts
// in the state of the parameter: a float, as in torch, and an int64. A tensor that has had no gradient yet
// may have neither states nor counts.
#define FW_ROW(X)           \
  X(uint64_t, param)        \
  X(uint64_t, state0)       \
  X(uint64_t, state1)       \
  X(uint64_t, state2)       \
  X(uint64_t, average)      \
  X(uint64_t, counters)     \
  X(int64_t, numel)         \
  X(int32_t, group)         \
  X(int32_t, dtype)         \
  X(int32_t, grad_dtype)    \
  X(int32_t, n_states)      \
  X(int32_t, initialized)   \
  X(int32_t, projects)      \
  X(int64_t, channel_size)  \
  X(int64_t, first_piece)   \
  X(uint64_t, step)         \
  X(uint64_t, n_averaged)   \
  X(int64_t, first_chunk)   \
  X(int64_t, n_chunks)      \
  X(uint64_t, residue)      \
  X(uint64_t, seed)         \
  X(int64_t, first_element) \
  X(int64_t, run)           \
  X(int64_t, run_stride)    \
  X(int32_t, rounding)      \
  X(int32_t, number)        \
  X(int32_t, state_dtype)   \
  X(int32_t, reserved)

// The whole tensor that a row is a part of, where rows are spread over processes. slot: index of the sums
// over those of its elements that are here, which rows share that are spread over the same processes.
// first_channel is that of the row, first_total the index of the sums of its layer. is_cut: whether other
// processes have parts of its channels, so that these are summed one by one.
#define FW_SPREAD(X)        \
  X(int64_t, numel)         \
  X(int64_t, channels)      \
  X(int64_t, first_channel) \
  X(int64_t, first_total)   \
  X(int32_t, slot)          \
  X(int32_t, is_cut)

// part of one row, small enough for 32-bit indices: whole channels, or a part of one channel
#define FW_CHUNK(X)  \
  X(int64_t, offset) \
  X(int32_t, count)  \
  X(int32_t, row)

// The hyper-parameters of one parameter group, before schedules. It has the addresses of the segments of its
// schedules, so that a captured graph, which reads it where it was, finds those of a schedule that was set
// later.
#define FW_HYPER(X)            \
  X(double, lr)                \
  X(double, weight_decay)      \
  X(double, beta1)             \
  X(double, beta2)             \
  X(double, eps)               \
  X(double, momentum)          \
  X(double, dampening)         \
  X(double, rho_threshold)     \
  X(double, init_scale)        \
  X(double, delta)             \
  X(double, wd_ratio)          \
  X(double, min_norm)          \
  X(double, max_norm)          \
  X(double, trust_clip)        \
  X(int32_t, init)             \
  X(int32_t, decoupled)        \
  X(int32_t, maximize)         \
  X(int32_t, nesterov)         \
  X(int32_t, skip_unrectified) \
  X(int32_t, bias_correction)  \
  X(int32_t, grad_averaging)   \
  X(int32_t, adapts)           \
  X(int32_t, decays_update)    \
  X(int32_t, n_lr_segments)    \
  X(int32_t, n_decay_segments) \
  X(int32_t, reserved)         \
  X(uint64_t, lr_segments)     \
  X(uint64_t, decay_segments)

// one segment of a schedule: begin and steps count optimizer steps; steps is 0 for a segment without end.
// table is the address of the values of a kTable.
#define FW_SEGMENT(X) \
  X(int64_t, begin)   \
  X(int64_t, steps)   \
  X(double, start)    \
  X(double, end)      \
  X(double, shape)    \
  X(uint64_t, table)  \
  X(int32_t, kind)    \
  X(int32_t, reserved)

// learning rate and weight decay of one group at this step, after schedules
#define FW_RATES(X) \
  X(double, lr)     \
  X(double, weight_decay)

// the scalars of one row's update, computed once per step in double
#define FW_SCALARS(X)             \
  X(double, grad_scale)           \
  X(double, weight_decay)         \
  X(double, decoupled_decay)      \
  X(double, exp_avg_weight)       \
  X(double, exp_avg_sq_weight)    \
  X(double, step_size)            \
  X(double, denom_scale)          \
  X(double, eps)                  \
  X(double, momentum)             \
  X(double, one_minus_dampening)  \
  X(double, rect)                 \
  X(double, exp_avg_sq_from_grad) \
  X(double, exp_avg_sq_scale)     \
  X(double, nesterov)             \
  X(double, inv_bias_correction1) \
  X(double, grad_weight)          \
  X(double, update_decay)

// what the update of one row is projected in, a View of rules.h, and the projection coefficient of all
// elements unless each channel has its own
#define FW_LAYER_PROJECTION(X) \
  X(double, coef)              \
  X(int32_t, view)             \
  X(int32_t, reserved)

// The sphere of one group, and its range of chunks. norm: address of the group norm before the step, 0 if the
// group is not on a sphere. radius: target norm, 0 to keep the current norm.
#define FW_SPHERE(X)      \
  X(uint64_t, norm)       \
  X(double, radius)       \
  X(double, factor)       \
  X(int64_t, first_chunk) \
  X(int64_t, n_chunks)

// sums over one chunk, or over all of them
#define FW_PARTIAL(X) \
  X(double, l1)       \
  X(double, l2_sq)    \
  X(int64_t, nonfinite)

// counters of the optimizer on the device: updates made, and calls of step()
#define FW_COUNTERS(X) \
  X(int64_t, step)     \
  X(int64_t, calls)

// counters of one row on the device: the exact number of updates made, and the weight of the parameter in its
// average at this step
#define FW_ROW_COUNTERS(X) \
  X(int64_t, step)         \
  X(double, average_weight)

// values recorded by the host for the next telemetry row; NaN if none
#define FW_PENDING_SCALARS(X) \
  X(double, loss)             \
  X(double, sharpness)

#define FW_TELEMETRY(X)   \
  X(double, step)         \
  X(double, lr)           \
  X(double, grad_norm)    \
  X(double, grad_norm_l1) \
  X(double, clip_coef)    \
  X(double, rect)         \
  X(double, skipped)      \
  X(double, loss)         \
  X(double, sharpness)

// the result of the decide stage for all rows of one step
#define FW_STEP_DECISION(X) \
  X(int64_t, t)             \
  X(double, grad_norm)      \
  X(double, grad_norm_l1)   \
  X(double, clip_coef)      \
  X(double, unscale)        \
  X(double, rect)           \
  X(int32_t, skipped)       \
  X(int32_t, finished)      \
  X(int32_t, decided)       \
  X(int32_t, summed)

// one call of step(): addresses of the columns, their lengths, and the settings of the optimizer; squares is
// the sum of squares of each chunk of a group on a sphere. chunk_sums has, per chunk, the sums of a rule over
// it and the number of its whole channels that are not scale-invariant. n_tiles is the most tiles that a
// chunk has; each chunk has room for so many sums in tile_partials. block_threads is the number of threads
// that take a chunk on a GPU. totals has the sums that processes add up, see totals.h, or is 0 if no row is
// spread over processes.
#define FW_STEP(X)               \
  X(uint64_t, rows)              \
  X(uint64_t, grads)             \
  X(uint64_t, chunks)            \
  X(uint64_t, hypers)            \
  X(uint64_t, rates)             \
  X(uint64_t, scalars)           \
  X(uint64_t, partials)          \
  X(uint64_t, counters)          \
  X(uint64_t, pending_scalars)   \
  X(uint64_t, telemetry)         \
  X(int64_t, n_rows)             \
  X(int64_t, n_chunks)           \
  X(int64_t, n_groups)           \
  X(int64_t, telemetry_capacity) \
  X(double, max_grad_norm)       \
  X(double, init_norm_sq)        \
  X(double, average_decay)       \
  X(int64_t, average_start)      \
  X(int64_t, average_every)      \
  X(int32_t, average_kind)       \
  X(int32_t, skip_nonfinite)     \
  X(int32_t, measure)            \
  X(int32_t, clip)               \
  X(uint64_t, decision)          \
  X(uint64_t, grad_scale)        \
  X(uint64_t, found_inf)         \
  X(uint64_t, sums)              \
  X(uint64_t, projection_coefs)  \
  X(uint64_t, chunk_sums)        \
  X(uint64_t, layer_projections) \
  X(uint64_t, spheres)           \
  X(uint64_t, squares)           \
  X(uint64_t, tile_partials)     \
  X(int64_t, n_tiles)            \
  X(int64_t, block_threads)      \
  X(uint64_t, totals)            \
  X(uint64_t, spreads)           \
  X(int64_t, n_slots)

// what the host needs of a tensor in one stretch of memory; dtype is -1 for any other tensor. reach is the
// number of its bytes.
#define FW_TENSOR_EXTENT(X) \
  X(uint64_t, address)      \
  X(int64_t, numel)         \
  X(int64_t, reach)         \
  X(int32_t, dtype)         \
  X(int32_t, ndim)          \
  X(int32_t, device_type)   \
  X(int32_t, device_id)

// One tensor of a sharpness measurement: the parameter, a copy of it, the gradients at both ends of a
// difference (0 for none), the offset of its elements in every vector, and its residue; rounding is the mode
// that keeps the residue, or kNearest without one.
#define FW_TENSOR_SLICE(X) \
  X(uint64_t, param)       \
  X(uint64_t, snapshot)    \
  X(uint64_t, plus)        \
  X(uint64_t, minus)       \
  X(int64_t, offset)       \
  X(int32_t, dtype)        \
  X(int32_t, rounding)     \
  X(uint64_t, residue)

// one operation on the vectors of a sharpness measurement, see vectors.h; factors and sums are double
#define FW_VECTOR_OP(X) \
  X(uint64_t, slices)   \
  X(uint64_t, chunks)   \
  X(uint64_t, partials) \
  X(uint64_t, sums)     \
  X(uint64_t, basis)    \
  X(uint64_t, out)      \
  X(uint64_t, scale)    \
  X(uint64_t, factors)  \
  X(uint64_t, finished) \
  X(int64_t, n_chunks)  \
  X(int64_t, stride)    \
  X(int32_t, n_basis)   \
  X(int32_t, doubles)   \
  X(int32_t, fresh)     \
  X(int32_t, narrow)

// The preconditioner of the next step, see preconditioner.h. Per row of the step: the offset of its elements
// in the vectors, or -1, and its stability threshold, the product of learning rate and eigenvalue.
#define FW_PRECONDITIONER_OP(X) \
  X(uint64_t, offsets)          \
  X(uint64_t, thresholds)       \
  X(uint64_t, l2_sq)            \
  X(uint64_t, scale)            \
  X(uint64_t, scaled)           \
  X(uint64_t, rates)            \
  X(int32_t, doubles)           \
  X(int32_t, reserved)

#define FW_STRUCTS(X)                     \
  X(Row, FW_ROW)                          \
  X(Spread, FW_SPREAD)                    \
  X(Chunk, FW_CHUNK)                      \
  X(Hyper, FW_HYPER)                      \
  X(Segment, FW_SEGMENT)                  \
  X(Rates, FW_RATES)                      \
  X(Scalars, FW_SCALARS)                  \
  X(LayerProjection, FW_LAYER_PROJECTION) \
  X(Sphere, FW_SPHERE)                    \
  X(Partial, FW_PARTIAL)                  \
  X(Counters, FW_COUNTERS)                \
  X(RowCounters, FW_ROW_COUNTERS)         \
  X(PendingScalars, FW_PENDING_SCALARS)   \
  X(Telemetry, FW_TELEMETRY)              \
  X(StepDecision, FW_STEP_DECISION)       \
  X(Step, FW_STEP)                        \
  X(TensorExtent, FW_TENSOR_EXTENT)       \
  X(TensorSlice, FW_TENSOR_SLICE)         \
  X(VectorOp, FW_VECTOR_OP)               \
  X(PreconditionerOp, FW_PRECONDITIONER_OP)

#define FW_FIELD(type, name) type name;
#define FW_DECLARE(Struct, FIELDS) \
  struct Struct {                  \
    FIELDS(FW_FIELD)               \
  };
FW_STRUCTS(FW_DECLARE)
#undef FW_DECLARE
#undef FW_FIELD

// an address of the table as a typed pointer
template <class T>
FW_HOST_DEVICE T* at(uint64_t address) {
  return global(reinterpret_cast<T*>(address));
}

}  // namespace fw
