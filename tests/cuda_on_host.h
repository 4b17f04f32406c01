// Lets a host compiler build csrc/cuda as it is and run its kernels: included before them, it stands in for
// the CUDA headers. The threads of a block are fibers that take turns at every barrier and shuffle; blocks
// run one after another. CUDA_ON_HOST_ORDER=backwards turns the order of blocks and threads around.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// one block runs at a time
#define __shared__ static

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned n = 1) : x(n) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

// the arguments of a kernel lie on the stack of each of its threads
constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool entered = false;
  std::unique_ptr<char[]> stack;
};

class Block {
 public:
  void run(unsigned threads, bool backwards, const std::function<void()>& body) {
    while (fibers_.size() < threads) add_fiber();
    size_ = threads, body_ = &body, backwards_ = backwards, finished_ = 0, turn_ = 0;
    threadIdx.x = thread();
    change(outside_, fibers_[turn_]);
    check(finished_ == size_);
  }

  // lets every other thread come to the same place
  void meet() {
    const unsigned mine = turn_;
    // a thread that has returned would never come
    check(finished_ == 0);
    pass(mine, (mine + 1) % size_);
  }

  // the value that another thread brings to the same call; two buffers, since some may still read the first
  template <class T>
  T exchange(T value, unsigned from) {
    static T brought[2][1024];
    const unsigned mine = threadIdx.x;
    side_of_[mine] ^= 1;
    const unsigned side = side_of_[mine];
    brought[side][mine] = value;
    meet();
    return brought[side][from];
  }

 private:
  static void check(bool met) {
    if (met) return;
    std::fputs("cuda_on_host: the threads of a block must all come to the same barriers\n", stderr);
    std::abort();
  }

  unsigned thread() const { return backwards_ ? size_ - 1 - turn_ : turn_; }

  void pass(unsigned mine, unsigned next) {
    turn_ = next;
    threadIdx.x = thread();
    change(fibers_[mine], fibers_[next]);
    turn_ = mine;
    threadIdx.x = thread();
  }

  // swapcontext spends most of its time in a system call that saves the signal mask; the sanitizer, however,
  // supports it and not jumps between stacks
  static void change(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.context, &to.context);
#else
    if (_setjmp(from.place) != 0) return;
    from.entered = true;
    if (to.entered) _longjmp(to.place, 1);
    setcontext(&to.context);
#endif
  }

  void add_fiber() {
    // contexts must not move
    if (fibers_.capacity() == 0) fibers_.reserve(1024);
    Fiber& fiber = fibers_.emplace_back();
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, live, 0);
  }

  // a fiber is one thread of every block after another
  static void live();

  void live_once() {
    const unsigned mine = turn_;
    (*body_)();
    finished_ += 1;
    check(mine + 1 == finished_);
    if (finished_ < size_)
      pass(mine, mine + 1);
    else
      change(fibers_[mine], outside_);
  }

  std::vector<Fiber> fibers_;
  Fiber outside_;
  unsigned size_ = 0, turn_ = 0, finished_ = 0;
  unsigned char side_of_[1024] = {};
  bool backwards_ = false;
  const std::function<void()>* body_ = nullptr;
};

inline Block block;
inline std::mutex device;

inline void Block::live() {
  for (;;) block.live_once();
}

inline void launch(dim3 grid, dim3 threads, const std::function<void()>& body) {
  const char* order = std::getenv("CUDA_ON_HOST_ORDER");
  const bool backwards = order && std::strcmp(order, "backwards") == 0;
  std::lock_guard<std::mutex> lock(device);
  gridDim = grid, blockDim = threads;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx.x = backwards ? grid.x - 1 - i : i;
    block.run(threads.x, backwards, body);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::block.meet(); }
inline void __threadfence() {}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_host::block.exchange(value, threadIdx.x + (lane + distance < 32 ? distance : 0));
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

