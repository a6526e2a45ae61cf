// csrc/cuda/device.h for a CPU: asynchronous copies that come late, tensor cores that round towards zero, conversions.
#pragma once

#include "host_cuda.h"

namespace host_cuda {

inline void finish(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
}

inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The tensor cores ignore the bits that tf32 lacks.
inline float as_tf32(uint32_t bits) { return of_bits(bits & 0xffffe000u); }

inline float towards_zero(double exact) {
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// 16 x 8 += (16 x 8) * (8 x 8), the layout as in device.h; a sum rounded towards zero, as the device's.
HOST_CUDA_UNSEEN inline void multiply(Offer* lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = as_tf32(lanes[lane].a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = as_tf32(lanes[lane].b[i]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double exact = lanes[lane].sum[i];
      for (int k = 0; k < 8; ++k) exact += static_cast<double>(a[row][k]) * b[k][column];
      lanes[lane].sum[i] = towards_zero(exact);
    }
  }
}

HOST_CUDA_UNSEEN inline void add_up(Offer* lanes) {
  for (int offset = 16; offset > 0; offset /= 2) {
    float sums[kWarp];
    for (int i = 0; i < kWarp; ++i) sums[i] = lanes[i].value + lanes[i ^ offset].value;
    for (int i = 0; i < kWarp; ++i) lanes[i].value = sums[i];
  }
}

}  // namespace host_cuda

namespace prelora::cuda {

// The first to ask allocates, so that AddressSanitizer knows where it ends.
template <int kBytes>
unsigned char* shared_memory() {
  std::vector<unsigned char>& shared = host_cuda::block->shared;
  host_cuda::order_after(&shared);
  if (shared.empty()) {
    shared.assign(kBytes, 0xff);
    host_cuda::order_before(&shared);
  }
  return shared.data();
}

template <typename T>
T* global(T* address) {
  return address;
}

inline void copy_16(void* shared, const void* global, int valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    host_cuda::fail("an asynchronous copy that is not aligned to 16 bytes");
  }
  if (valid < 0 || valid > 16) host_cuda::fail("an asynchronous copy of other than 0 to 16 bytes");
  std::memset(shared, 0xff, 16);
  host_cuda::thread->groups.back().push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), valid});
}

inline void commit_copies() { host_cuda::thread->groups.emplace_back(); }

template <int kPending>
void wait_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host_cuda::Sites& waits = host_cuda::control().waits;
  if (host_cuda::number_of(waits, file, line) == waits.skipped) return;
  auto& groups = host_cuda::thread->groups;
  while (groups.size() > kPending + 1) {
    for (const host_cuda::Copy& copy : groups.front()) host_cuda::finish(copy);
    groups.erase(groups.begin());
  }
}

HOST_CUDA_UNSEEN inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host_cuda::thread->offer = {host_cuda::multiply, sum, a, b, 0.0f};
  host_cuda::stop(host_cuda::State::kInWarp);
}

HOST_CUDA_UNSEEN inline float sum_of_warp(float x) {
  host_cuda::thread->offer = {host_cuda::add_up, nullptr, nullptr, nullptr, x};
  host_cuda::stop(host_cuda::State::kInWarp);
  return host_cuda::thread->offer.value;
}

inline float float_of_bits(uint32_t bits) { return host_cuda::of_bits(bits); }
inline uint32_t bits_of_float(float x) { return host_cuda::bits_of(x); }

inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = host_cuda::bits_of(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

inline float half_to_float(uint32_t bits) {
  const auto low = static_cast<uint16_t>(bits);
  _Float16 x;
  std::memcpy(&x, &low, 2);
  return static_cast<float>(x);
}

inline uint32_t half_bits(float x) {
  const auto half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline uint32_t bfloat_bits(float x) {
  const uint32_t bits = host_cuda::bits_of(x);
  return std::isnan(x) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t pack_bfloats(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }

}  // namespace prelora::cuda
