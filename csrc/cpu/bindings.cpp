// Python module fused_warmup._cpu: addresses in, nothing out. The GIL is released while the kernels run.
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "../check.h"
#include "../exchange.h"
#include "../rules.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

const fw::Kernels* const kAll[] = {
    &fw::kernels_baseline,
#if defined(FW_X86_64)
    &fw::kernels_avx2,
    &fw::kernels_avx512,
#endif
};
constexpr int kCount = sizeof kAll / sizeof kAll[0];

#define FW_NAME(Rule) #Rule,
const char* const kRules[] = {FW_RULES(FW_NAME)};
#undef FW_NAME
constexpr int kRuleCount = sizeof kRules / sizeof kRules[0];

// names of the instruction sets that this machine runs, narrowest first
py::tuple instruction_sets() {
  py::list names;
  for (const fw::Kernels* kernels : kAll)
    if (kernels->supported()) names.append(kernels->isa);
  return py::tuple(names);
}

py::tuple rules() {
  py::list names;
  for (const char* name : kRules) names.append(name);
  return py::tuple(names);
}

void step(int isa, int rule, std::uintptr_t address, int threads) {
  FW_CHECK(isa >= 0 && isa < kCount && kAll[isa]->supported(),
           "isa must be an index into instruction_sets()");
  FW_CHECK(rule >= 0 && rule < kRuleCount, "rule must be an index into rules()");
  FW_CHECK(address != 0, "address must be that of a Step");
  FW_CHECK(threads > 0, "threads must be at least 1");
  py::gil_scoped_release release;
  kAll[isa]->steps[rule](*fw::at<const fw::Step>(address), threads);
}

// offset and size of every field of every shared struct, and the size of the struct under the empty name
py::dict layout() {
  py::dict structs;
#define FW_FIELD(type, name, offset) fields[#name] = py::make_tuple(offset, sizeof(type));
#define FW_DESCRIBE(Struct, FIELDS)                     \
  {                                                     \
    py::dict fields;                                    \
    FIELDS(FW_FIELD)                                    \
    fields[""] = py::make_tuple(0, sizeof(fw::Struct)); \
    structs[#Struct] = fields;                          \
  }
  FW_STRUCTS(FW_DESCRIBE)
#undef FW_DESCRIBE
#undef FW_FIELD
  return structs;
}

// The forms of some tensors, and where tensors of those forms lie now.
class Forms {
 public:
  Forms(py::handle tensor_type, py::handle parameter_type, py::list tensors)
      : tensor_type_(tensor_type.ptr()), parameter_type_(parameter_type.ptr()) {
    py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    exchange_ = static_cast<fw::DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (exchange_ && exchange_->major != 1) exchange_ = exchange_->previous;
    FW_CHECK(exchange_ && exchange_->describe,
             "the exchange API must be of DLPack 1 with a describing function");
    for (py::handle tensor : tensors) {
      fw::DlTensor head;
      if (exchange_->describe(tensor.ptr(), &head) != 0) throw py::error_already_set();
      forms_.emplace_back(head);
    }
  }

  // Writes the address of every tensor, or of its gradient: 0 for None and 1 for an empty one. Returns the
  // positions of those that are of another type or form, whose address is 0. Gradients are kept alive until
  // release(), because another thread may replace them while a step reads them without the GIL.
  py::list read(py::list tensors, std::uintptr_t out, bool grads) {
    FW_CHECK(tensors.size() == forms_.size(), "tensors must be as many as the forms");
    uint64_t* addresses = fw::at<uint64_t>(out);
    py::list odd;
    release();
    for (size_t i = 0; i < forms_.size(); ++i) {
      py::object tensor = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(tensors.ptr(), i));
      if (grads) tensor = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), grad_name_.ptr()));
      if (!tensor) throw py::error_already_set();
      addresses[i] = tensor.is_none() ? 0 : address_of(tensor.ptr(), forms_[i]);
      if (addresses[i] == 0 && !tensor.is_none()) odd.append(i);
      if (grads && addresses[i] != 0) kept_.push_back(std::move(tensor));
    }
    return odd;
  }

  void release() { kept_.clear(); }

 private:
  // 0 for a tensor of another form, a null address included
  uint64_t address_of(PyObject* tensor, const fw::Form& form) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (type != tensor_type_ && type != parameter_type_) return 0;
    fw::DlTensor t;
    if (exchange_->describe(tensor, &t) != 0) {
      PyErr_Clear();
      return 0;
    }
    if (!form.fits(t)) return 0;
    return form.empty() ? 1 : reinterpret_cast<uint64_t>(t.data) + t.byte_offset;
  }

  // torch keeps its two types for the life of the process
  PyObject *tensor_type_, *parameter_type_;
  py::str grad_name_{"grad"};
  fw::DlExchange* exchange_ = nullptr;
  std::vector<fw::Form> forms_;
  std::vector<py::object> kept_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fused_warmup.";
  m.def("instruction_sets", &instruction_sets);
  m.def("rules", &rules);
  m.def("layout", &layout);
  m.def("step", &step, py::arg("isa"), py::arg("rule"), py::arg("address"), py::arg("threads"));
  py::class_<Forms>(m, "Forms")
      .def(py::init<py::handle, py::handle, py::list>(), py::arg("tensor_type"), py::arg("parameter_type"),
           py::arg("tensors"))
      .def("read", &Forms::read, py::arg("tensors"), py::arg("out"), py::arg("grads") = false)
      .def("release", &Forms::release);
}
