// AVX-512 with two bf16 terms in each packed lane, multiplied and summed in one instruction: twice the rate of fp32.
#pragma once

#include "vector_avx512.h"

namespace prelora::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr int kTerms = 2;

  static Vector accumulate(Vector x, Vector y, Vector z) {
    return _mm512_dpbf16_ps(z, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }

  // Terms k and k + 1 of n columns; `two` is false where there is no k + 1.
  static Vector load_terms(const BFloat16* p, int64_t ld, int64_t n, bool two) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p));
    if (!two) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p + ld));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // n consecutive terms of one column.
  static Vector load_run(const BFloat16* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(_bzhi_u32(~0u, static_cast<unsigned>(n)), p));
  }
};

}  // namespace
}  // namespace prelora::cpu
