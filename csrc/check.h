// Checks that throw; pybind11 turns the exception into a Python one at the boundary of our own module.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdexcept>
#include <string>

#define FW_CHECK(condition, message)                          \
  do {                                                        \
    if (!(condition)) throw std::invalid_argument((message)); \
  } while (0)

// for sources that include the CUDA runtime
#define FW_CUDA_CHECK(call)                                                                         \
  do {                                                                                              \
    const cudaError_t error_of_call = (call);                                                       \
    if (error_of_call != cudaSuccess)                                                               \
      throw std::runtime_error(std::string(#call) + ": " + cudaGetErrorName(error_of_call) + ", " + \
                               cudaGetErrorString(error_of_call));                                  \
  } while (0)
