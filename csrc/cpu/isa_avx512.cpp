// The engine in AVX-512, compiled for it whatever the flags; null elsewhere.
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
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
// GCC's own headers set off these (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#include "block.h"
#include "vector_avx512.h"

namespace prelora::cpu {
namespace {

void run(const Block& block) { run_block<Avx512>(block); }

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
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("bmi2");
}

}  // namespace

const Engine* avx512_engine() {
  static const Engine engine{"avx512", available, run};
  return &engine;
}

}  // namespace prelora::cpu

#else

namespace prelora::cpu {

const Engine* avx512_engine() { return nullptr; }

}  // namespace prelora::cpu

#endif
