// Python module fused_warmup._cuda: the step, which takes addresses and a stream and returns once its kernels
// are queued. SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "../check.h"
#include "../vectors.h"
#include "launch.h"

namespace py = pybind11;

namespace {

#define FW_ENTRY(Rule) &fw::cuda_##Rule,
const fw::CudaKernels* const kRules[] = {FW_RULES(FW_ENTRY)};
#undef FW_ENTRY
constexpr int kRuleCount = sizeof kRules / sizeof kRules[0];
#define FW_NAME(Rule) #Rule,
const char* const kPreconditioned[] = {FW_PRECONDITIONED(FW_NAME)};
#undef FW_NAME
constexpr int kPreconditionedCount = sizeof kPreconditioned / sizeof kPreconditioned[0];

py::tuple rules() {
  py::list names;
  for (const fw::CudaKernels* kernels : kRules) names.append(kernels->rule);
  return py::tuple(names);
}

py::tuple preconditioned() {
  py::list names;
  for (const char* name : kPreconditioned) names.append(name);
  return py::tuple(names);
}

const fw::CudaKernels& kernels_of(int rule) {
  FW_CHECK(rule >= 0 && rule < kRuleCount, "rule must be an index into rules()");
  return *kRules[rule];
}

py::object probe(int device) {
  FW_CHECK(device >= -1, "device must be an index or -1");
  std::string reason;
  {
    py::gil_scoped_release release;
    reason = fw::probe(device, FW_CUDA_ARCHS);
  }
  return reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
}

void prepare(int rule, int device, bool all_kinds) {
  FW_CHECK(device >= 0, "device must be an index");
  kernels_of(rule).prepare(device, all_kinds);
}

void step(int rule, std::uintptr_t address, std::uintptr_t grads, int64_t n_grads, bool all_kinds, int device,
          std::uintptr_t stream, int64_t max_blocks, int stages) {
  const fw::CudaKernels& kernels = kernels_of(rule);
  FW_CHECK(address != 0, "address must be that of a Step");
  const fw::Step& table = *fw::at<const fw::Step>(address);
  FW_CHECK(n_grads == 0 || (grads != 0 && n_grads == table.n_rows && n_grads <= fw::kMaxInlinePointers),
           "n_grads must be 0, or the number of rows and at most MAX_INLINE_POINTERS");
  FW_CHECK(device >= 0 && max_blocks >= 0, "device and max_blocks must be at least 0");
  FW_CHECK(stages > 0 && stages <= fw::kAllStages, "stages must be those of Stage");
  const fw::Launch how{device,  fw::at<void>(stream), all_kinds, fw::at<const uint64_t>(grads),
                       n_grads, max_blocks,           stages};
  py::gil_scoped_release release;
  kernels.step(how, table);
}

void vectors(int operation, std::uintptr_t address, int device, std::uintptr_t stream, int64_t max_blocks) {
  FW_CHECK(operation >= 0 && operation < fw::kOperations, "operation must be one of vectors.h");
  FW_CHECK(address != 0, "address must be that of a VectorOp");
  FW_CHECK(device >= 0 && max_blocks >= 0, "device and max_blocks must be at least 0");
  const fw::VectorOp& call = *fw::at<const fw::VectorOp>(address);
  const fw::Launch how{device, fw::at<void>(stream), call.doubles != 0, nullptr, 0, max_blocks};
  py::gil_scoped_release release;
  fw::run_vectors(how, call, operation);
}

void preconditioner(int rule, std::uintptr_t step, std::uintptr_t address, int device, std::uintptr_t stream,
                    int64_t max_blocks) {
  FW_CHECK(rule >= 0 && rule < kPreconditionedCount, "rule must be an index into preconditioned()");
  FW_CHECK(step != 0 && address != 0, "addresses must be those of a Step and a PreconditionerOp");
  FW_CHECK(device >= 0 && max_blocks >= 0, "device and max_blocks must be at least 0");
  const fw::PreconditionerOp& call = *fw::at<const fw::PreconditionerOp>(address);
  const fw::Launch how{device, fw::at<void>(stream), call.doubles != 0, nullptr, 0, max_blocks};
  py::gil_scoped_release release;
  fw::run_preconditioner(how, rule, *fw::at<const fw::Step>(step), call);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fused_warmup.";
  m.attr("MAX_INLINE_POINTERS") = fw::kMaxInlinePointers;
  m.attr("MAX_CAPTURED_POINTERS") = fw::kFewPointers;
  m.def("rules", &rules);
  m.def("probe", &probe, py::arg("device"));
  m.def("prepare", &prepare, py::arg("rule"), py::arg("device"), py::arg("all_kinds"));
  m.def("step", &step, py::arg("rule"), py::arg("address"), py::arg("grads"), py::arg("n_grads"),
        py::arg("all_kinds"), py::arg("device"), py::arg("stream"), py::arg("max_blocks") = 0,
        py::arg("stages") = static_cast<int>(fw::kAllStages));
  m.def("vectors", &vectors, py::arg("operation"), py::arg("address"), py::arg("device"), py::arg("stream"),
        py::arg("max_blocks") = 0);
  m.def("preconditioned", &preconditioned);
  m.def("preconditioner", &preconditioner, py::arg("rule"), py::arg("step"), py::arg("address"),
        py::arg("device"), py::arg("stream"), py::arg("max_blocks") = 0);
}
