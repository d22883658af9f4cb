// group_advantage in float64: each group in two passes, its members in order.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "stable.h"

namespace {

enum Baseline : int64_t { kUnion, kPerMode, kLeaveOneOut };

// The advantages of the members in [start, stop) whose mode is `mode`, or of all if that is negative.
void of_set(
    const double* rewards, const int64_t* modes, int64_t start, int64_t stop, int64_t mode, bool leave_one_out,
    bool divide, double eps, double* out) {
  const auto each = [&](auto visit) {
    for (int64_t n = start; n < stop; ++n) {
      if (mode < 0 || modes[n] == mode) visit(n);
    }
  };
  double count = 0.0, total = 0.0, lowest = INFINITY, highest = -INFINITY;
  each([&](int64_t n) {
    count += 1.0;
    total += rewards[n];
    lowest = std::min(lowest, rewards[n]);
    highest = std::max(highest, rewards[n]);
  });
  if (count < 2.0 || lowest == highest) {
    each([&](int64_t n) { out[n] = 0.0; });
    return;
  }
  const double mean = total / count;
  double squares = 0.0;
  each([&](int64_t n) { squares += (rewards[n] - mean) * (rewards[n] - mean); });
  // r - mean of the others = (r - mean of all) n / (n - 1)
  const double factor = leave_one_out ? count / (count - 1.0) : 1.0;
  const double deviation = divide ? std::sqrt(squares / (count - 1.0)) + eps : 1.0;
  each([&](int64_t n) { out[n] = (rewards[n] - mean) * factor / deviation; });
}

// rewards float64 [N], group_offsets int64 [G + 1], mode int64 [N] -> out float64 [N].
void forward(
    const Tensor& rewards, const Tensor& group_offsets, const Tensor& mode, int64_t baseline, bool divide, double eps,
    const Tensor& out) {
  const int64_t* offsets = group_offsets.const_data_ptr<int64_t>();
  const double* reward = rewards.const_data_ptr<double>();
  const int64_t* modes = mode.const_data_ptr<int64_t>();
  double* to = out.mutable_data_ptr<double>();
  for (int64_t group = 0; group + 1 < group_offsets.numel(); ++group) {
    const int64_t start = offsets[group], stop = offsets[group + 1];
    if (baseline == kPerMode) {
      for (const int64_t one : {0, 1}) of_set(reward, modes, start, stop, one, false, divide, eps, to);
    } else {
      of_set(reward, modes, start, stop, -1, baseline == kLeaveOneOut, divide, eps, to);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "group_advantage(Tensor rewards, Tensor group_offsets, Tensor mode, int baseline, bool divide, float eps, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CPU, library) { library.impl("group_advantage", TORCH_BOX(&forward)); }
