// CUDA's words as C++, so that a .cu runs on a CPU under the sanitizers: its indexing, barriers, copies and tails.
//
// Every CUDA thread is a fiber. A warp runs as far as it can before another does, in an order that changes from barrier
// to barrier, so that what lacks a barrier goes wrong. Shared memory is NaN until written; an asynchronous copy's
// target is NaN until waited for. Collectives need all of a warp, a barrier all of a block, at one place in the source.
// Slower and stricter than a device, and no proof of what it does not do: memory of other blocks, launch limits, speed.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace host_cuda {

constexpr int kWarp = 32;

struct Index {
  unsigned x;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int valid;
};

// Places in the source of one kind, in the order in which threads came to them; one may be left out.
struct Sites {
  int skipped = -1;
  int met = 0;
  std::array<std::pair<const char*, int>, 64> places{};
};

// What a test asks of the emulation, and what it saw.
struct Control {
  unsigned seed = 0;                       // of the order in which warps run
  cudaError_t launch_error = cudaSuccess;  // of every launch
  int launches = 0;
  Sites barriers, waits;
};

inline Control& control() {
  static Control one;
  return one;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::exit(3);
}

enum class State { kReady, kAtBarrier, kInWarp, kEnded };

// What a lane brings to a warp's collective, and where the result goes.
struct Offer {
  void (*all)(Offer* lanes);
  float* sum;
  const uint32_t* a;
  const uint32_t* b;
  float value;
};

struct Thread {
  Index index;
  State state = State::kReady;
  int site = -1;
  Offer offer{};
  std::vector<std::vector<Copy>> groups = {{}};  // the last one is not committed yet
  Fiber* fiber = nullptr;
};

struct Block {
  Index index, grid;
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> shared;
  char barriers[2] = {};  // what ThreadSanitizer ties the threads of a barrier to, every other time one
  int met = 0;
};

inline Block* block = nullptr;
inline Thread* thread = nullptr;

inline void order_before([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(what);
#endif
}

inline void order_after([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(what);
#endif
}

HOST_CUDA_UNSEEN inline int number_of(Sites& sites, const char* file, int line) {
  for (int i = 0; i < sites.met; ++i) {
    if (sites.places[i].first == file && sites.places[i].second == line) return i;
  }
  if (sites.met == static_cast<int>(sites.places.size())) fail("more barriers or waits than there is room for");
  sites.places[sites.met] = {file, line};
  return sites.met++;
}

HOST_CUDA_UNSEEN inline void stop(State state) {
  Thread* const self = thread;
  self->state = state;
  self->fiber->pause();
}

HOST_CUDA_UNSEEN inline void barrier(const char* file, int line) {
  const int site = number_of(control().barriers, file, line);
  if (site == control().barriers.skipped) return;
  thread->site = site;
  char* const tie = &block->barriers[block->met % 2];
  order_before(tie);
  stop(State::kAtBarrier);
  order_after(tie);
}

// Runs one warp until each of its lanes is at a barrier or at the kernel's end.
HOST_CUDA_UNSEEN inline void run_warp(int first) {
  Thread* const lanes = &block->threads[first];
  const int count = std::min<int>(kWarp, static_cast<int>(block->threads.size()) - first);
  for (;;) {
    int waiting = 0;
    for (int i = 0; i < count; ++i) {
      thread = &lanes[i];
      if (thread->state == State::kReady) thread->fiber->resume();
      waiting += thread->state == State::kInWarp;
    }
    if (waiting == 0) return;
    std::array<Offer, kWarp> offers;
    for (int i = 0; i < count; ++i) {
      if (waiting != kWarp || lanes[i].offer.all != lanes[0].offer.all) fail("a warp's collective without all lanes");
      offers[i] = lanes[i].offer;
    }
    offers[0].all(offers.data());
    for (int i = 0; i < kWarp; ++i) {
      lanes[i].offer = offers[i];
      lanes[i].state = State::kReady;
    }
  }
}

HOST_CUDA_UNSEEN inline void run_block(Block* one) {
  block = one;
  const int count = static_cast<int>(block->threads.size()), warps = (count + kWarp - 1) / kWarp;
  unsigned turn = control().seed;
  for (;;) {
    for (int i = 0; i < warps; ++i) {
      const unsigned warp = (turn % 2 ? warps - 1 - i : i) + turn / 2;
      run_warp(static_cast<int>(warp % warps) * kWarp);
    }
    ++turn;
    const State state = block->threads[0].state;
    for (const Thread& t : block->threads) {
      if (t.state != state) fail("a thread ended while others wait at a barrier");
      if (state == State::kAtBarrier && t.site != block->threads[0].site) fail("threads at different barriers");
    }
    if (state == State::kEnded) return;
    ++block->met;
    for (Thread& t : block->threads) t.state = State::kReady;
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int grid, int threads, cudaStream_t, Arguments... arguments) {
  ++control().launches;
  if (control().launch_error != cudaSuccess) return;
  char end = 0;
  // Every block's threads are there until the launch ends: races between blocks are races.
  std::vector<std::unique_ptr<Block>> blocks;
  for (int i = 0; i < grid; ++i) {
    blocks.push_back(std::make_unique<Block>());
    Block& one = *blocks.back();
    one.index = {static_cast<unsigned>(i)};
    one.grid = {static_cast<unsigned>(grid)};
    one.threads = std::vector<Thread>(threads);
    for (int t = 0; t < threads; ++t) {
      one.threads[t].index = {static_cast<unsigned>(t)};
      one.fibers.push_back(std::make_unique<Fiber>([&, kernel] {
        kernel(arguments...);
        order_before(&end);
        stop(State::kEnded);
      }));
      one.threads[t].fiber = one.fibers.back().get();
    }
    run_block(&one);
  }
  order_after(&end);
}

}  // namespace host_cuda

#define threadIdx (::host_cuda::thread->index)
#define blockIdx (::host_cuda::block->index)
#define gridDim (::host_cuda::block->grid)
#define __syncthreads() ::host_cuda::barrier(__FILE__, __LINE__)
#define PRELORA_LAUNCH(kernel, grid, block, stream, ...) ::host_cuda::launch(kernel, grid, block, stream, __VA_ARGS__)

inline cudaError_t cudaGetLastError() { return host_cuda::control().launch_error; }

#include "host_device.h"
