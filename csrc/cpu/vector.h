// Rows of float32 in vectors of eight, by the vector extension of GCC and Clang: AVX on x86-64, NEON on arm64.

#pragma once

#include <cstdint>
#include <cstring>

namespace vector {

constexpr int64_t kLanes = 8;

using Floats = float __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The first count < kLanes floats, and zeros.
inline Floats load(const float* from, int64_t count) {
  Floats x{};
  std::memcpy(&x, from, count * sizeof(float));
  return x;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline void store(float* to, Floats x, int64_t count) { std::memcpy(to, &x, count * sizeof(float)); }

// Pairwise, always in this order.
inline float sum(Floats x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// Calls block(i, take, put) for every whole vector of a row of n floats, then once for the rest: take(row) loads row's
// part at i (zeros past the end), put(row, x) stores it.
template <class Block>
inline void for_each(int64_t n, const Block& block) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    block([i](const float* row) { return load(row + i); }, [i](float* row, Floats x) { store(row + i, x); });
  }
  if (const int64_t rest = n - i; rest > 0) {
    block(
        [i, rest](const float* row) { return load(row + i, rest); },
        [i, rest](float* row, Floats x) { store(row + i, x, rest); });
  }
}

}  // namespace vector
