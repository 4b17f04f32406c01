// Reads a tensor's data pointer through the DLPack 1 C exchange API, without framework headers. The DLPack
// specification fixes the layout of its structs; only the fields read here are declared.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "platform.h"

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

// everything that a row of the table depends on, except the address: device, dtype, shape and strides
struct Signature {
  int32_t device_type, device_id, ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  bool empty;
};

// the signatures of many tensors, with all their shapes and strides in one array
class SignatureList {
 public:
  void add(const DlTensor& t) {
    Signature signature{t.device_type, t.device_id, t.ndim, t.dtype_code, t.dtype_bits, t.dtype_lanes, false};
    first_.push_back(dims_.size());
    for (int32_t d = 0; d < t.ndim; ++d) {
      signature.empty = signature.empty || t.shape[d] == 0;
      dims_.push_back(t.shape[d]);
      dims_.push_back(t.strides[d]);
    }
    signatures_.push_back(signature);
  }

  // the address of a tensor of signature i, or 1 if it is empty; 0 for a tensor of another signature
  uint64_t address(size_t i, const DlTensor& t) const {
    const Signature& signature = signatures_[i];
    if (t.ndim != signature.ndim || t.dtype_code != signature.dtype_code ||
        t.dtype_bits != signature.dtype_bits || t.dtype_lanes != signature.dtype_lanes ||
        t.device_type != signature.device_type || t.device_id != signature.device_id)
      return 0;
    const int64_t* dims = dims_.data() + first_[i];
    // the stride of a dimension of one element is arbitrary
    for (int32_t d = 0; d < t.ndim; ++d)
      if (t.shape[d] != dims[2 * d] || (t.shape[d] != 1 && t.strides[d] != dims[2 * d + 1])) return 0;
    return signature.empty ? 1 : reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
  }

  size_t size() const { return signatures_.size(); }

 private:
  std::vector<Signature> signatures_;
  std::vector<size_t> first_;
  std::vector<int64_t> dims_;
};

}  // namespace fw
