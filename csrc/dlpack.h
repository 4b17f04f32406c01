// Where a framework's tensor lies, asked through the DLPack 1 exchange API: no framework header is needed.
// Only what is read here is declared; the layout of these structs is fixed by the DLPack specification.
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

// what must stay as it was for a row of the table to describe a tensor: everything but the address
struct Form {
  int32_t device_type, device_id, ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  bool empty;
};

// the forms of many tensors, with all their shapes and strides in one stretch of memory
class FormList {
 public:
  void add(const DlTensor& t) {
    Form form{t.device_type, t.device_id, t.ndim, t.dtype_code, t.dtype_bits, t.dtype_lanes, false};
    first_.push_back(dims_.size());
    for (int32_t d = 0; d < t.ndim; ++d) {
      form.empty = form.empty || t.shape[d] == 0;
      dims_.push_back(t.shape[d]);
      dims_.push_back(t.strides[d]);
    }
    forms_.push_back(form);
  }

  // the address of a tensor that has form i: 1 if it is empty, 0 if it has another form
  uint64_t address(size_t i, const DlTensor& t) const {
    const Form& form = forms_[i];
    if (t.ndim != form.ndim || t.dtype_code != form.dtype_code || t.dtype_bits != form.dtype_bits ||
        t.dtype_lanes != form.dtype_lanes || t.device_type != form.device_type ||
        t.device_id != form.device_id)
      return 0;
    const int64_t* dims = dims_.data() + first_[i];
    // the stride of a dimension of one element says nothing
    for (int32_t d = 0; d < t.ndim; ++d)
      if (t.shape[d] != dims[2 * d] || (t.shape[d] != 1 && t.strides[d] != dims[2 * d + 1])) return 0;
    return form.empty ? 1 : reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
  }

  size_t size() const { return forms_.size(); }

 private:
  std::vector<Form> forms_;
  std::vector<size_t> first_;
  std::vector<int64_t> dims_;
};

}  // namespace fw
