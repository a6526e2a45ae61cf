// Sixteen fp32 lanes in AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace prelora::cpu {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int kLanes = 16, kTileRows = 14, kTileVectors = 2;
  static constexpr int kTerms = 1;  // of the summed dimension in one lane of a packed vector

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector all(float x) { return _mm512_set1_ps(x); }
  static Vector multiply(Vector x, Vector y) { return _mm512_mul_ps(x, y); }
  static Vector add(Vector x, Vector y) { return _mm512_add_ps(x, y); }
  static Vector fma(Vector x, Vector y, Vector z) { return _mm512_fmadd_ps(x, y, z); }
  static Vector accumulate(Vector x, Vector y, Vector z) { return fma(x, y, z); }
  static double sum(Vector x) { return _mm512_reduce_add_ps(x); }

  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }

  // The first n lanes, the others zero; nothing beyond them is touched.
  static __mmask16 mask(int64_t n) { return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(n))); }
  static Vector first(Vector x, int64_t n) { return _mm512_maskz_mov_ps(mask(n), x); }
  static Vector load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static Vector load(const BFloat16* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p)), 16));
  }
  static Vector load(const Float16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static void store(float* p, Vector x, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), x); }
  static void store(BFloat16* p, Vector x, int64_t n) {
    const __m512i bits = _mm512_srli_epi32(rounded(x), 16);
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtepi32_epi16(bits));
  }
  static void store(Float16* p, Vector x, int64_t n) {
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  // One row of a tile; stream: past the caches, which needs 64-byte alignment.
  static void store_row(float* p, const Vector (&row)[kTileVectors], bool stream) {
    for (int v = 0; v < kTileVectors; ++v) {
      if (stream) {
        _mm512_stream_ps(p + v * kLanes, row[v]);
      } else {
        _mm512_storeu_ps(p + v * kLanes, row[v]);
      }
    }
  }
  static void store_row(BFloat16* p, const Vector (&row)[kTileVectors], bool stream) {
    // Picks the upper half of every lane of both: one instruction where two conversions take four.
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                           25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i both = _mm512_permutex2var_epi16(rounded(row[0]), upper, rounded(row[1]));
    if (stream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    } else {
      _mm512_storeu_si512(p, both);
    }
  }
  static constexpr bool can_stream(int64_t bytes) { return kTileVectors * kLanes * bytes >= 64; }
  static void fence() { _mm_sfence(); }

  static void transpose(Vector (&x)[kLanes]) {
    Vector y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 4) {
      x[i] = shuffle_pairs<0x44>(y[i], y[i + 2]);
      x[i + 1] = shuffle_pairs<0xee>(y[i], y[i + 2]);
      x[i + 2] = shuffle_pairs<0x44>(y[i + 1], y[i + 3]);
      x[i + 3] = shuffle_pairs<0xee>(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
      y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
      y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
      y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
      x[i + 4] = _mm512_shuffle_f32x4(y[i + 4], y[i + 12], 0x88);
      x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
      x[i + 12] = _mm512_shuffle_f32x4(y[i + 4], y[i + 12], 0xdd);
    }
  }

 private:
  template <int kPick>
  static Vector shuffle_pairs(Vector x, Vector y) {
    return _mm512_shuffle_ps(x, y, kPick);
  }

  // Bits whose upper halves are x in bf16.
  static __m512i rounded(Vector x) {
    const __m512i bits = _mm512_castps_si512(x), half = _mm512_set1_epi32(0x7fff);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i up = _mm512_mask_add_epi32(_mm512_add_epi32(bits, half), odd, _mm512_add_epi32(bits, half),
                                             _mm512_set1_epi32(1));
    return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  }
};

}  // namespace
}  // namespace prelora::cpu