// name, number as CUDA numbers it, text
#define CUDA_ON_HOST_ERRORS(X)                                                                           \
  X(cudaSuccess, 0, "no error")                                                                          \
  X(cudaErrorInvalidValue, 1, "invalid argument")                                                        \
  X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version")     \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                        \
  X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                               \
  X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution on the device")    \
  X(cudaErrorUnsupportedPtxVersion, 222, "the provided PTX was compiled with an unsupported toolchain.") \
  X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                                      \
  X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                            \
  X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")                       \
  X(cudaErrorLaunchTimeout, 702, "the launch timed out and was terminated")                              \
  X(cudaErrorAssert, 710, "device-side assert triggered")                                                \
  X(cudaErrorHardwareStackError, 714, "hardware stack error")                                            \
  X(cudaErrorLaunchFailure, 719, "unspecified launch failure")

enum cudaError_t {
#define CUDA_ON_HOST_NUMBER(name, number, text) name = number,
  CUDA_ON_HOST_ERRORS(CUDA_ON_HOST_NUMBER)
#undef CUDA_ON_HOST_NUMBER
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
struct cudaFuncAttributes {};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
constexpr unsigned long long cudaEnableDefault = 0;
#define CUDART_VERSION 13000

#define CUDA_ON_HOST_VISIBLE __attribute__((visibility("default"), used)) inline
// one for all sources of a library; an inline variable would be one for all libraries of a process
#define CUDA_ON_HOST_VARIABLE __attribute__((visibility("default"), weak))

// for the tests to read
extern "C" {
// the current device as other libraries see it, which have never set one
CUDA_ON_HOST_VARIABLE int cuda_on_host_device = 0;
CUDA_ON_HOST_VARIABLE int cuda_on_host_launches = 0;
// which devices have a primary context
CUDA_ON_HOST_VARIABLE int cuda_on_host_contexts[2] = {};
// blocks that a processor has room for
CUDA_ON_HOST_VARIABLE int cuda_on_host_blocks = 2;
// what there is: compute capability of each device, and the version of the driver
CUDA_ON_HOST_VARIABLE int cuda_on_host_capability[2] = {90, 90};
CUDA_ON_HOST_VARIABLE int cuda_on_host_driver = CUDART_VERSION;
// makes launches in place of the fibers, where a test sets it: kernel, blocks, threads, and the number of
// parameters, their copies and their sizes; returns an error
CUDA_ON_HOST_VARIABLE int (*cuda_on_host_launcher)(const void*, unsigned, unsigned, int, void* const*,
                                                   const size_t*) = nullptr;
}

namespace cuda_on_host {

// the least compute capability that the kernels are built for
constexpr int kLeastCapability = 75;

// the state of the runtime: its last error, the error that spoils a context for good, the device that this
// runtime was told, the context of the thread (none: -1), and a failure to come
struct Runtime {
  cudaError_t last = cudaSuccess, sticky = cudaSuccess;
  int device = 0, context = -1;
  std::string failing;
  int calls_before = 0;
  cudaError_t failure = cudaSuccess;

  cudaError_t fail(cudaError_t error) {
    if (error >= cudaErrorHardwareStackError || error == cudaErrorIllegalAddress) sticky = error;
    return last = error;
  }

  // what a call returns before it does anything
  cudaError_t enter(const char* call) {
    if (cuda_on_host_driver < CUDART_VERSION / 1000 * 1000) return fail(cudaErrorInsufficientDriver);
    if (sticky != cudaSuccess) return fail(sticky);
    if (failing != call || calls_before-- > 0) return cudaSuccess;
    failing.clear();
    return fail(failure);
  }

  void set_context(int of) {
    context = of;
    if (of >= 0) cuda_on_host_contexts[of] = 1;
    cuda_on_host_device = of < 0 ? 0 : of;
  }

  int current() const { return context < 0 ? device : context; }

