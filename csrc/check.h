// Checks that throw; pybind11 turns the exception into a Python one at the boundary of our own module.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdexcept>
#include <string>

#define FW_CHECK(condition, message)                          \
  do {                                                        \
    if (!(condition)) throw std::invalid_argument((message)); \
  } while (0)
