// What a softmax needs of eight floats at once: their largest, their exponentials, and some of them.

#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace vector {

using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Pairwise, as `sum` goes.
inline float largest(Floats x) {
  const auto pair = [](float a, float b) { return a > b ? a : b; };
  return pair(pair(pair(x[0], x[4]), pair(x[2], x[6])), pair(pair(x[1], x[5]), pair(x[3], x[7])));
}

// The first count lanes, and `other` in the rest.
inline Floats first(Floats x, int64_t count, float other) {
  constexpr Ints kPlaces = {0, 1, 2, 3, 4, 5, 6, 7};
  return kPlaces < static_cast<int32_t>(count) ? x : Floats{} + other;
}

// e^x for x <= 88, within 2 units in the last place; 0 below -87, where float32's normal numbers end.
// x = n log 2 + r with |r| <= log(2) / 2; e^r by its Taylor polynomial of degree 7, 2^n by its exponent's bits.
inline Floats exponential(Floats input) {
  constexpr float kLog2E = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // n times the high part is exact
  const Floats x = larger(input, Floats{} - 87.0f);
  const Floats n = (x * kLog2E + kRound) - kRound;
  const Floats r = (x - n * kLog2High) - n * kLog2Low;
  Floats series = r * (1.0f / 5040) + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r * r + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof scale);
  return input < -87.0f ? Floats{} : series * scale;
}

}  // namespace vector
