// What all CUDA kernels share: accesses of 16 bytes, blocks of one size, launches on a stream. Included once
// per translation unit. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../check.h"
#include "../dtypes.h"

#define FW_DEVICE __device__ __forceinline__

namespace fw {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

// the type of the arithmetic beside a stored one, and the elements that a thread takes at a time
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
constexpr int kPack = kVectorBytes / sizeof(T);

// N elements in accesses of 16 bytes where they fill them
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

// blocks of a kernel that the current device runs at a time; asking loads the kernel
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

int64_t grid(int64_t resident, int64_t max_blocks, int64_t n_chunks) {
  if (max_blocks > 0) resident = max_blocks;
  if (resident > n_chunks) resident = n_chunks;
  return resident > 0 ? resident : 1;
}

}  // namespace
}  // namespace fw
