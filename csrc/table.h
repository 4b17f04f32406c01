// The plain structs that Python and the kernels share: fused_warmup/table.py mirrors them field by field.
// Every struct is a list of (type, name, offset), so that the struct, the check of its offsets and the
// layout that the tests compare with numpy come from one text. Addresses travel as uint64.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "hd.h"

namespace fw {

constexpr int kMaxStates = 3;
// elements of a channel that are summed at a time
constexpr int kPiece = 2048;

enum DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
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

// one tensor; states and average are float32, or float64 beside a float64 parameter. Its channels follow one
// another in memory, and so do their pieces of kPiece elements, the first of which is first_piece. step_float
// is where its updates are counted once more as a float, as torch keeps them in a state dict.
#define FW_ROW(X)              \
  X(uint64_t, param, 0)        \
  X(uint64_t, state0, 8)       \
  X(uint64_t, state1, 16)      \
  X(uint64_t, state2, 24)      \
  X(uint64_t, average, 32)     \
  X(uint64_t, counters, 40)    \
  X(int64_t, numel, 48)        \
  X(int32_t, group, 56)        \
  X(int32_t, dtype, 60)        \
  X(int32_t, grad_dtype, 64)   \
  X(int32_t, n_states, 68)     \
  X(int32_t, initialized, 72)  \
  X(int32_t, projects, 76)     \
  X(int64_t, channel_size, 80) \
  X(int64_t, first_piece, 88)  \
  X(uint64_t, step_float, 96)

// a part of one row, small enough for 32-bit arithmetic inside it: whole channels, or a part of one
#define FW_CHUNK(X)     \
  X(int64_t, offset, 0) \
  X(int32_t, count, 8)  \
  X(int32_t, row, 12)

// one parameter group; rates are per step, before schedules
#define FW_HYPER(X)                 \
  X(double, lr, 0)                  \
  X(double, weight_decay, 8)        \
  X(double, beta1, 16)              \
  X(double, beta2, 24)              \
  X(double, eps, 32)                \
  X(double, momentum, 40)           \
  X(double, dampening, 48)          \
  X(double, rho_threshold, 56)      \
  X(double, init_scale, 64)         \
  X(double, delta, 72)              \
  X(double, wd_ratio, 80)           \
  X(double, min_norm, 88)           \
  X(double, max_norm, 96)           \
  X(double, trust_clip, 104)        \
  X(int32_t, init, 112)             \
  X(int32_t, decoupled, 116)        \
  X(int32_t, maximize, 120)         \
  X(int32_t, nesterov, 124)         \
  X(int32_t, skip_unrectified, 128) \
  X(int32_t, bias_correction, 132)  \
  X(int32_t, grad_averaging, 136)   \
  X(int32_t, adapts, 140)           \
  X(int32_t, decays_update, 144)    \
  X(int32_t, lr_segment, 148)       \
  X(int32_t, lr_segments, 152)      \
  X(int32_t, decay_segment, 156)    \
  X(int32_t, decay_segments, 160)   \
  X(int32_t, reserved, 164)

// a stretch of a schedule: begin and steps count optimizer steps, steps = 0 has no end
#define FW_SEGMENT(X)  \
  X(int64_t, begin, 0) \
  X(int64_t, steps, 8) \
  X(double, start, 16) \
  X(double, end, 24)   \
  X(double, shape, 32) \
  X(int32_t, kind, 40) \
  X(int32_t, first_value, 44)

// what the schedules give one group at this step
#define FW_RATES(X) \
  X(double, lr, 0)  \
  X(double, weight_decay, 8)

// what one row's update needs, computed once per step in double
#define FW_SCALARS(X)                \
  X(double, grad_scale, 0)           \
  X(double, weight_decay, 8)         \
  X(double, decay, 16)               \
  X(double, exp_avg_weight, 24)      \
  X(double, exp_avg_sq_weight, 32)   \
  X(double, step_size, 40)           \
  X(double, denom_scale, 48)         \
  X(double, eps, 56)                 \
  X(double, momentum, 64)            \
  X(double, one_minus_dampening, 72) \
  X(double, rect, 80)                \
  X(double, init_grad, 88)           \
  X(double, init_state, 96)          \
  X(double, nesterov, 104)           \
  X(double, moment_scale, 112)       \
  X(double, grad_gain, 120)          \
  X(double, update_decay, 128)

// the sphere that the parameters of one group are kept on, and the chunks that they have; norm is the address
// of the norm that they have before a step, 0 for a group without a sphere, and radius is 0 where it is that
#define FW_SPHERE(X)          \
  X(uint64_t, norm, 0)        \
  X(double, radius, 8)        \
  X(double, factor, 16)       \
  X(int64_t, first_chunk, 24) \
  X(int64_t, n_chunks, 32)

// sums over one chunk, or over all of them
#define FW_PARTIAL(X) \
  X(double, l1, 0)    \
  X(double, l2_sq, 8) \
  X(int64_t, nonfinite, 16)

// int64 counts that live on the device: updates made, calls of step()
#define FW_COUNTERS(X) \
  X(int64_t, step, 0)  \
  X(int64_t, calls, 8)

// what one row counts on the device: updates made and values in its average, and the weight of the parameter
// in it at this step
#define FW_ROW_COUNTERS(X)  \
  X(int64_t, step, 0)       \
  X(int64_t, n_averaged, 8) \
  X(double, average_weight, 16)

// what the host may leave for the next telemetry row; NaN when it left nothing
#define FW_SLOTS(X)  \
  X(double, loss, 0) \
  X(double, sharpness, 8)

#define FW_TELEMETRY(X)       \
  X(double, step, 0)          \
  X(double, lr, 8)            \
  X(double, grad_norm, 16)    \
  X(double, grad_norm_l1, 24) \
  X(double, clip_coef, 32)    \
  X(double, rect, 40)         \
  X(double, skipped, 48)      \
  X(double, loss, 56)         \
  X(double, sharpness, 64)

// what the decide stage finds out for all rows of one step; the update reads it
#define FW_VERDICT(X)         \
  X(int64_t, t, 0)            \
  X(double, grad_norm, 8)     \
  X(double, grad_norm_l1, 16) \
  X(double, clip_coef, 24)    \
  X(double, unscale, 32)      \
  X(double, rect, 40)         \
  X(int32_t, skipped, 48)     \
  X(int32_t, finished_blocks, 52)

// one call of step(): addresses of the columns, their lengths, and the settings of the optimizer
#define FW_STEP(X)                    \
  X(uint64_t, rows, 0)                \
  X(uint64_t, grads, 8)               \
  X(uint64_t, chunks, 16)             \
  X(uint64_t, hypers, 24)             \
  X(uint64_t, segments, 32)           \
  X(uint64_t, values, 40)             \
  X(uint64_t, rates, 48)              \
  X(uint64_t, scalars, 56)            \
  X(uint64_t, partials, 64)           \
  X(uint64_t, counters, 72)           \
  X(uint64_t, slots, 80)              \
  X(uint64_t, telemetry, 88)          \
  X(int64_t, n_rows, 96)              \
  X(int64_t, n_chunks, 104)           \
  X(int64_t, n_groups, 112)           \
  X(int64_t, telemetry_capacity, 120) \
  X(double, max_grad_norm, 128)       \
  X(double, init_norm_sq, 136)        \
  X(double, average_decay, 144)       \
  X(int64_t, average_start, 152)      \
  X(int64_t, average_every, 160)      \
  X(int32_t, average_kind, 168)       \
  X(int32_t, skip_nonfinite, 172)     \
  X(int32_t, measure, 176)            \
  X(int32_t, clip, 180)               \
  X(uint64_t, verdict, 184)           \
  X(uint64_t, grad_scale, 192)        \
  X(uint64_t, found_inf, 200)         \
  X(uint64_t, sums, 208)              \
  X(uint64_t, radials, 216)           \
  X(uint64_t, spheres, 224)           \
  X(uint64_t, squares, 232)

// one tensor of a sharpness measurement: its values, where they are kept meanwhile, the gradients at both
// ends of a difference (0 for none), and where its piece of every vector begins
#define FW_SPAN(X)         \
  X(uint64_t, param, 0)    \
  X(uint64_t, snapshot, 8) \
  X(uint64_t, plus, 16)    \
  X(uint64_t, minus, 24)   \
  X(int64_t, offset, 32)   \
  X(int32_t, dtype, 40)    \
  X(int32_t, reserved, 44)

// one operation on the vectors of a measurement, see vectors.h; factors and sums are doubles on the device
#define FW_ALGEBRA(X)       \
  X(uint64_t, spans, 0)     \
  X(uint64_t, chunks, 8)    \
  X(uint64_t, partials, 16) \
  X(uint64_t, sums, 24)     \
  X(uint64_t, basis, 32)    \
  X(uint64_t, out, 40)      \
  X(uint64_t, scale, 48)    \
  X(uint64_t, factors, 56)  \
  X(uint64_t, finished, 64) \
  X(int64_t, n_chunks, 72)  \
  X(int64_t, stride, 80)    \
  X(int32_t, n_basis, 88)   \
  X(int32_t, doubles, 92)   \
  X(int32_t, fresh, 96)     \
  X(int32_t, narrow, 100)

// the pre-conditioner of the step about to be made, see response.h: per row of the step where its piece of
// the vectors begins, or -1, and the threshold of its learning rate times an eigenvalue
#define FW_RESPONSE(X)    \
  X(uint64_t, offsets, 0) \
  X(uint64_t, edges, 8)   \
  X(uint64_t, l2_sq, 16)  \
  X(uint64_t, scale, 24)  \
  X(uint64_t, folded, 32) \
  X(uint64_t, rates, 40)  \
  X(int32_t, doubles, 48) \
  X(int32_t, reserved, 52)

#define FW_STRUCTS(X)             \
  X(Row, FW_ROW)                  \
  X(Chunk, FW_CHUNK)              \
  X(Hyper, FW_HYPER)              \
  X(Segment, FW_SEGMENT)          \
  X(Rates, FW_RATES)              \
  X(Scalars, FW_SCALARS)          \
  X(Sphere, FW_SPHERE)            \
  X(Partial, FW_PARTIAL)          \
  X(Counters, FW_COUNTERS)        \
  X(RowCounters, FW_ROW_COUNTERS) \
  X(Slots, FW_SLOTS)              \
  X(Telemetry, FW_TELEMETRY)      \
  X(Verdict, FW_VERDICT)          \
  X(Step, FW_STEP)                \
  X(Span, FW_SPAN)                \
  X(Algebra, FW_ALGEBRA)          \
  X(Response, FW_RESPONSE)

#define FW_FIELD(type, name, offset) type name;
#define FW_DECLARE(Struct, FIELDS) \
  struct Struct {                  \
    FIELDS(FW_FIELD)               \
  };
FW_STRUCTS(FW_DECLARE)
#undef FW_DECLARE
#undef FW_FIELD

#define FW_FIELD(type, name, offset) static_assert(offsetof(Self, name) == offset, #name);
#define FW_VERIFY(Struct, FIELDS) \
  namespace layout_of_##Struct {  \
    using Self = Struct;          \
    FIELDS(FW_FIELD)              \
  }
FW_STRUCTS(FW_VERIFY)
#undef FW_VERIFY
#undef FW_FIELD

// an address of the table as a typed pointer
template <class T>
FW_HD T* at(uint64_t address) {
  return global(reinterpret_cast<T*>(address));
}

}  // namespace fw
