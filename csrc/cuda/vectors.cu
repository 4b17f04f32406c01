// The vector operations of a sharpness measurement, one launch each. Sums are taken chunk by chunk and then
// over the chunks in order, so that any grid gives the same bits. No mathematics here: vectors.h has it.
// SPDX-License-Identifier: Apache-2.0
#include <mutex>
#include <type_traits>
#include <vector>

#include "../vectors.h"
#include "device.h"
#include "launch.h"
#include "params.cuh"

namespace fw {
namespace {

// basis vectors that a thread holds in registers, as many as a warm start has
constexpr int kHeld = 4;

// one thread's part of the sums over a chunk
struct Sums {
  double products[kHeld] = {}, extra[kExtraSums] = {};
};

// the sum over a block, in thread 0
FW_DEVICE double block_sum(double part) {
  __shared__ double of_warp[kThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) part += __shfl_down_sync(~0u, part, distance);
  // other threads may still read the previous sums
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = part;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += of_warp[warp];
  return total;
}

FW_DEVICE void store_sum(double part, double* place) {
  const double total = block_sum(part);
  if (threadIdx.x == 0) *place = total;
}

// pointers to the parameter, gradients and vectors from the start of a chunk on; null for one that is not
// given
template <class P, class C>
struct ChunkPointers {
  P* param;
  const P *snapshot, *plus, *minus;
  const C *basis, *scale;
  C* out;
  uint64_t residue;
  int64_t stride;
  int32_t count, n_basis, rounding;
  bool aligned;

  FW_DEVICE ChunkPointers(const VectorOp& call, const Chunk& chunk) {
    const TensorSlice& tensor = at<TensorSlice>(call.slices)[chunk.row];
    const int64_t place = tensor.offset + chunk.offset;
    param = at<P>(tensor.param) + chunk.offset;
    snapshot = at<const P>(tensor.snapshot) + chunk.offset;
    plus = tensor.plus ? at<const P>(tensor.plus) + chunk.offset : nullptr;
    minus = tensor.minus ? at<const P>(tensor.minus) + chunk.offset : nullptr;
    basis = call.basis ? at<const C>(call.basis) + place : nullptr;
    scale = call.scale ? at<const C>(call.scale) + place : nullptr;
    out = call.out ? at<C>(call.out) + place : nullptr;
    stride = call.stride;
    count = chunk.count;
    n_basis = call.n_basis;
    rounding = tensor.rounding;
    residue = tensor.residue + chunk.offset * (rounding == kMaster ? sizeof(float) : sizeof(BFloat16));
    // chunks begin at multiples of 16 bytes of their tensor
    uint64_t addresses = tensor.param | tensor.snapshot | tensor.residue | tensor.plus | tensor.minus |
                         call.basis | call.scale | call.out;
    uint64_t bytes = static_cast<uint64_t>(tensor.offset | (n_basis > 1 ? stride : 0)) * sizeof(C);
    aligned = (addresses | bytes) % kVectorBytes == 0;
  }
};

// loads N elements from i on of the first basis vectors; all loads come before the first result is needed
template <int N, class P, class C>
FW_DEVICE void load_held(const ChunkPointers<P, C>& s, int32_t i, C (&held)[kHeld][N]) {
#pragma unroll
  for (int b = 0; b < kHeld; ++b)
    if (b < s.n_basis) load(s.basis + b * s.stride + i, held[b]);
}

template <int N, class C>
FW_DEVICE void add_products(Sums& sums, const C (&held)[kHeld][N], const C (&out)[N], int32_t n_basis) {
#pragma unroll
  for (int b = 0; b < kHeld; ++b)
    if (b < n_basis)
      for (int k = 0; k < N; ++k) accumulate_product(sums.products[b], held[b][k], out[k]);
}

template <int N, class P, class C>
FW_DEVICE void load_scale(const ChunkPointers<P, C>& s, int32_t i, C (&scale)[N]) {
  if (s.scale) {
    load(s.scale + i, scale);
  } else {
    for (int k = 0; k < N; ++k) scale[k] = C(1);
  }
}

template <int N, class P>
FW_DEVICE void load_gradient(const P* grad, int32_t i, P (&to)[N]) {
  if (grad) {
    load(grad + i, to);
  } else {
    for (int k = 0; k < N; ++k) to[k] = P{};
  }
}

// the values of a snapshot, with the residues of its rounding mode
template <int N, class P, class C>
FW_DEVICE void load_values(const ChunkPointers<P, C>& s, int32_t i, const P (&snapshot)[N],
                           typename Arithmetic<P>::type (&value)[N]) {
  widen_all(snapshot, value);
  if constexpr (kIsRounded<P>)
    if (has_residue(s.rounding)) load_exact(s.rounding, s.residue, i, snapshot, value);
}

// elements of a vector that a thread takes at a time, of a pack of N elements of a parameter
template <int N, class C>
constexpr int kRun = N < kPack<C> ? N : kPack<C>;

struct Perturb {
  static constexpr bool kSums = false;
  static constexpr int kBlocksPerProcessor = 4;

