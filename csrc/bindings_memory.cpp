// Tensors in kept memory, for results that live as long as a training step.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "cpu/kept_memory.h"

namespace prelora {
namespace {

// Less than this malloc keeps by itself.
constexpr size_t kLeast = 1 << 20;

at::Tensor empty_kept(int64_t rows, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0, "a matrix of ", rows, " x ", columns);
  const auto options = at::TensorOptions().dtype(dtype);
  const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(columns) * c10::elementSize(dtype);
  if (bytes < kLeast) return at::empty({rows, columns}, options);
  const auto give_back = [bytes](void* memory) { cpu::give_back(memory, bytes); };
  return at::from_blob(cpu::take(bytes), {rows, columns}, give_back, options);
}

int64_t release_kept() {
  return static_cast<int64_t>(cpu::release_kept());
}

}  // namespace
}  // namespace prelora

TORCH_LIBRARY_FRAGMENT(prelora_C, library) {
  library.def("empty_kept(int rows, int columns, ScalarType dtype) -> Tensor", prelora::empty_kept);
  library.def("release_kept() -> int", prelora::release_kept);
}
