// Reads a tensor's data pointer through the DLPack 1 C exchange API, without framework headers. The DLPack
// specification fixes the layout of its structs; only the fields read here are declared.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "table.h"

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

// the DType of a tensor, -1 for any other
inline int32_t dtype_of(const DlTensor& t) {
  constexpr uint8_t kFloat = 2, kBFloat = 4;
  if (t.dtype_lanes != 1) return -1;
  if (t.dtype_code == kBFloat) return t.dtype_bits == 16 ? kBFloat16 : -1;
  if (t.dtype_code != kFloat) return -1;
  return t.dtype_bits == 32 ? kFloat32 : t.dtype_bits == 64 ? kFloat64 : t.dtype_bits == 16 ? kFloat16 : -1;
}

// the extent of a contiguous tensor that is not empty; the dtype -1 for any other
inline TensorExtent extent_of(const DlTensor& t) {
  int64_t numel = 1;
  bool contiguous = true;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    contiguous = contiguous && (t.shape[d] == 1 || t.strides[d] == numel);
    numel *= t.shape[d];
  }
  TensorExtent extent = {};
  extent.dtype = contiguous && numel > 0 ? dtype_of(t) : -1;
  extent.address = reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
  extent.numel = numel;
  extent.reach = numel * (t.dtype_bits / 8);
  extent.ndim = t.ndim;
  extent.device_type = t.device_type;
  extent.device_id = t.device_id;
  return extent;
}

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