  template <int N, class P, class C>
  FW_DEVICE static void run(const ChunkPointers<P, C>& s, const VectorOp& call, int32_t i, Sums&) {
    constexpr int kPart = kRun<N, C>;
    P param[N];
    typename Arithmetic<P>::type value[N];
    load(s.snapshot + i, param);
    load_values(s, i, param, value);
    const C size = static_cast<C>(*at<double>(call.factors));
#pragma unroll
    for (int part = 0; part < N; part += kPart) {
      C v[kPart], scale[kPart];
      load(s.basis + i + part, v);
      load_scale(s, i + part, scale);
      for (int k = 0; k < kPart; ++k)
        param[part + k] = stored<P>(displaced(static_cast<C>(value[part + k]), size, scale[k], v[k]));
    }
    store(param, s.param + i);
  }
};

struct Finish {
  static constexpr bool kSums = true;
  // values, gradients and vectors are live at once and need more registers than a fourth block would leave
  static constexpr int kBlocksPerProcessor = 3;

  template <int N, class P, class C>
  FW_DEVICE static void run(const ChunkPointers<P, C>& s, const VectorOp& call, int32_t i, Sums& sums) {
    constexpr int kPart = kRun<N, C>;
    P snapshot[N], plus[N], minus[N];
    load(s.snapshot + i, snapshot);
    load_gradient(s.plus, i, plus);
    load_gradient(s.minus, i, minus);
    typename Arithmetic<P>::type value[N];
    if (call.narrow) load_values(s, i, snapshot, value);
#pragma unroll
    for (int part = 0; part < N; part += kPart) {
      C out[kPart], scale[kPart], held[kHeld][kPart];
      load_scale(s, i + part, scale);
      load_held(s, i + part, held);
      for (int k = 0; k < kPart; ++k)
        out[k] = static_cast<C>(widen(plus[part + k])) - static_cast<C>(widen(minus[part + k]));
      if (call.narrow) add_moved(s, call, i + part, value + part, scale, out, sums);
      for (int k = 0; k < kPart; ++k) out[k] *= scale[k];
      store(out, s.out + i + part);
      add_products(sums, held, out, s.n_basis);
    }
    store(snapshot, s.param + i);
  }

  template <int N, class P, class C>
  FW_DEVICE static void add_moved(const ChunkPointers<P, C>& s, const VectorOp& call, int32_t i,
                                  const typename Arithmetic<P>::type* value, const C (&scale)[N],
                                  const C (&difference)[N], Sums& sums) {
    const C size = static_cast<C>(*at<double>(call.factors));
    C last[N];
    load(s.basis + (s.n_basis - 1) * s.stride + i, last);
    for (int k = 0; k < N; ++k) {
      const C way = moved<P>(static_cast<C>(value[k]), size, scale[k], last[k]);
      accumulate_product(sums.extra[0], way, way);
      accumulate_product(sums.extra[1], way, difference[k]);
    }
  }
};

struct Combine {
  static constexpr bool kSums = true;
  static constexpr int kBlocksPerProcessor = 4;

  template <int N, class P, class C>
  FW_DEVICE static void run(const ChunkPointers<P, C>& s, const VectorOp& call, int32_t i, Sums& sums) {
#pragma unroll 1
    for (int part = 0; part < N; part += kRun<N, C>) run_part<kRun<N, C>>(s, call, i + part, sums);
  }

