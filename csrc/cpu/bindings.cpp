// Python module fused_warmup._cpu: the step, which takes the address of a Step and runs without the GIL, and
// the checks that the addresses in the table are still those of the tensors. SPDX-License-Identifier:
// Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../check.h"
#include "../dlpack.h"
#include "../rules.h"
#include "../vectors.h"
#include "step.h"

namespace py = pybind11;

namespace {

// the kernels of one instruction set
struct Compiled {
  const fw::Kernels* kernels;
  const fw::VectorFunction* vectors;
  const fw::PreconditionerFunction* const* preconditioners;
  const fw::StreamFunction* stream;
};

#define FW_COMPILED(isa) \
  {&fw::kernels_##isa, &fw::vectors_##isa, &fw::preconditioners_##isa, &fw::stream_##isa},
const Compiled kAll[] = {FW_COMPILED(baseline)
#if defined(FW_X86_64)
                             FW_COMPILED(avx2) FW_COMPILED(avx512)
#endif
};
#undef FW_COMPILED
constexpr int kCount = sizeof kAll / sizeof kAll[0];

#define FW_NAME(Rule) #Rule,
const char* const kRules[] = {FW_RULES(FW_NAME)};
const char* const kPreconditioned[] = {FW_PRECONDITIONED(FW_NAME)};
#undef FW_NAME
constexpr int kRuleCount = sizeof kRules / sizeof kRules[0];
constexpr int kPreconditionedCount = sizeof kPreconditioned / sizeof kPreconditioned[0];

// names of the instruction sets that this machine runs, narrowest first
py::tuple instruction_sets() {
  py::list names;
  for (const Compiled& compiled : kAll)
    if (compiled.kernels->supported()) names.append(compiled.kernels->isa);
  return py::tuple(names);
}

py::tuple rules() {
  py::list names;
  for (const char* name : kRules) names.append(name);
  return py::tuple(names);
}

py::tuple preconditioned() {
  py::list names;
  for (const char* name : kPreconditioned) names.append(name);
  return py::tuple(names);
}

void check_isa(int isa) {
  FW_CHECK(isa >= 0 && isa < kCount && kAll[isa].kernels->supported(),
           "isa must be an index into instruction_sets()");
}

void step(int isa, int rule, std::uintptr_t address, int threads, int stages) {
  check_isa(isa);
  FW_CHECK(rule >= 0 && rule < kRuleCount, "rule must be an index into rules()");
  FW_CHECK(address != 0, "address must be that of a Step");
  FW_CHECK(stages > 0 && stages <= fw::kAllStages, "stages must be those of Stage");
  FW_CHECK(threads > 0, "threads must be at least 1");
  py::gil_scoped_release release;
  kAll[isa].kernels->steps[rule](*fw::at<const fw::Step>(address), threads, stages);
}

void vectors(int isa, int operation, std::uintptr_t address, int threads) {
  check_isa(isa);
  FW_CHECK(operation >= 0 && operation < fw::kOperations, "operation must be one of vectors.h");
  FW_CHECK(address != 0, "address must be that of a VectorOp");
  FW_CHECK(threads > 0, "threads must be at least 1");
  py::gil_scoped_release release;
  (*kAll[isa].vectors)(*fw::at<const fw::VectorOp>(address), operation, threads);
}

void preconditioner(int isa, int rule, std::uintptr_t step, std::uintptr_t address, int threads) {
  check_isa(isa);
  FW_CHECK(rule >= 0 && rule < kPreconditionedCount, "rule must be an index into preconditioned()");
  FW_CHECK(step != 0 && address != 0, "addresses must be those of a Step and a PreconditionerOp");
  FW_CHECK(threads > 0, "threads must be at least 1");
  py::gil_scoped_release release;
  (*kAll[isa].preconditioners)[rule](*fw::at<const fw::Step>(step),
                                     *fw::at<const fw::PreconditionerOp>(address), threads);
}

// goes through columns as a step does, without computing anything
int64_t stream(int isa, std::uintptr_t columns, std::uintptr_t chunks, int64_t n_chunks,
               const std::vector<int32_t>& item_sizes, int rewritten, bool backwards, int threads) {
  check_isa(isa);
  FW_CHECK(columns != 0 && chunks != 0, "addresses must be those of columns and chunks");
  FW_CHECK(rewritten >= 0 && size_t(rewritten) <= item_sizes.size(), "rewritten must be a number of columns");
  FW_CHECK(threads > 0, "threads must be at least 1");
  py::gil_scoped_release release;
  const fw::Stream call = {fw::at<const uint64_t>(columns),
                           fw::at<const fw::Chunk>(chunks),
                           item_sizes.data(),
                           n_chunks,
                           static_cast<int32_t>(item_sizes.size()),
                           rewritten,
                           backwards};
  return (*kAll[isa].stream)(call, threads);
}

// offset and size of every field of every shared struct, and the size of the struct under the empty name
py::dict layout() {
  py::dict structs;
#define FW_FIELD(type, name) fields[#name] = py::make_tuple(offsetof(Self, name), sizeof(type));
#define FW_DESCRIBE(Struct, FIELDS)               \
  {                                               \
    using Self = fw::Struct;                      \
    py::dict fields;                              \
    FIELDS(FW_FIELD)                              \
    fields[""] = py::make_tuple(0, sizeof(Self)); \
    structs[#Struct] = fields;                    \
  }
  FW_STRUCTS(FW_DESCRIBE)
#undef FW_DESCRIBE
#undef FW_FIELD
  return structs;
}

// the value of a group under a key
py::object value_of(PyObject* group, PyObject* key) {
  FW_CHECK(PyDict_Check(group), "groups must be dictionaries");
  PyObject* value = PyDict_GetItemWithError(group, key);
  if (!value && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
  if (!value) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(value);
}

// whether every group still has the same parameters, compared as objects
bool groups_unchanged(py::list groups, py::list members) {
  if (groups.size() != members.size()) return false;
  const py::str name("params");
  for (size_t i = 0; i < members.size(); ++i) {
    const py::object params = value_of(PyList_GET_ITEM(groups.ptr(), i), name.ptr());
    PyObject* then = PyList_GET_ITEM(members.ptr(), i);
    const Py_ssize_t size = PyList_GET_SIZE(then);
    // a list itself, and a copy of anything else
    const auto now =
        py::reinterpret_steal<py::object>(PySequence_Fast(params.ptr(), "params must be a list"));
    if (!now) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(now.ptr()) != size) return false;
    for (Py_ssize_t k = 0; k < size; ++k)
      if (PySequence_Fast_GET_ITEM(now.ptr(), k) != PyList_GET_ITEM(then, k)) return false;
  }
  return true;
}

// whether two values are equal; false for those that cannot be compared, as arrays of many elements
bool are_equal(PyObject* a, PyObject* b) {
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal >= 0) return equal;
  for (PyObject* error : {PyExc_RuntimeError, PyExc_TypeError, PyExc_ValueError})
    if (PyErr_ExceptionMatches(error)) {
      PyErr_Clear();
      return false;
    }
  throw py::error_already_set();
}

// whether a group has other values under the keys than those of a tuple
bool is_changed(const py::object& group, const py::tuple& keys, const py::tuple& then) {
  FW_CHECK(PyDict_Check(group.ptr()), "groups must be dictionaries");
  FW_CHECK(then.size() == keys.size(), "values must be as many as the keys");
  const auto is_other = [&](PyObject* value, size_t k) {
    PyObject* old = PyTuple_GET_ITEM(then.ptr(), k);
    if (value == old) return false;
    // held, because a comparison may run Python code
    const auto now = py::reinterpret_borrow<py::object>(value);
    return !are_equal(now.ptr(), old);
  };
  const size_t count = keys.size();
  size_t k = 0;
  PyObject *key, *value;
  // a group usually has the keys in their order, where none is looked up
  for (Py_ssize_t place = 0; k < count && PyDict_Next(group.ptr(), &place, &key, &value);)
    if (key == PyTuple_GET_ITEM(keys.ptr(), k) && is_other(value, k++)) return true;
  for (; k < count; ++k)
    if (is_other(value_of(group.ptr(), PyTuple_GET_ITEM(keys.ptr(), k)).ptr(), k)) return true;
  return false;
}

// the positions of groups whose values under the keys are other ones than in a tuple for each group, or for
// which there is None
py::list changed_groups(py::list groups, py::tuple keys, py::list values) {
  FW_CHECK(groups.size() == values.size(), "the lists must be equally long");
  py::list found;
  for (size_t i = 0; i < groups.size(); ++i) {
    const py::object group = groups[i], then = values[i];
    if (then.is_none() || is_changed(group, keys, py::reinterpret_borrow<py::tuple>(then))) found.append(i);
  }
  return found;
}

// whether dictionary i still holds object i under key i
bool states_unchanged(py::list dicts, py::list keys, py::list objects) {
  FW_CHECK(dicts.size() == objects.size() && keys.size() == objects.size(), "the lists must be equally long");
  for (size_t i = 0; i < objects.size(); ++i) {
    PyObject* dict = PyList_GET_ITEM(dicts.ptr(), i);
    PyObject* now = PyDict_GetItemWithError(dict, PyList_GET_ITEM(keys.ptr(), i));
    if (!now && PyErr_Occurred()) throw py::error_already_set();
    if (now != PyList_GET_ITEM(objects.ptr(), i)) return false;
  }
  return true;
}

// whether any object is referenced more often than that
bool referenced_beyond(py::list objects, Py_ssize_t references) {
  for (size_t i = 0; i < objects.size(); ++i)
    if (Py_REFCNT(PyList_GET_ITEM(objects.ptr(), i)) > references) return true;
  return false;
}

// whether any tensor has a gradient
bool any_gradient(py::list tensors) {
  const py::str name("grad");
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* grad = PyObject_GetAttr(PyList_GET_ITEM(tensors.ptr(), i), name.ptr());
    if (!grad) throw py::error_already_set();
    Py_DECREF(grad);
    if (grad != Py_None) return true;
  }
  return false;
}

fw::DlExchange* exchange_of(py::handle tensor_type) {
  py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* exchange = static_cast<fw::DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!exchange) throw py::error_already_set();
  while (exchange && exchange->major != 1) exchange = exchange->previous;
  FW_CHECK(exchange && exchange->describe, "the exchange API must be of DLPack 1 with a describing function");
  return exchange;
}

