// Python module fused_warmup._cpu: addresses in, nothing out. The GIL is released while the kernels run.
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "../check.h"
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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fused_warmup.";
  m.def("instruction_sets", &instruction_sets);
  m.def("rules", &rules);
  m.def("layout", &layout);
  m.def("step", &step, py::arg("isa"), py::arg("rule"), py::arg("address"), py::arg("threads"));
}
