// Shared by all CUDA kernels: accesses of 16 bytes, sums over a block of one size, launches on a stream.
// Included once per translation unit. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <type_traits>

#include "../check.h"
#include "../dtypes.h"
#include "launch.h"

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

// the widest accesses that so many bytes are a multiple of, 16 or 8 bytes each
template <int kBytes>
using Vector = std::conditional_t<kBytes % kVectorBytes == 0, uint4, uint2>;

// N elements, in accesses of 16 or 8 bytes if they are a multiple of that
template <int N, class T>
FW_DEVICE void load(const T* from, T (&to)[N]) {
  if constexpr (N > 1 && N * sizeof(T) % sizeof(uint2) == 0) {
    using V = Vector<N * sizeof(T)>;
    V words[N * sizeof(T) / sizeof(V)];
    for (int i = 0; i < int(N * sizeof(T) / sizeof(V)); ++i)
      words[i] = *global(reinterpret_cast<const V*>(from) + i);
    memcpy(to, words, sizeof words);
  } else {
    for (int i = 0; i < N; ++i) to[i] = *global(from + i);
  }
}

template <int N, class T>
FW_DEVICE void store(const T (&from)[N], T* to) {
  if constexpr (N > 1 && N * sizeof(T) % sizeof(uint2) == 0) {
    using V = Vector<N * sizeof(T)>;
    V words[N * sizeof(T) / sizeof(V)];
    memcpy(words, from, sizeof words);
    for (int i = 0; i < int(N * sizeof(T) / sizeof(V)); ++i) *global(reinterpret_cast<V*>(to) + i) = words[i];
  } else {
    for (int i = 0; i < N; ++i) *global(to + i) = from[i];
  }
}

template <int N, class C, class T>
FW_DEVICE void widen_all(const T* from, C (&to)[N]) {
  for (int i = 0; i < N; ++i) to[i] = static_cast<C>(widen(from[i]));
}

// a number that the compiler does not know to be the same, so that it computes anew what depends on it rather
// than keep it in registers
FW_DEVICE uint32_t forgotten(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
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

// whether an error is that of a kernel that ran, which any later call reports
inline bool is_of_a_kernel(cudaError_t error) {
  return error == cudaErrorIllegalAddress || error == cudaErrorLaunchTimeout || error == cudaErrorAssert ||
         (error >= cudaErrorHardwareStackError && error <= cudaErrorLaunchFailure);
}

inline std::string explain(const char* call, cudaError_t error) {
  std::string text = std::string(call) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  if (is_of_a_kernel(error))
    text +=
        ". A kernel that was launched earlier failed, perhaps one of another library; "
        "CUDA_LAUNCH_BLOCKING=1 shows which";
  return text;
}

// Throws for a call that failed. The runtime is linked statically, so that nobody else reads its last error:
// it is cleared here, and a launch is judged by what it returns.
inline void check_cuda(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(explain(call, error));
}
#define FW_CUDA_CHECK(call) check_cuda(#call, call)

// a function of the driver, which the library is not linked with
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
#if CUDART_VERSION >= 12050
  // the version that introduced contexts of a thread
  check_cuda(name, cudaGetDriverEntryPointByVersion(name, &found, 4000, cudaEnableDefault));
#else
  check_cuda(name, cudaGetDriverEntryPoint(name, &found, cudaEnableDefault));
#endif
  if (!found) throw std::runtime_error(std::string("the CUDA driver must have ") + name + ", got none");
  return reinterpret_cast<Function*>(found);
}

// Makes a device the current one of this thread, and restores the context that was current before, or that
// there was none. cudaSetDevice on the way back would make a context on a device that had none.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    int current = 0;
    // where this fails, the next call fails too and has a name for the error
    functions().get(&before_);
    FW_CUDA_CHECK(cudaGetDevice(&current));
    // without a context the next call would make one and leave it current
    changed_ = before_ == nullptr || device != current;
    if (changed_) FW_CUDA_CHECK(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (changed_) functions().set(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  // CUresult and CUcontext are of a header that is not needed otherwise
  struct Functions {
    int (*get)(void**) = driver_function<int(void**)>("cuCtxGetCurrent");
    int (*set)(void*) = driver_function<int(void*)>("cuCtxSetCurrent");
  };
  // looked up once; an exception leaves it to the next call
  static const Functions& functions() {
    static const Functions found;
    return found;
  }

  void* before_ = nullptr;
  bool changed_ = false;
};

// Blocks of a kernel that the current device runs at a time. The query loads the kernel and fails where a
// launch would, so that a step which has asked for all of its kernels either queues all launches or none:
// what remains are errors of a device that no later call can use either.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int device, int threads = kThreads) {
  int processors = 0, blocks = 0;
  FW_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  FW_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  if (blocks < 1)
    throw std::runtime_error("device " + std::to_string(device) + " must have room for a block of " +
                             std::to_string(threads) + " threads, got none");
  return int64_t(processors) * blocks;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Launch& how,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(how.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) {
    how.queued += 1;
    return;
  }
  cudaGetLastError();
  const std::string done = how.queued
                               ? std::to_string(how.queued) +
                                     " launches of this call were queued before, so that parameters and "
                                     "states may be updated in part"
                               : "no launch of this call was queued, so that nothing is changed";
  throw std::runtime_error(explain("cudaLaunchKernelEx", error) + "; " + done);
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
