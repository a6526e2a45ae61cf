// Threads that run one at a time and change only where they say so; to the sanitizers they are threads like any.
//
// A block of 128 std::threads meets at a barrier some thousand times slower. ThreadSanitizer knows of each fiber, and
// that a switch orders nothing: what two of them access without a barrier between is a race to it, whoever ran first.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// The emulation's own reads of another thread's memory are no race of the kernel's.
#if defined(__SANITIZE_THREAD__)
#define HOST_CUDA_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define HOST_CUDA_UNSEEN
#endif

namespace host_cuda {

class Fiber {
 public:
  explicit Fiber(std::function<void()> body) : body_(std::move(body)), stack_(new char[kStackBytes]) {
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.get();
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    const auto bits = reinterpret_cast<uintptr_t>(this);
    makecontext(&own_, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(bits >> 32),
                static_cast<unsigned>(bits));
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  ~Fiber() {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
  }

  // Runs the fiber until it pauses or ends.
  HOST_CUDA_UNSEEN void resume() {
#if defined(__SANITIZE_THREAD__)
    caller_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_.get(), kStackBytes);
    swapcontext(&caller_, &own_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    swapcontext(&caller_, &own_);
#endif
  }

  // Gives the processor back to whoever resumed this fiber, which must be the running one.
  HOST_CUDA_UNSEEN void pause() { leave(false); }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  HOST_CUDA_UNSEEN static void enter(unsigned high, unsigned low) {
    auto* const self = reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_stack_bytes_);
#endif
    self->body_();
    self->leave(true);
  }

  HOST_CUDA_UNSEEN void leave([[maybe_unused]] bool ended) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(caller_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack, caller_stack_, caller_stack_bytes_);
    swapcontext(&own_, &caller_);
    __sanitizer_finish_switch_fiber(fake_stack, &caller_stack_, &caller_stack_bytes_);
#else
    swapcontext(&own_, &caller_);
#endif
  }

  std::function<void()> body_;
  std::unique_ptr<char[]> stack_;
  ucontext_t own_, caller_;
  void* tsan_ = nullptr;
  void* caller_tsan_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
};

}  // namespace host_cuda
