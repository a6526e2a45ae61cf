// The engine in AVX2, compiled for it whatever the flags; null elsewhere.
#include "engine.h"

#if defined(__x86_64__)

// Before the pragma: what the standard library inlines must not be compiled for this instruction set, because the
// linker keeps one copy for everybody.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "convert.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "block.h"
#include "vector_avx2.h"

namespace prelora::cpu {
namespace {

void run(const Block& block) { run_block<Avx2>(block); }

}  // namespace
}  // namespace prelora::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace prelora::cpu {
namespace {

bool available() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Engine* avx2_engine() {
  static const Engine engine{"avx2", available, run};
  return &engine;
}

}  // namespace prelora::cpu

#else

namespace prelora::cpu {

const Engine* avx2_engine() { return nullptr; }

}  // namespace prelora::cpu

#endif
