// Where a framework's tensor lies, asked through the DLPack 1 exchange API: no framework header is needed.
// Only what is read here is declared; the layout of these structs is fixed by the DLPack specification.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "hd.h"

namespace fw {

struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  DlExchange* previous;
  void *allocate, *from_object, *to_object;
  int (*describe)(void* object, DlTensor* out);
  void* current_stream;
};

// what must stay as it was for a row of the table to describe a tensor: everything but the address
struct Form {
  DlTensor head;
  std::vector<int64_t> shape, strides;

  explicit Form(const DlTensor& t) : head(t), shape(t.shape, t.shape + t.ndim), strides(t.ndim) {
    for (int32_t d = 0; d < t.ndim; ++d) strides[d] = t.strides[d];
  }

  bool fits(const DlTensor& t) const {
    if (t.ndim != head.ndim || t.dtype_code != head.dtype_code || t.dtype_bits != head.dtype_bits ||
        t.dtype_lanes != head.dtype_lanes || t.device_type != head.device_type ||
        t.device_id != head.device_id)
      return false;
    // the stride of a dimension of one element says nothing
    for (int32_t d = 0; d < t.ndim; ++d)
      if (t.shape[d] != shape[d] || (shape[d] != 1 && t.strides[d] != strides[d])) return false;
    return true;
  }

  bool empty() const {
    for (int64_t n : shape)
      if (n == 0) return true;
    return false;
  }
};

}  // namespace fw
