// Eight fp32 lanes in AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace prelora::cpu {
namespace {

struct Avx2 {
  using Vector = __m256;
  static constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
  static constexpr int kTerms = 1;  // of the summed dimension in one lane of a packed vector

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector all(float x) { return _mm256_set1_ps(x); }
  static Vector multiply(Vector x, Vector y) { return _mm256_mul_ps(x, y); }
  static Vector add(Vector x, Vector y) { return _mm256_add_ps(x, y); }
  static Vector fma(Vector x, Vector y, Vector z) { return _mm256_fmadd_ps(x, y, z); }
  static Vector accumulate(Vector x, Vector y, Vector z) { return fma(x, y, z); }
  static double sum(Vector x) {
    float lanes[kLanes];
    _mm256_storeu_ps(lanes, x);
    double total = 0;
    for (float lane : lanes) total += lane;
    return total;
  }

  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }

  // The first n lanes, the others zero; nothing beyond them is touched.
  static __m256i mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vector first(Vector x, int64_t n) { return _mm256_and_ps(x, _mm256_castsi256_ps(mask(n))); }
  static Vector load(const float* p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
  static Vector load(const BFloat16* p, int64_t n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, n)), 16));
  }
  static Vector load(const Float16* p, int64_t n) { return _mm256_cvtph_ps(load_halves(p, n)); }
  static void store(float* p, Vector x, int64_t n) { _mm256_maskstore_ps(p, mask(n), x); }
  static void store(BFloat16* p, Vector x, int64_t n) { store_halves(p, to_bf16(x), n); }
  static void store(Float16* p, Vector x, int64_t n) {
    store_halves(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
  }

  // One row of a tile; stream: past the caches, which needs 64-byte alignment.
  static void store_row(float* p, const Vector (&row)[kTileVectors], bool stream) {
    for (int v = 0; v < kTileVectors; ++v) {
      if (stream) {
        _mm256_stream_ps(p + v * kLanes, row[v]);
      } else {
        _mm256_storeu_ps(p + v * kLanes, row[v]);
      }
    }
  }
  static void store_row(BFloat16* p, const Vector (&row)[kTileVectors], bool) {
    for (int v = 0; v < kTileVectors; ++v) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + v * kLanes), to_bf16(row[v]));
    }
  }
  static constexpr bool can_stream(int64_t bytes) { return kTileVectors * kLanes * bytes >= 64; }
  static void fence() { _mm_sfence(); }

  static void transpose(Vector (&x)[kLanes]) {
    Vector y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2) {
      y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 4) {
      x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
      x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
      x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
      x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
      y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }

 private:
  template <class T>
  static __m128i load_halves(const T* p, int64_t n) {
    if (n == kLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    __m128i halves = _mm_setzero_si128();
    std::memcpy(&halves, p, static_cast<size_t>(n) * sizeof(T));
    return halves;
  }
  template <class T>
  static void store_halves(T* p, __m128i halves, int64_t n) {
    if (n == kLanes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
    } else {
      std::memcpy(p, &halves, static_cast<size_t>(n) * sizeof(T));
    }
  }

  static __m128i to_bf16(Vector x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 kept = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    const __m256i both = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), kept, nan));
    const __m256i upper = _mm256_srli_epi32(both, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
};

}  // namespace
}  // namespace prelora::cpu
