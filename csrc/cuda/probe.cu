// Whether this build runs on a device: driver, architectures and toolkit must fit together.
// SPDX-License-Identifier: Apache-2.0
#include "device.h"

namespace fw {
namespace {

#define FW_ENTRY(Rule) &cuda_##Rule,
constexpr const CudaKernels* kRules[] = {FW_RULES(FW_ENTRY)};
#undef FW_ENTRY

std::string version(int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); }

// versions as the runtime numbers them
std::string version(int number) { return version(number / 1000, number % 1000 / 10); }

// calls that fail here leave out what they would tell
std::string describe(int device, const char* built_for) {
  int toolkit = 0, driver = 0, major = 0, minor = 0;
  cudaRuntimeGetVersion(&toolkit);
  cudaDriverGetVersion(&driver);
  std::string text = "The extension was built with CUDA " + version(toolkit) + " for compute capability " +
                     built_for +
                     (driver ? "; the driver supports CUDA " + version(driver) : "; there is no driver");
  if (device >= 0 &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    text += "; cuda:" + std::to_string(device) + " has compute capability " + version(major, minor);
  cudaGetLastError();
  return text;
}

}  // namespace

std::string probe(int device, const char* built_for) {
  try {
    if (device < 0) {
      int count = 0;
      check_cuda("cudaGetDeviceCount", cudaGetDeviceCount(&count));
    } else {
      const OnDevice guard(device);
      cudaFuncAttributes attributes;
      check_cuda("cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, kRules[0]->kernel));
    }
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) + ". " + describe(device, built_for);
  }
  return "";
}

}  // namespace fw
