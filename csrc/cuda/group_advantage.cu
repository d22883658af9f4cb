// group_advantage: advantages, their broadcast to tokens, and the list of live responses, in one launch. Everything is
// computed in float64, with sums in a fixed order.
//
// A block serves a group (or a share of its tokens); the block that finishes last lists the live rows. Nothing can
// raise here: what is malformed is never followed out of bounds, the groups it touches get NaN, and every row and token
// is written whatever the offsets are.

#include <cmath>
#include <cstdint>

namespace r4b {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokensOfShare = 8192;
constexpr int kMostShares = 32;

enum Baseline : int { kUnion, kPerMode, kLeaveOneOut };

// Integers of 32 or 64 bits.
struct Integers {
  const void* data;
  bool wide;

  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Arguments {
  const void* rewards;  // float32 or float64 [N]
  bool wide_rewards;
  Integers group_offsets;  // [G + 1]
  Integers mode;           // [N]
  Integers token_offsets;  // [N + 1], or null
  int64_t num_rows, num_groups, num_tokens;
  Baseline baseline;
  bool std;
  double eps;
  float* advantage;        // [N]
  float* token_advantage;  // [num_tokens]
  bool* live;              // [N]
  int* live_rows;          // [N]
  int* num_live;           // [1], 0 at the start: until the end it counts the blocks that have finished

  __device__ double reward(int64_t row) const {
    return wide_rewards ? static_cast<const double*>(rewards)[row]
                        : static_cast<double>(static_cast<const float*>(rewards)[row]);
  }
};

struct Range {
  int64_t begin, end;
  bool bad;
};

__device__ int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// The rows of a group, and whether its offsets or its neighbours' are wrong. Clamped, and with the ends put where they
// belong, the ranges cover all rows.
__device__ Range rows_of(const Arguments& args, int64_t group) {
  const int64_t first = args.group_offsets[group], groups = args.num_groups, rows = args.num_rows;
  const int64_t last = group < groups ? args.group_offsets[group + 1] : -1;
  const int64_t before = group > 0 ? args.group_offsets[group - 1] : 0;
  const int64_t after = group + 2 <= groups ? args.group_offsets[group + 2] : rows;
  const bool final = group + 1 >= groups;
  return {group == 0 ? 0 : clamped(first, 0, rows), final ? rows : clamped(last, 0, rows),
          before > first || first > last || last > after || first < 0 || last > rows || (group == 0 && first != 0) ||
              (final && last != rows)};
}

// The tokens of a group's rows.
__device__ Range tokens_of(const Arguments& args, const Range& rows) {
  if (args.token_offsets.data == nullptr) return {0, 0, false};
  return {rows.begin == 0 ? 0 : clamped(args.token_offsets[rows.begin], 0, args.num_tokens),
          rows.end == args.num_rows ? args.num_tokens : clamped(args.token_offsets[rows.end], 0, args.num_tokens),
          false};
}

// The tokens of one row: those of a group's rows cover the group's and no others.
__device__ Range tokens_of_row(const Arguments& args, const Range& rows, const Range& tokens, int64_t row) {
  const int64_t first = args.token_offsets[row], last = args.token_offsets[row + 1];
  const int64_t begin = row == rows.begin ? tokens.begin : clamped(first, tokens.begin, tokens.end);
  const int64_t end = row + 1 == rows.end ? tokens.end : clamped(last, tokens.begin, tokens.end);
  return {begin, end, begin != first || end != last || begin > end};
}

// The same value in all threads: first over the lanes of a warp, then over the warps, always in the same order.
template <class Operation>
__device__ double reduce(double value, Operation operation) {
  __shared__ double of_warps[kWarps];
  for (int step = 16; step > 0; step /= 2) value = operation(value, __shfl_xor_sync(~0u, value, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < kWarps; ++warp) value = operation(value, of_warps[warp]);
  return value;
}

struct Statistics {
  double count, mean, lowest, highest, deviation;
};

// Of the rows in `set` (0 or 1 with per-mode baselines, else all rows).
__device__ Statistics describe(const Arguments& args, const Range& rows, int set) {
  const auto add = [](double a, double b) { return a + b; };
  const auto inside = [&](int64_t row) { return args.baseline != kPerMode || args.mode[row] == set; };
  double count = 0, total = 0, lowest = INFINITY, highest = -INFINITY;
  for (int64_t row = rows.begin + threadIdx.x; row < rows.end; row += kThreads) {
    if (!inside(row)) continue;
    const double reward = args.reward(row);
    count += 1;
    total += reward;
    lowest = fmin(lowest, reward);
    highest = fmax(highest, reward);
  }
  Statistics result{};
  result.count = reduce(count, add);
  result.lowest = reduce(lowest, [](double a, double b) { return fmin(a, b); });
  result.highest = reduce(highest, [](double a, double b) { return fmax(a, b); });
  result.mean = reduce(total, add) / fmax(result.count, 1.0);
  double squares = 0;
  for (int64_t row = rows.begin + threadIdx.x; row < rows.end; row += kThreads) {
    if (!inside(row)) continue;
    const double difference = args.reward(row) - result.mean;
    squares += difference * difference;
  }
  result.deviation = sqrt(reduce(squares, add) / fmax(result.count - 1.0, 1.0));
  return result;
}

__device__ float advantage_of(const Arguments& args, const Statistics& set, double reward) {
  if (!(set.lowest < set.highest)) return 0.0f;
  double difference = reward - set.mean;
  // r - mean of the others = (r - mean of all) n / (n - 1)
  if (args.baseline == kLeaveOneOut) difference *= set.count / (set.count - 1.0);
  return static_cast<float>(args.std ? difference / (set.deviation + args.eps) : difference);
}

// The live rows in order, then -1, by one block.
__device__ void list_live(const Arguments& args) {
  __shared__ int of_warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int listed = 0;
  for (int64_t base = 0; base < args.num_rows; base += kThreads) {
    const int64_t row = base + threadIdx.x;
    const bool live = row < args.num_rows && static_cast<const volatile bool*>(args.live)[row];
    const unsigned votes = __ballot_sync(~0u, live);
    __syncthreads();
    if (lane == 0) of_warps[warp] = __popc(votes);
    __syncthreads();
    int place = listed + __popc(votes & ((1u << lane) - 1));
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp) place += of_warps[other];
      listed += of_warps[other];
    }
    if (live) args.live_rows[place] = static_cast<int>(row);
  }
  for (int64_t row = listed + threadIdx.x; row < args.num_rows; row += kThreads) args.live_rows[row] = -1;
  if (threadIdx.x == 0) *args.num_live = listed;
}

// Grid (max(G, 1), shares).
__global__ void __launch_bounds__(kThreads, 2) advantages(const Arguments args) {
  const Range rows = rows_of(args, blockIdx.x), tokens = tokens_of(args, rows);
  bool bad = rows.bad;
  for (int64_t row = rows.begin + threadIdx.x; row < rows.end; row += kThreads) {
    const int64_t mode = args.mode[row];
    bad |= (mode != 0 && mode != 1) || !(fabs(args.reward(row)) < INFINITY);
    if (args.token_offsets.data != nullptr) bad |= tokens_of_row(args, rows, tokens, row).bad;
  }
  bad = __syncthreads_or(bad);
  const Statistics direct = describe(args, rows, 0);  // of all rows unless baselines are per mode
  Statistics thinking = direct;
  if (args.baseline == kPerMode) thinking = describe(args, rows, 1);

  const auto value_of = [&](int64_t row) -> float {
    if (bad) return NAN;
    return args.mode[row] == 1 ? advantage_of(args, thinking, args.reward(row))
                               : advantage_of(args, direct, args.reward(row));
  };
  if (blockIdx.y == 0) {
    for (int64_t row = rows.begin + threadIdx.x; row < rows.end; row += kThreads) {
      const float value = value_of(row);
      args.advantage[row] = value;
      args.live[row] = value != 0.0f;
    }
  }
  if (args.token_offsets.data != nullptr) {
    // A warp takes a row's every gridDim.y-th stretch of 32 tokens.
    const int lane = threadIdx.x % 32;
    for (int64_t row = rows.begin + threadIdx.x / 32; row < rows.end; row += kWarps) {
      const Range own = tokens_of_row(args, rows, tokens, row);
      const float value = value_of(row);
      for (int64_t token = own.begin + blockIdx.y * 32 + lane; token < own.end; token += gridDim.y * 32) {
        args.token_advantage[token] = value;
      }
    }
  }

  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(args.num_live, 1) == static_cast<int>(gridDim.x * gridDim.y) - 1;
  __syncthreads();
  if (last) {
    __threadfence();
    list_live(args);
  }
}

}  // namespace
}  // namespace r4b

