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

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

// for the tests to read
extern "C" {
__attribute__((visibility("default"))) inline int cuda_on_host_device = 0;
__attribute__((visibility("default"))) inline int cuda_on_host_launches = 0;
// makes launches in place of the fibers, where a test sets it: kernel, blocks, threads, and the number of
// parameters, their copies and their sizes; returns an error
__attribute__((visibility("default"))) inline int (*cuda_on_host_launcher)(const void*, unsigned, unsigned,
                                                                           int, void* const*,
                                                                           const size_t*) = nullptr;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_host_device;
  return cudaSuccess;
}
// there are two devices
inline cudaError_t cudaSetDevice(int device) {
  if (device > 1) return cudaErrorInvalidDevice;
  cuda_on_host_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidDevice"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
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