  // of calls that need a context and a kernel
  cudaError_t enter_kernel(const char* call) {
    if (const cudaError_t error = enter(call)) return error;
    set_context(current());
    return cuda_on_host_capability[current()] < kLeastCapability ? fail(cudaErrorNoKernelImageForDevice)
                                                                 : cudaSuccess;
  }
};
inline Runtime runtime;

}  // namespace cuda_on_host

extern "C" {
// lets a call of the runtime fail after some that work
CUDA_ON_HOST_VISIBLE void cuda_on_host_fail(const char* call, int after, int error) {
  cuda_on_host::runtime.failing = call;
  cuda_on_host::runtime.calls_before = after;
  cuda_on_host::runtime.failure = cudaError_t(error);
}
// as in a new process, with a context on one device, or on none for -1
CUDA_ON_HOST_VISIBLE void cuda_on_host_reset(int device) {
  cuda_on_host::runtime = {};
  for (int i = 0; i < 2; ++i) cuda_on_host_contexts[i] = 0, cuda_on_host_capability[i] = 90;
  cuda_on_host_driver = CUDART_VERSION, cuda_on_host_blocks = 2;
  cuda_on_host::runtime.set_context(device);
}
// contexts are addresses of their flags
CUDA_ON_HOST_VISIBLE int cuda_on_host_get(void** context) {
  const int device = cuda_on_host::runtime.context;
  *context = device < 0 ? nullptr : cuda_on_host_contexts + device;
  return 0;
}
inline int cuda_on_host_set(void* context) {
  cuda_on_host::runtime.set_context(context ? int(static_cast<int*>(context) - cuda_on_host_contexts) : -1);
  return 0;
}
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                                    unsigned long long) {
  if (const cudaError_t error = cuda_on_host::runtime.enter("cudaGetDriverEntryPointByVersion")) return error;
  *found = nullptr;
  if (!std::strcmp(name, "cuCtxGetCurrent")) *found = reinterpret_cast<void*>(cuda_on_host_get);
  if (!std::strcmp(name, "cuCtxSetCurrent")) *found = reinterpret_cast<void*>(cuda_on_host_set);
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_on_host_driver;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  if (const cudaError_t error = cuda_on_host::runtime.enter("cudaGetDeviceCount")) return error;
  *count = 2;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = cuda_on_host::runtime.enter("cudaGetDevice")) return error;
  *device = cuda_on_host::runtime.current();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = cuda_on_host::runtime.enter("cudaSetDevice")) return error;
  if (device > 1) return cuda_on_host::runtime.fail(cudaErrorInvalidDevice);
  cuda_on_host::runtime.device = device;
  cuda_on_host::runtime.set_context(device);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_host::runtime.last;
  cuda_on_host::runtime.last = cuda_on_host::runtime.sticky;
  return error;
}
// calls of other code
extern "C" {
CUDA_ON_HOST_VISIBLE int cuda_on_host_last_error() { return cudaGetLastError(); }
CUDA_ON_HOST_VISIBLE int cuda_on_host_count() {
  int count = 0;
  return cudaGetDeviceCount(&count);
}
}
inline const char* cudaGetErrorName(cudaError_t error) {
#define CUDA_ON_HOST_NAME(name, number, text) \
  if (error == name) return #name;
  CUDA_ON_HOST_ERRORS(CUDA_ON_HOST_NAME)
#undef CUDA_ON_HOST_NAME
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
#define CUDA_ON_HOST_TEXT(name, number, text) \
  if (error == name) return text;
  CUDA_ON_HOST_ERRORS(CUDA_ON_HOST_TEXT)
#undef CUDA_ON_HOST_TEXT
  return "unrecognized error code";
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = cuda_on_host::runtime.enter("cudaDeviceGetAttribute")) return error;
  *value = 2;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = cuda_on_host_capability[device] / 10;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = cuda_on_host_capability[device] % 10;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  if (!kernel) return cuda_on_host::runtime.fail(cudaErrorInvalidValue);
  return cuda_on_host::runtime.enter_kernel("cudaFuncGetAttributes");
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  const char* call = "cudaOccupancyMaxActiveBlocksPerMultiprocessor";
  if (const cudaError_t error = cuda_on_host::runtime.enter_kernel(call)) return error;
  *blocks = cuda_on_host_blocks;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (const cudaError_t error = cuda_on_host::runtime.enter_kernel("cudaLaunchKernelEx")) return error;
  cuda_on_host_launches += 1;
  if (cuda_on_host_launcher) {
    std::tuple<std::remove_const_t<Parameters>...> copies{arguments...};
    return std::apply(
        [&](auto&... copy) {
          void* const addresses[] = {&copy...};
          const size_t sizes[] = {sizeof copy...};
          const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
          return cudaError_t(cuda_on_host_launcher(reinterpret_cast<const void*>(kernel), blocks, threads,
                                                   int(sizeof...(copy)), addresses, sizes));
        },
        copies);
  }
  cuda_on_host::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
