// Kernels with a defect each, and correct ones beside them, for test_planted.py. Every block has 128 threads.
// SPDX-License-Identifier: Apache-2.0

#define KERNEL extern "C" __global__ void __launch_bounds__(128)

constexpr int kThreads = 128, kWarp = 32;

__device__ float sum_of_warp(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_down_sync(~0u, x, distance);
  return x;
}

// sums of rows of 128 numbers; each kernel has the barriers that its name lists
enum Barriers { kBoth, kSecond, kFirst, kHalf };

template <Barriers barriers>
__device__ void sum_rows(const float* x, float* y, int n) {
  __shared__ float of_warp[kThreads / kWarp];
  for (int row = blockIdx.x; row < n; row += gridDim.x) {
    const float sum = sum_of_warp(x[row * kThreads + threadIdx.x]);
    if (barriers != kSecond) __syncthreads();
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
    if (barriers == kBoth || barriers == kSecond || (barriers == kHalf && threadIdx.x < 64)) __syncthreads();
    if (threadIdx.x == 0) y[row] = of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3];
  }
}
KERNEL sums_of_rows(const float* x, float* y, int n) { sum_rows<kBoth>(x, y, n); }
KERNEL read_before_all_wrote(const float* x, float* y, int n) { sum_rows<kFirst>(x, y, n); }
KERNEL write_before_all_read(const float* x, float* y, int n) { sum_rows<kSecond>(x, y, n); }
KERNEL barrier_of_half_a_block(const float* x, float* y, int n) { sum_rows<kHalf>(x, y, n); }

// the last block to finish copies what each block wrote by its thread `writer`
template <int writer, bool before, bool after>
__device__ void collect(const float* x, float* part, float* y, int* finished) {
  __shared__ bool last;
  if (threadIdx.x == writer) part[blockIdx.x] = x[blockIdx.x];
  if (threadIdx.x == 0) {
    if (before) __threadfence();
    last = atomicAdd(finished, 1) + 1 == gridDim.x;
    if (after) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < gridDim.x) y[threadIdx.x] = __ldcg(part + threadIdx.x);
}
KERNEL last_block(const float* x, float* part, float* y, int* n) { collect<0, true, true>(x, part, y, n); }
KERNEL no_fence_before(const float* x, float* part, float* y, int* n) {
  collect<0, false, true>(x, part, y, n);
}
KERNEL no_fence_after(const float* x, float* part, float* y, int* n) {
  collect<0, true, false>(x, part, y, n);
}
KERNEL fence_of_another(const float* x, float* part, float* y, int* n) {
  collect<5, true, true>(x, part, y, n);
}

KERNEL write_after_the_fence(const float* x, float* part, float* y, int* finished) {
  if (threadIdx.x == 0) {
    __threadfence();
    part[blockIdx.x] = x[blockIdx.x];
    const bool last = atomicAdd(finished, 1) + 1 == gridDim.x;
    __threadfence();
    if (last)
      for (int i = 0; i < gridDim.x; ++i) y[i] = __ldcg(part + i);
  }
}
KERNEL read_before_the_barrier(const float* x, float* part, float* y, int* finished) {
  if (threadIdx.x == 0) {
    part[blockIdx.x] = x[blockIdx.x];
    __threadfence();
    atomicAdd(finished, 1);
    __threadfence();
  }
  if (threadIdx.x == kWarp && blockIdx.x == gridDim.x - 1) y[0] = __ldcg(part);
}

KERNEL own_elements(float* y) { y[blockIdx.x * kThreads + threadIdx.x] = blockIdx.x; }
KERNEL same_elements(float* y) { y[threadIdx.x] = blockIdx.x; }
KERNEL neighbours(float* y) { y[blockIdx.x * kThreads + threadIdx.x / 2] = threadIdx.x; }
KERNEL read_of_another_block(float* y) {
  y[blockIdx.x * kThreads + threadIdx.x] = y[(blockIdx.x + 1) % gridDim.x * kThreads + threadIdx.x];
}

KERNEL copies_of_one_value(float* y) {
  __shared__ float value;
  value = gridDim.x;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = value;
}
KERNEL several_values(float* y) {
  __shared__ float value;
  value = threadIdx.x / 64;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = value;
}
KERNEL never_written(float* y) {
  __shared__ float written[kThreads];
  if (threadIdx.x < 100) written[threadIdx.x] = 1;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = written[threadIdx.x];
}
KERNEL beyond_the_variable(float* y, int n) {
  __shared__ float written[kThreads];
  written[threadIdx.x + n] = 1;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = written[threadIdx.x + n];
}

KERNEL returned_before_a_barrier(float* y) {
  if (threadIdx.x > 64) return;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = 1;
}
KERNEL shuffle_of_half_a_warp(float* y) {
  float x = threadIdx.x;
  if (threadIdx.x % kWarp < 16) x = __shfl_down_sync(~0u, x, 1);
  y[blockIdx.x * kThreads + threadIdx.x] = x;
}
KERNEL different_shuffles(float* y) {
  float x = threadIdx.x;
  if (threadIdx.x % kWarp < 16)
    x = __shfl_down_sync(~0u, x, 1);
  else
    x = __shfl_xor_sync(~0u, x, 2);
  y[blockIdx.x * kThreads + threadIdx.x] = x;
}
KERNEL part_of_a_warp(float* y) {
  float x = threadIdx.x;
  if (threadIdx.x % kWarp < 16) x = __shfl_down_sync(0xffff, x, 1);
  y[blockIdx.x * kThreads + threadIdx.x] = x;
}
KERNEL vectors_between_their_places(const float* x, float* y, int n) {
  const float4 v = *reinterpret_cast<const float4*>(x + n + 4 * threadIdx.x);
  y[blockIdx.x * kThreads + threadIdx.x] = v.x + v.w;
}
KERNEL null_pointer(float* y, const float* null) {
  y[blockIdx.x * kThreads + threadIdx.x] = null[threadIdx.x];
}
KERNEL divided_by_zero(float* y, int n) { y[blockIdx.x * kThreads + threadIdx.x] = threadIdx.x / n; }
