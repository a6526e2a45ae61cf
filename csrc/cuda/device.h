// What kernels ask of the device beyond C++. tests/csrc/host_cuda.h has each function again, for a CPU.
#pragma once

#include <cstdint>

namespace prelora::cuda {

// A block's shared memory, all of it: one call site for each kernel.
template <int kBytes>
__device__ __forceinline__ unsigned char* shared_memory() {
  __shared__ __align__(16) unsigned char bytes[kBytes];
  return bytes;
}

// The same address, known to be in global memory: the compiler cannot see that of one that it read from a table.
template <typename T>
__device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// Begins to copy 16 bytes, of which those after the first `valid` are zeros instead; with none valid nothing is read.
// Past L1: tiles are read once by a block, and again by others only.
__device__ __forceinline__ void copy_16(void* shared, const void* global, int valid) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
}

// Makes a group of this thread's copies since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until of this thread's groups at most the last `kPending` are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// sum (16 x 8) += a (16 x 8) * b (8 x 8), by one warp. Of lane 4g + t: a is (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4); b is (t, g), (t + 4, g); sum is (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To the nearest number of 11 significant bits, as fp32's bits.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }

__device__ __forceinline__ float half_to_float(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

// Both rounded to nearest even, `low` in the low half.
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ uint32_t pack_bfloats(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// The sum over a warp's lanes, in one order, to all of them.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace prelora::cuda