#ifdef USE_CUDA
#include "cuda/launch.h"

namespace {

using namespace r4b;

Integers integers(const Tensor& tensor, int64_t numel, const char* rule) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  check((wide || tensor.scalar_type() == ScalarType::Int) && tensor.numel() == numel && tensor.is_contiguous(), rule);
  return {tensor.const_data_ptr(), wide};
}

// Rewards float32 or float64 [N], the integers int32 or int64; baseline 0 union, 1 per_mode, 2 leave_one_out.
void group_advantage(
    const Tensor& rewards, const Tensor& group_offsets, const Tensor& mode,
    const std::optional<Tensor>& token_offsets, int64_t baseline, bool std, double eps, const Tensor& advantage,
    const Tensor& token_advantage, const Tensor& live, const Tensor& live_rows, const Tensor& num_live) {
  const int64_t rows = rewards.numel(), groups = group_offsets.numel() - 1;
  const bool wide = rewards.scalar_type() == ScalarType::Double;
  check((wide || rewards.scalar_type() == ScalarType::Float) && rewards.is_contiguous(),
        "rewards must be float32 or float64 [N]");
  check(rows < INT32_MAX && groups >= 0 && groups < INT32_MAX / kMostShares, "the rows and groups must fit 32 bits");
  check(baseline >= kUnion && baseline <= kLeaveOneOut, "baseline must be 0, 1 or 2");
  check_tensor(advantage, ScalarType::Float, rows, "advantage must be float32 [N]");
  check_tensor(token_advantage, ScalarType::Float, token_advantage.numel(), "token_advantage must be float32 [T]");
  check_tensor(live, ScalarType::Bool, rows, "live must be bool [N]");
  check_tensor(live_rows, ScalarType::Int, rows, "live_rows must be int32 [N]");
  check_tensor(num_live, ScalarType::Int, 1, "num_live must be int32 [1]");
  const DeviceGuard guard(rewards);
  const Arguments args{
      rewards.const_data_ptr(),
      wide,
      integers(group_offsets, groups + 1, "group_offsets must be int32 or int64 [G + 1]"),
      integers(mode, rows, "mode must be int32 or int64 [N]"),
      token_offsets ? integers(*token_offsets, rows + 1, "token_offsets must be int32 or int64 [N + 1]")
                    : Integers{nullptr, false},
      rows,
      groups,
      token_advantage.numel(),
      static_cast<Baseline>(baseline),
      std,
      eps,
      advantage.mutable_data_ptr<float>(),
      token_advantage.mutable_data_ptr<float>(),
      live.mutable_data_ptr<bool>(),
      live_rows.mutable_data_ptr<int>(),
      num_live.mutable_data_ptr<int>()};
  STD_CUDA_CHECK(cudaMemsetAsync(args.num_live, 0, sizeof(int), guard.stream()));
  const int64_t blocks = groups > 0 ? groups : 1, shares = args.num_tokens / (blocks * kTokensOfShare);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(shares < 1 ? 1 : shares > kMostShares ? kMostShares : shares));
  advantages<<<grid, kThreads, 0, guard.stream()>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "group_advantage(Tensor rewards, Tensor group_offsets, Tensor mode, Tensor? token_offsets, int baseline, "
      "bool std, float eps, Tensor(a!) advantage, Tensor(b!) token_advantage, Tensor(c!) live, Tensor(d!) live_rows, "
      "Tensor(e!) num_live) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CUDA, library) { library.impl("group_advantage", TORCH_BOX(&group_advantage)); }
#endif
