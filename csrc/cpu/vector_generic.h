// Eight fp32 lanes in what every compiler turns into the vectors of its target.
#pragma once

#include "convert.h"

namespace prelora::cpu {
namespace {

struct Generic {
  static constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 1;
  static constexpr int kTerms = 1;  // of the summed dimension in one lane of a packed vector
  struct Vector {
    float lane[kLanes];
  };

  static Vector zero() { return {}; }
  static Vector all(float x) {
    Vector y;
    for (float& lane : y.lane) lane = x;
    return y;
  }
  static Vector multiply(Vector x, Vector y) {
    for (int i = 0; i < kLanes; ++i) x.lane[i] *= y.lane[i];
    return x;
  }
  static Vector add(Vector x, Vector y) {
    for (int i = 0; i < kLanes; ++i) x.lane[i] += y.lane[i];
    return x;
  }
  static Vector fma(Vector x, Vector y, Vector z) {
    for (int i = 0; i < kLanes; ++i) z.lane[i] += x.lane[i] * y.lane[i];
    return z;
  }
  static Vector accumulate(Vector x, Vector y, Vector z) { return fma(x, y, z); }
  static double sum(Vector x) {
    double total = 0;
    for (float lane : x.lane) total += lane;
    return total;
  }

  static Vector load(const float* p) { return load(p, kLanes); }
  static void store(float* p, Vector x) { store(p, x, kLanes); }

  // The first n lanes, the others zero; nothing beyond them is touched.
  static Vector first(Vector x, int64_t n) {
    for (int64_t i = n; i < kLanes; ++i) x.lane[i] = 0;
    return x;
  }
  template <class T>
  static Vector load(const T* p, int64_t n) {
    Vector x = zero();
    for (int64_t i = 0; i < n; ++i) x.lane[i] = widen(p[i]);
    return x;
  }
  template <class T>
  static void store(T* p, Vector x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) narrow(x.lane[i], p[i]);
  }

  template <class T>
  static void store_row(T* p, const Vector (&row)[kTileVectors], bool) {
    for (int v = 0; v < kTileVectors; ++v) store(p + v * kLanes, row[v], kLanes);
  }
  static constexpr bool can_stream(int64_t) { return false; }
  static void fence() {}

  static void transpose(Vector (&x)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float swap = x[i].lane[j];
        x[i].lane[j] = x[j].lane[i];
        x[j].lane[i] = swap;
      }
    }
  }
};

}  // namespace
}  // namespace prelora::cpu
