// The CUDA kernels of torch.ops.prelora_C, on the current stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
#include <iterator>
#include <list>
#include <mutex>

#include "bindings.h"
#include "cuda/grouped_gemm.h"

namespace prelora {
namespace {

// Everything that a table contains, and the stream that its copy precedes all other work on.
using Key = std::vector<int64_t>;

// On the device, with what its launch must know beforehand.
struct Table {
  at::Tensor memory;
  cuda::Plan plan;
};

struct KeptTable {
  Key key;
  Table table;
  bool captured;  // a CUDA graph reads it whenever it is replayed
};

// A training step uses two; each is some 30 KB for a hundred layers.
constexpr size_t kKeptTables = 64;

Key key_of(const Call& call, const c10::cuda::CUDAStream& stream) {
  const Dtypes& t = call.dtypes;
  Key key{stream.device_index(), reinterpret_cast<int64_t>(stream.stream()), static_cast<int64_t>(t.a),
          static_cast<int64_t>(t.b), static_cast<int64_t>(t.c), static_cast<int64_t>(t.d)};
  key.reserve(key.size() + 14 * call.problems.size());
  const auto address = [](const void* pointer) { return reinterpret_cast<int64_t>(pointer); };
  const auto bits = [](float value) {
    int32_t word;
    std::memcpy(&word, &value, sizeof(word));
    return int64_t{word};
  };
  for (const Problem& p : call.problems) {
    key.insert(key.end(), {address(p.c), address(p.d), address(p.a), address(p.b), p.m, p.n, p.k, p.ldc, p.ldd, p.lda,
                           p.ldb, bits(p.alpha), bits(p.beta), 2 * p.trans_a + p.trans_b});
  }
  return key;
}

at::Tensor empty_bytes(size_t bytes, const at::TensorOptions& options) {
  return at::empty({static_cast<int64_t>(bytes)}, options.dtype(at::kByte));
}

Table copy_to_device(const Call& call, const at::Device& device) {
  const int64_t count = static_cast<int64_t>(call.problems.size());
  // Zeros: what the table leaves out between its lists is copied as well.
  const at::Tensor host = empty_bytes(cuda::table_bytes(count), at::TensorOptions().pinned_memory(true)).zero_();
  Table table{empty_bytes(host.numel(), at::TensorOptions().device(device)), {}};
  const char* reason =
      cuda::build_table(call.problems.data(), count, call.dtypes, host.mutable_data_ptr(), &table.plan);
  TORCH_CHECK_VALUE(reason == nullptr, reason);
  table.memory.copy_(host, /*non_blocking=*/true);
  return table;
}

// The call's table, copied to the device unless one of equal content is there already. It is found by its content, so
// that none can be stale, and used by its stream alone, so that it may be dropped while a launch still waits.
Table table_of(const Call& call, const at::Device& device) {
  static std::mutex mutex;
  static auto* const kept = new std::list<KeptTable>;  // never freed: at exit, CUDA may be gone before it
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  Key key = key_of(call, c10::cuda::getCurrentCUDAStream());
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto entry = kept->begin(); entry != kept->end(); ++entry) {
    if (entry->key == key) {
      entry->captured |= capturing;
      kept->splice(kept->begin(), *kept, entry);
      return entry->table;
    }
  }
  TORCH_CHECK(!capturing, "a grouped call copies its table to the device when it first meets these addresses: run it "
                          "once on this stream before a CUDA graph captures it");
  kept->push_front({std::move(key), copy_to_device(call, device), false});
  for (auto entry = std::prev(kept->end()); kept->size() > kKeptTables && entry != kept->begin(); --entry) {
    if (!entry->captured) entry = kept->erase(entry);
  }
  return kept->front().table;
}

int multiprocessors(const at::Device& device) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index()));
  return count;
}

void grouped_gemm_cuda(at::TensorList a, at::TensorList b, at::TensorList d, at::TensorList out,
                       at::ArrayRef<double> alpha, at::ArrayRef<double> beta, const c10::List<bool>& trans_a,
                       const c10::List<bool>& trans_b) {
  TORCH_CHECK_VALUE(out.size() == a.size(), a.size(), " groups and ", out.size(), " outputs");
  const Call call = gather({a, b, d, out, alpha, beta, trans_a, trans_b}, at::kCUDA);
  const at::Device device = a[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const Table table = table_of(call, device);
  const at::Tensor workspace = empty_bytes(table.plan.gemm_workspace(), at::TensorOptions().device(device));
  C10_CUDA_CHECK(cuda::grouped_gemm(table.memory.const_data_ptr(), table.plan, workspace.mutable_data_ptr(),
                                    multiprocessors(device), c10::cuda::getCurrentCUDAStream()));
}

at::Tensor grouped_squares_cuda(at::TensorList a, at::TensorList b, at::TensorList d, at::ArrayRef<double> alpha,
                                at::ArrayRef<double> beta, const c10::List<bool>& trans_a,
                                const c10::List<bool>& trans_b) {
  const Call call = gather({a, b, d, {}, alpha, beta, trans_a, trans_b}, at::kCUDA);
  const at::Device device = a[0].device();
  const c10::cuda::CUDAGuard guard(device);
  const Table table = table_of(call, device);
  const at::TensorOptions options = at::TensorOptions().device(device);
  const at::Tensor workspace = empty_bytes(table.plan.squares_workspace(), options);
  at::Tensor squares = at::empty({table.plan.count}, options.dtype(at::kDouble));
  C10_CUDA_CHECK(cuda::grouped_squares(table.memory.const_data_ptr(), table.plan, squares.mutable_data_ptr<double>(),
                                       workspace.mutable_data_ptr(), multiprocessors(device),
                                       c10::cuda::getCurrentCUDAStream()));
  return squares;
}

}  // namespace
}  // namespace prelora

TORCH_LIBRARY_IMPL(prelora_C, CUDA, library) {
  library.impl("grouped_gemm_", prelora::grouped_gemm_cuda);
  library.impl("grouped_squares", prelora::grouped_squares_cuda);
}