  template <int N, class P, class C>
  FW_DEVICE static void run_part(const ChunkPointers<P, C>& s, const VectorOp& call, int32_t i, Sums& sums) {
    const double* factors = at<double>(call.factors);
    C out[N] = {}, held[kHeld][N];
    if (!call.fresh) load(s.out + i, out);
    load_held(s, i, held);
    for (int k = 0; k < N; ++k) out[k] *= static_cast<C>(factors[0]);
#pragma unroll
    for (int b = 0; b < kHeld; ++b)
      if (b < s.n_basis)
        for (int k = 0; k < N; ++k) out[k] = multiply_add(static_cast<C>(factors[b + 1]), held[b][k], out[k]);
#pragma unroll 1
    for (int b = kHeld; b < s.n_basis; ++b) {
      C v[N];
      load(s.basis + b * s.stride + i, v);
      for (int k = 0; k < N; ++k) out[k] = multiply_add(static_cast<C>(factors[b + 1]), v[k], out[k]);
    }
    store(out, s.out + i);
    add_products(sums, held, out, s.n_basis);
    for (int k = 0; k < N; ++k) accumulate_product(sums.extra[0], out[k], out[k]);
    if (!s.scale) return;
    C scale[N];
    load(s.scale + i, scale);
    for (int k = 0; k < N; ++k) accumulate_product(sums.extra[1], scale[k] * out[k], scale[k] * out[k]);
  }
};

// the products of out, which the same thread has written, with further basis vectors
struct Products {
  template <int N, class P, class C>
  FW_DEVICE static void run(const ChunkPointers<P, C>& s, const VectorOp&, int32_t i, Sums& sums) {
    constexpr int kPart = kRun<N, C>;
#pragma unroll 1
    for (int part = 0; part < N; part += kPart) {
      C out[kPart], held[kHeld][kPart];
      load(s.out + i + part, out);
      load_held(s, i + part, held);
      add_products(sums, held, out, s.n_basis);
    }
  }
};

template <class Part, class P, class C>
FW_DEVICE Sums walk(const ChunkPointers<P, C>& s, const VectorOp& call) {
  Sums sums;
#pragma unroll 1
  for (int32_t i = threadIdx.x * kPack<P>; i < s.count; i += kThreads * kPack<P>) {
    if (s.aligned && i + kPack<P> <= s.count) {
      Part::template run<kPack<P>>(s, call, i, sums);
    } else {
#pragma unroll 1
      for (int32_t k = i; k < i + kPack<P> && k < s.count; ++k) Part::template run<1>(s, call, k, sums);
    }
  }
  return sums;
}

FW_DEVICE void store_products(const Sums& sums, int32_t n_basis, double* place) {
#pragma unroll
  for (int b = 0; b < kHeld; ++b)
    if (b < n_basis) store_sum(sums.products[b], place + b);
}

template <class Part, class P, class C>
FW_DEVICE void run_chunk(const VectorOp& call, const Chunk& chunk, double* place) {
  ChunkPointers<P, C> s(call, chunk);
  const Sums sums = walk<Part>(s, call);
  if constexpr (Part::kSums) {
    store_products(sums, s.n_basis, place);
    for (int k = 0; k < kExtraSums; ++k) store_sum(sums.extra[k], place + call.n_basis + k);
    for (int32_t done = kHeld; done < call.n_basis; done += kHeld) {
      s.basis += kHeld * s.stride;
      s.n_basis -= kHeld;
      store_products(walk<Products>(s, call), s.n_basis, place + done);
    }
  }
}

template <class Part, class C>
FW_DEVICE void visit(const VectorOp& call, const Chunk& chunk, double* place) {
  const int32_t dtype = at<TensorSlice>(call.slices)[chunk.row].dtype;
  // float64 tensors have float64 vectors
  if constexpr (sizeof(C) == sizeof(double))
    if (dtype == kFloat64) return run_chunk<Part, double, C>(call, chunk, place);
  if (dtype == kBFloat16) return run_chunk<Part, BFloat16, C>(call, chunk, place);
  if (dtype == kFloat16) return run_chunk<Part, Float16, C>(call, chunk, place);
  return run_chunk<Part, float, C>(call, chunk, place);
}

// the last block to finish adds up the sums of all chunks
FW_DEVICE void finish_sums(const VectorOp& call) {
  int* finished = at<int>(call.finished);
  if (!arrives_last(finished)) return;
  const double* partials = at<double>(call.partials);
  const int64_t width = sum_count(call);
  for (int64_t k = 0; k < width; ++k) {
    double part = 0.0;
    // written by other blocks: bypass L1
    for (int64_t i = threadIdx.x; i < call.n_chunks; i += kThreads) part += __ldcg(partials + i * width + k);
    store_sum(part, at<double>(call.sums) + k);
  }
  if (threadIdx.x == 0) *finished = 0;
}

template <class Part, class C>
__global__ void __launch_bounds__(kThreads, Part::kBlocksPerProcessor)
    vector_kernel(const __grid_constant__ VectorOp call) {
  const int64_t width = sum_count(call);
  for (int64_t i = blockIdx.x; i < call.n_chunks; i += gridDim.x)
    visit<Part, C>(call, at<Chunk>(call.chunks)[i], at<double>(call.partials) + i * width);
  if constexpr (Part::kSums) finish_sums(call);
}

// the host side

template <class Part, class C>
void launch_part(const Launch& how, const VectorOp& call) {
  static std::mutex mutex;
  static std::vector<int64_t> known;
  int64_t resident = 0;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (known.size() <= static_cast<size_t>(how.device)) known.resize(how.device + 1);
    if (known[how.device] == 0) known[how.device] = resident_blocks(vector_kernel<Part, C>, how.device);
    resident = known[how.device];
  }
  launch(vector_kernel<Part, C>, grid(resident, how.max_blocks, call.n_chunks), kThreads, how, call);
}

template <class Part>
void launch_doubles(const Launch& how, const VectorOp& call) {
  if (call.doubles)
    launch_part<Part, double>(how, call);
  else
    launch_part<Part, float>(how, call);
}

}  // namespace

void run_vectors(const Launch& how, const VectorOp& call, int operation) {
  const OnDevice guard(how.device);
  if (operation == kPerturb) return launch_doubles<Perturb>(how, call);
  if (operation == kFinish) return launch_doubles<Finish>(how, call);
  launch_doubles<Combine>(how, call);
}

}  // namespace fw
