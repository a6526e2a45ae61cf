// Runs csrc/cuda/grouped_gemm.cu on a CPU: calls from stdin, results to stdout, as tests/test_cuda_host.py packs them.
#include "host_cuda.h"

#include <unistd.h>

#include "../../csrc/cuda/grouped_gemm.cu"

namespace {

using prelora::Dtype;
using prelora::Problem;

bool read_all(void* to, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t got = read(0, static_cast<char*>(to) + done, bytes - done);
    if (got <= 0) return false;
    done += static_cast<size_t>(got);
  }
  return true;
}

void write_all(const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t put = write(1, static_cast<const char*>(from) + done, bytes - done);
    if (put <= 0) host_cuda::fail("cannot write results");
    done += static_cast<size_t>(put);
  }
}

// Freed when dropped, aligned to 16 bytes.
using Memory = std::unique_ptr<char, decltype(&std::free)>;

Memory allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) host_cuda::fail("no memory");
  return {static_cast<char*>(memory), std::free};
}

// Memory that ends where the matrix does and begins `offset` bytes after a multiple of 16.
class Buffer {
 public:
  Buffer(size_t offset, size_t bytes) : offset_(offset), bytes_(bytes), memory_(allocate(offset + bytes)) {
    if (bytes > 0 && !read_all(data(), bytes)) host_cuda::fail("a matrix is cut short");
  }
  void* data() const { return memory_.get() + offset_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t offset_, bytes_;
  Memory memory_;
};

struct CallHeader {
  int32_t count, a, b, c, d, squares, multiprocessors, seed, skipped_barrier, skipped_wait, launch_error;
};

struct ProblemHeader {
  int64_t m, n, k, ldc, ldd, lda, ldb, trans_a, trans_b, d_is_c;
  int64_t offset_c, offset_d, offset_a, offset_b, bytes_c, bytes_d, bytes_a, bytes_b;
  double alpha, beta;
};

struct ResultHeader {
  int32_t error, launches, barriers, waits, reason_bytes;
};

struct Answer {
  cudaError_t error;
  const char* reason;
};

// As the binding would: the table goes to memory of its own, which is all that the kernels see of the problems.
Answer run(const CallHeader& header, const std::vector<Problem>& problems, std::vector<double>& squares) {
  namespace cuda = prelora::cuda;
  const size_t bytes = cuda::table_bytes(header.count);
  const Memory table = allocate(bytes);
  const prelora::Dtypes dtypes{Dtype{header.a}, Dtype{header.b}, Dtype{header.c}, Dtype{header.d}};
  cuda::Plan plan;
  const char* const reason = cuda::build_table(problems.data(), header.count, dtypes, table.get(), &plan);
  if (reason != nullptr) return {cudaSuccess, reason};
  const size_t own = header.squares ? plan.squares_workspace() : plan.gemm_workspace();
  const Memory workspace = allocate(own);
  std::memset(workspace.get(), 0xff, own);
  if (header.squares) {
    return {cuda::grouped_squares(table.get(), plan, squares.data(), workspace.get(), header.multiprocessors, nullptr),
            nullptr};
  }
  return {cuda::grouped_gemm(table.get(), plan, workspace.get(), header.multiprocessors, nullptr), nullptr};
}

void answer(const CallHeader& header) {
  std::vector<std::unique_ptr<Buffer>> kept, c;
  std::vector<Problem> problems;
  for (int32_t i = 0; i < header.count; ++i) {
    ProblemHeader p;
    if (!read_all(&p, sizeof p)) host_cuda::fail("a problem is cut short");
    c.push_back(std::make_unique<Buffer>(p.offset_c, p.bytes_c));
    kept.push_back(std::make_unique<Buffer>(p.offset_d, p.bytes_d));
    void* const d = p.d_is_c ? c.back()->data() : kept.back()->data();
    kept.push_back(std::make_unique<Buffer>(p.offset_a, p.bytes_a));
    void* const a = kept.back()->data();
    kept.push_back(std::make_unique<Buffer>(p.offset_b, p.bytes_b));
    problems.push_back({header.squares ? nullptr : c.back()->data(), d, a, kept.back()->data(), p.m, p.n, p.k, p.ldc,
                        p.ldd, p.lda, p.ldb, static_cast<float>(p.alpha), static_cast<float>(p.beta), p.trans_a != 0,
                        p.trans_b != 0});
  }
  host_cuda::Control& control = host_cuda::control();
  control.barriers.skipped = header.skipped_barrier;
  control.waits.skipped = header.skipped_wait;
  control.seed = header.seed;
  control.launch_error = static_cast<cudaError_t>(header.launch_error);
  control.launches = 0;
  std::vector<double> squares(header.squares ? header.count : 0, NAN);
  const Answer got = run(header, problems, squares);
  const int32_t reason_bytes = got.reason == nullptr ? 0 : static_cast<int32_t>(std::strlen(got.reason));
  const ResultHeader result{got.error, control.launches, control.barriers.met, control.waits.met,
                            reason_bytes};
  write_all(&result, sizeof result);
  write_all(got.reason, reason_bytes);
  for (const auto& buffer : c) write_all(buffer->data(), buffer->bytes());
  write_all(squares.data(), squares.size() * sizeof(double));
}

}  // namespace

int main() {
  CallHeader header;
  while (read_all(&header, sizeof header)) answer(header);
}
