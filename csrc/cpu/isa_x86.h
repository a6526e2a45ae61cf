// One engine for x86-64, compiled for the instruction set PRELORA_TARGET whatever the flags; null elsewhere.
// What includes this has defined PRELORA_TARGET, PRELORA_ENGINE (the function), PRELORA_NAME, PRELORA_VECTOR (what the
// block runs on), PRELORA_VECTOR_HEADER and PRELORA_AVAILABLE (an expression: whether this processor has it).
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

#define PRELORA_PRAGMA_OF(text) _Pragma(#text)
#define PRELORA_PRAGMA(text) PRELORA_PRAGMA_OF(text)

#if defined(__clang__)
PRELORA_PRAGMA(clang attribute push(__attribute__((target(PRELORA_TARGET))), apply_to = function))
#else
#pragma GCC push_options
// GCC's own AVX-512 headers set off these (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
PRELORA_PRAGMA(GCC target(PRELORA_TARGET))
#endif

#include "adapter_block.h"
#include "block.h"
#include PRELORA_VECTOR_HEADER

namespace prelora::cpu {
namespace {

void run(const Block& block) { run_block<PRELORA_VECTOR>(block); }

void run_adapter(const AdapterBlock& block) { run_adapter_block<PRELORA_VECTOR>(block); }

void pack_factor(Dtype dtype, const void* from, int64_t features, int64_t rank, bool transposed, float* to) {
  pack_adapter<PRELORA_VECTOR>(dtype, from, features, rank, transposed, to);
}

}  // namespace
}  // namespace prelora::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace prelora::cpu {

const Engine* PRELORA_ENGINE() {
  static const Engine engine{PRELORA_NAME, [] { return PRELORA_AVAILABLE; }, run, run_adapter, pack_factor};
  return &engine;
}

}  // namespace prelora::cpu

#else

namespace prelora::cpu {

const Engine* PRELORA_ENGINE() { return nullptr; }

}  // namespace prelora::cpu

#endif
