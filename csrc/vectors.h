// The vector operations of a sharpness measurement: the statements per element, once for the CPU and CUDA.
// fused_warmup/sharpness/vectors.py has the same in plain PyTorch.
//   perturb   param = value + size * scale * v                      v: the last basis vector; factors: size
//   finish    out = scale * (plus - minus), param = snapshot        factors: size, as for perturb
//   combine   out = keep * out + sum of coefficient * basis vector  factors: keep, coefficients
// finish and combine also sum the product of out with every basis vector, and two more numbers: combine the
// squares of out and of scale * out; finish, for rounded parameters, the squared distance between both ends
// and its product with the difference of the gradients. A value is that of the snapshot with its residue;
// sums are rounded to nearest, in every rounding mode. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "dtypes.h"
#include "rounding.h"
#include "table.h"

namespace fw {

enum Operation : int32_t { kPerturb = 0, kFinish = 1, kCombine = 2, kOperations = 3 };

// number of sums besides the products with basis vectors
constexpr int kExtraSums = 2;

FW_HOST_DEVICE int64_t sum_count(const VectorOp& call) { return call.n_basis + kExtraSums; }

template <class C>
FW_HOST_DEVICE C displaced(C value, C size, C scale, C v) {
  return multiply_add(size, scale * v, value);
}

template <class P, class C>
FW_HOST_DEVICE P stored(C value) {
  P out;
  if constexpr (sizeof(P) == sizeof(double)) {
    out = value;
  } else {
    narrow(static_cast<float>(value), out);
  }
  return out;
}

// distance of a rounded parameter between the two ends of a difference
template <class P, class C>
FW_HOST_DEVICE C moved(C from, C size, C scale, C v) {
  C ahead = static_cast<C>(widen(stored<P>(displaced(from, size, scale, v))));
  C behind = static_cast<C>(widen(stored<P>(displaced(from, -size, scale, v))));
  return ahead - behind;
}

template <class C>
FW_HOST_DEVICE void accumulate_product(double& sum, C a, C b) {
  sum = multiply_add(static_cast<double>(a), static_cast<double>(b), sum);
}

}  // namespace fw
