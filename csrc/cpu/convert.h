// 16-bit floats and their conversions: nearest-even, subnormals kept, a NaN stays one with its sign and top bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace prelora::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }

inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 0x3ffu;
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction ? 0x400000u : 0u) | fraction << 13);
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void narrow(float x, Float16& to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the last bit of 0.5 + x is worth a half's smallest subnormal
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace prelora::cpu