// the extent of a tensor; the dtype -1 for one of another class than the two
fw::TensorExtent extent_of(const fw::DlExchange* exchange, PyObject* types[2], PyObject* tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  fw::TensorExtent extent = {};
  extent.dtype = -1;
  if (type != types[0] && type != types[1]) return extent;
  fw::DlTensor head;
  if (exchange->describe(tensor, &head) == 0)
    extent = fw::extent_of(head);
  else
    PyErr_Clear();
  return extent;
}

// the positions of tensors whose extent has no dtype
py::list others(py::handle tensor_type, py::handle parameter_type, py::list tensors) {
  const fw::DlExchange* const exchange = exchange_of(tensor_type);
  PyObject* types[2] = {tensor_type.ptr(), parameter_type.ptr()};
  py::list found;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (extent_of(exchange, types, PyList_GET_ITEM(tensors.ptr(), i)).dtype < 0) found.append(i);
  return found;
}

// writes the TensorExtent of every tensor; one of another class than the two has the dtype -1
void extents(py::handle tensor_type, py::handle parameter_type, py::list tensors, std::uintptr_t out) {
  const fw::DlExchange* const exchange = exchange_of(tensor_type);
  PyObject* types[2] = {tensor_type.ptr(), parameter_type.ptr()};
  fw::TensorExtent* extents = fw::at<fw::TensorExtent>(out);
  for (size_t i = 0; i < tensors.size(); ++i)
    extents[i] = extent_of(exchange, types, PyList_GET_ITEM(tensors.ptr(), i));
}

