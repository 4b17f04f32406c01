// Shared by all CUDA kernels: accesses of 16 bytes, sums over a block of one size, launches on a stream.
// Included once per translation unit. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../check.h"
#include "../dtypes.h"

#define FW_DEVICE __device__ __forceinline__

namespace fw {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

// the type that parameters of type T are updated in
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
// elements that a thread takes at a time
template <class T>
constexpr int kPack = kVectorBytes / sizeof(T);

// N elements, in accesses of 16 bytes if they are a multiple of that
template <int N, class T>
FW_DEVICE void load(const T* from, T (&to)[N]) {
  if constexpr (N * sizeof(T) % kVectorBytes == 0) {
    uint4 words[N * sizeof(T) / kVectorBytes];
    for (int i = 0; i < int(N * sizeof(T) / kVectorBytes); ++i)
      words[i] = *global(reinterpret_cast<const uint4*>(from) + i);
    memcpy(to, words, sizeof words);
  } else {
    for (int i = 0; i < N; ++i) to[i] = *global(from + i);
  }
}

template <int N, class T>
FW_DEVICE void store(const T (&from)[N], T* to) {
  if constexpr (N * sizeof(T) % kVectorBytes == 0) {
    uint4 words[N * sizeof(T) / kVectorBytes];
    memcpy(words, from, sizeof words);
    for (int i = 0; i < int(N * sizeof(T) / kVectorBytes); ++i)
      *global(reinterpret_cast<uint4*>(to) + i) = words[i];
  } else {
    for (int i = 0; i < N; ++i) *global(to + i) = from[i];
  }
}

template <int N, class C, class T>
FW_DEVICE void widen_all(const T* from, C (&to)[N]) {
  for (int i = 0; i < N; ++i) to[i] = static_cast<C>(widen(from[i]));
}

// the sums over `width` neighbouring threads of a warp, in the first of them
template <int N>
FW_DEVICE void group_sum(double (&sums)[N], int32_t width) {
#pragma unroll 1
  for (int32_t distance = width / 2; distance > 0; distance /= 2)
    for (int k = 0; k < N; ++k) sums[k] += __shfl_down_sync(~0u, sums[k], distance);
}

// the sums over a block, in all of its threads
template <int N>
FW_DEVICE void share_block_sum(double (&sums)[N]) {
  __shared__ double of_warp[kThreads / kWarp][N];
  group_sum(sums, kWarp);
  // other threads may still read the previous sums
  __syncthreads();
  for (int k = 0; k < N; ++k)
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][k] = sums[k];
  __syncthreads();
  for (int k = 0; k < N; ++k) {
    sums[k] = 0.0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sums[k] += of_warp[warp][k];
  }
}

// True in all threads of the last block to finish, which sees what thread 0 of each other block has written,
// and its other threads before their last barrier. A kernel calls it once.
FW_DEVICE bool arrives_last(int32_t* finished) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1) + 1 == static_cast<int32_t>(gridDim.x);
    __threadfence();
  }
  __syncthreads();
  return last;
}

// the host side

class OnDevice {
 public:
  explicit OnDevice(int device) {
    FW_CUDA_CHECK(cudaGetDevice(&before_));
    if (device != before_) FW_CUDA_CHECK(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// blocks of a kernel that the current device runs at a time; the query loads the kernel
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int device) {
  int processors = 0, blocks = 0;
  FW_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  FW_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  return int64_t(processors) * blocks;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  FW_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  FW_CUDA_CHECK(cudaGetLastError());
}

// blocks to launch for so many chunks, each of which takes as many chunks as the others or one less;
// max_blocks bounds them, 0 for as many as run at a time
inline int64_t grid(int64_t resident, int64_t max_blocks, int64_t n_chunks) {
  const int64_t most = max_blocks > 0 ? max_blocks : resident;
  if (n_chunks <= most || most < 1) return n_chunks > 0 ? n_chunks : 1;
  const int64_t each = (n_chunks + most - 1) / most;
  return (n_chunks + each - 1) / each;
}

}  // namespace
}  // namespace fw
