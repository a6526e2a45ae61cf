// prelora._C: what csrc/ has for torch, as torch.ops.prelora_C; prelora.ops says what each operator means.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "bindings.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "cpu/grouped_gemm.h"
#include "cpu/isa.h"

namespace prelora {
namespace {

void check_matrix(const char* name, size_t i, at::TensorList tensors, const at::Device& device) {
  const at::Tensor& tensor = tensors[i];
  TORCH_CHECK_VALUE(tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) <= 1), "group ", i, ": ", name,
                    " is no matrix of contiguous rows: ", tensor.sizes(), ", strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.device() == device, "group ", i, ": ", name, " is on ", tensor.device(), ", not ", device);
  TORCH_CHECK_VALUE(tensor.scalar_type() == tensors[0].scalar_type(), "group ", i, ": ", name, " is ",
                    tensor.scalar_type(), ", that of group 0 ", tensors[0].scalar_type());
}

Problem problem_of(const Arguments& g, size_t i, const at::Device& device) {
  check_matrix("A", i, g.a, device);
  check_matrix("B", i, g.b, device);
  const bool ta = g.trans_a[i], tb = g.trans_b[i];
  const at::Tensor &a = g.a[i], &b = g.b[i];
  const int64_t m = a.size(ta), k = a.size(!ta), n = b.size(!tb);
  TORCH_CHECK_VALUE(k > 0 && b.size(tb) == k, "group ", i, ": op(A) is [", m, ", ", k, "] and op(B) [", b.size(tb),
                    ", ", n, "]");
  Problem p{};
  p.m = m, p.n = n, p.k = k;
  p.a = a.const_data_ptr(), p.lda = a.stride(0), p.trans_a = ta;
  p.b = b.const_data_ptr(), p.ldb = b.stride(0), p.trans_b = tb;
  p.alpha = static_cast<float>(g.alpha[i]);
  const auto check_result = [&](const char* name, at::TensorList tensors) {
    check_matrix(name, i, tensors, device);
    TORCH_CHECK_VALUE(tensors[i].size(0) == m && tensors[i].size(1) == n, "group ", i, ": ", name, " is ",
                      tensors[i].sizes(), ", the product [", m, ", ", n, "]");
  };
  if (!g.d.empty()) {
    check_result("D", g.d);
    p.d = g.d[i].const_data_ptr(), p.ldd = g.d[i].stride(0), p.beta = static_cast<float>(g.beta[i]);
  }
  if (!g.out.empty()) {
    check_result("C", g.out);
    p.c = g.out[i].mutable_data_ptr(), p.ldc = g.out[i].stride(0);
  }
  return p;
}

void grouped_gemm_cpu(at::TensorList a, at::TensorList b, at::TensorList d, at::TensorList out,
                      at::ArrayRef<double> alpha, at::ArrayRef<double> beta, const c10::List<bool>& trans_a,
                      const c10::List<bool>& trans_b) {
  TORCH_CHECK_VALUE(out.size() == a.size(), a.size(), " groups and ", out.size(), " outputs");
  const Call call = gather({a, b, d, out, alpha, beta, trans_a, trans_b}, at::kCPU);
  cpu::grouped_gemm(call.problems.data(), static_cast<int64_t>(call.problems.size()), call.dtypes, threads(),
                    run_in_parallel);
}

at::Tensor grouped_squares_cpu(at::TensorList a, at::TensorList b, at::TensorList d, at::ArrayRef<double> alpha,
                               at::ArrayRef<double> beta, const c10::List<bool>& trans_a,
                               const c10::List<bool>& trans_b) {
  const Call call = gather({a, b, d, {}, alpha, beta, trans_a, trans_b}, at::kCPU);
  const int64_t count = static_cast<int64_t>(call.problems.size());
  at::Tensor squares = at::empty({count}, at::kDouble);
  cpu::grouped_squares(call.problems.data(), count, call.dtypes, squares.mutable_data_ptr<double>(), threads(),
                       run_in_parallel);
  return squares;
}

std::string isa() {
  return cpu::isa();
}

bool set_isa(c10::string_view name) {
  return cpu::set_isa(std::string(name).c_str());
}

std::string cuda() {
  return PRELORA_BUILT;
}

}  // namespace

Dtype dtype_of(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, name, " is ", tensor.scalar_type(), ": float32, bfloat16 and float16 are built");
  }
}

int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void run_in_parallel(int64_t tasks, const std::function<void(int64_t, int64_t)>& run) {
  at::parallel_for(0, tasks, 1, run);
}

Call gather(const Arguments& g, c10::DeviceType device) {
  const size_t count = g.a.size();
  TORCH_CHECK_VALUE(g.b.size() == count && g.alpha.size() == count && g.trans_a.size() == count &&
                        g.trans_b.size() == count && (g.d.empty() || g.d.size() == count) &&
                        g.beta.size() == g.d.size(),
                    "lists of different lengths");
  const auto dtype = [](const char* name, at::TensorList tensors) {
    return tensors.empty() ? Dtype::kFloat32 : dtype_of(name, tensors[0]);
  };
  Call call{{}, {dtype("A", g.a), dtype("B", g.b), dtype("C", g.out), dtype("D", g.d)}};
  call.problems.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(g.a[0].device().type() == device, "group 0: A is on ", g.a[0].device());
    call.problems.push_back(problem_of(g, i, g.a[0].device()));
  }
  return call;
}

}  // namespace prelora

TORCH_LIBRARY(prelora_C, library) {
  library.def(
      "grouped_gemm_(Tensor[] a, Tensor[] b, Tensor[] d, Tensor(a!)[] out, float[] alpha, float[] beta, "
      "bool[] trans_a, bool[] trans_b) -> ()");
  library.def(
      "grouped_squares(Tensor[] a, Tensor[] b, Tensor[] d, float[] alpha, float[] beta, bool[] trans_a, "
      "bool[] trans_b) -> Tensor");
  library.def("isa() -> str", prelora::isa);
  library.def("set_isa(str name) -> bool", prelora::set_isa);
  library.def("cuda() -> str", prelora::cuda);
}

TORCH_LIBRARY_IMPL(prelora_C, CPU, library) {
  library.impl("grouped_gemm_", prelora::grouped_gemm_cpu);
  library.impl("grouped_squares", prelora::grouped_squares_cpu);
}

// Importing prelora._C runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