// the signatures of a list of tensors, and the current addresses of tensors with those signatures
class TensorSignatures {
 public:
  TensorSignatures(py::handle tensor_type, py::list tensors)
      : tensor_type_(tensor_type.ptr()), exchange_(exchange_of(tensor_type)) {
    add(tensors);
  }

  void add(py::list tensors) {
    for (py::handle tensor : tensors) {
      fw::DlTensor head;
      if (exchange_->describe(tensor.ptr(), &head) != 0) throw py::error_already_set();
      signatures_.add(head);
      types_.push_back(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())));
    }
  }

  // Writes the address of every tensor, or of its gradient: 0 for None and 1 for an empty tensor. Returns the
  // positions of the tensors of another type or signature, whose address is 0. Gradients are kept alive until
  // release(), because another thread may replace them while a step reads them without the GIL.
  // With an address `among` of as many numbers, tensors with a 0 there are not read.
  py::list read(py::list tensors, std::uintptr_t out, bool grads, std::uintptr_t among) {
    FW_CHECK(tensors.size() == signatures_.size(), "tensors must be as many as the signatures");
    uint64_t* addresses = fw::at<uint64_t>(out);
    const uint64_t* wanted = fw::at<const uint64_t>(among);
    py::list odd;
    release();
    for (size_t i = 0; i < signatures_.size(); ++i) {
      if (wanted && !wanted[i]) continue;
      PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
      if (grads) {
        tensor = PyObject_GetAttr(tensor, grad_name_.ptr());
        if (!tensor) throw py::error_already_set();
        if (tensor == Py_None) {
          addresses[i] = 0;
          Py_DECREF(tensor);
          continue;
        }
        held_.push_back(tensor);
      }
      addresses[i] = tensor == Py_None ? 0 : address_of(tensor, i);
      if (addresses[i] == 0 && tensor != Py_None) odd.append(i);
    }
    return odd;
  }

  void release() {
    // freeing a tensor may run Python code that calls this again
    std::vector<PyObject*> held;
    held.swap(held_);
    for (PyObject* tensor : held) Py_DECREF(tensor);
    held.clear();
    if (held_.empty()) held_.swap(held);
  }
  ~TensorSignatures() { release(); }
  TensorSignatures(const TensorSignatures&) = delete;

 private:
  // 0 for a tensor of another type or signature, or with a null address
  uint64_t address_of(PyObject* tensor, size_t i) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (type != tensor_type_ && type != types_[i]) return 0;
    fw::DlTensor t;
    if (exchange_->describe(tensor, &t) != 0) {
      PyErr_Clear();
      return 0;
    }
    return signatures_.address(i, t);
  }

  // types outlive their instances, which the plan holds
  PyObject* tensor_type_;
  py::str grad_name_{"grad"};
  fw::DlExchange* exchange_;
  fw::SignatureList signatures_;
  std::vector<PyObject*> types_;
  std::vector<PyObject*> held_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fused_warmup.";
  m.def("instruction_sets", &instruction_sets);
  m.def("rules", &rules);
  m.def("layout", &layout);
  m.def("step", &step, py::arg("isa"), py::arg("rule"), py::arg("address"), py::arg("threads"),
        py::arg("stages") = static_cast<int>(fw::kAllStages));
  m.def("vectors", &vectors, py::arg("isa"), py::arg("operation"), py::arg("address"), py::arg("threads"));
  m.def("preconditioned", &preconditioned);
  m.def("preconditioner", &preconditioner, py::arg("isa"), py::arg("rule"), py::arg("step"),
        py::arg("address"), py::arg("threads"));
  m.def("stream", &stream, py::arg("isa"), py::arg("columns"), py::arg("chunks"), py::arg("n_chunks"),
        py::arg("item_sizes"), py::arg("rewritten"), py::arg("backwards"), py::arg("threads"));
  m.def("groups_unchanged", &groups_unchanged, py::arg("groups"), py::arg("members"));
  m.def("changed_groups", &changed_groups, py::arg("groups"), py::arg("keys"), py::arg("values"));
  m.def("states_unchanged", &states_unchanged, py::arg("dicts"), py::arg("keys"), py::arg("objects"));
  m.def("referenced_beyond", &referenced_beyond, py::arg("objects"), py::arg("references"));
  m.def("any_gradient", &any_gradient, py::arg("tensors"));
  m.def("others", &others, py::arg("tensor_type"), py::arg("parameter_type"), py::arg("tensors"));
  m.def("extents", &extents, py::arg("tensor_type"), py::arg("parameter_type"), py::arg("tensors"),
        py::arg("out"));
  py::class_<TensorSignatures>(m, "TensorSignatures")
      .def(py::init<py::handle, py::list>(), py::arg("tensor_type"), py::arg("tensors"))
      .def("add", &TensorSignatures::add, py::arg("tensors"))
      .def("read", &TensorSignatures::read, py::arg("tensors"), py::arg("out"), py::arg("grads") = false,
           py::arg("among") = 0)
      .def("release", &TensorSignatures::release);
}
