// prefix_schedule: the tiles of prefix_attention (prefix_tiles.h) from a layout on the device, in one launch of one
// block. Most keys first, so that the blocks of the attention end together. Integers only: the same layout gives the
// same list, whatever the order of threads.

#include <climits>
#include <cstdint>

#include "cuda/prefix_tiles.h"

namespace r4b {
namespace {

constexpr int kCostClasses = 64;

struct Sum {
  __device__ int operator()(int a, int b) const { return a + b; }
};
struct Max {
  __device__ int operator()(int a, int b) const { return a > b ? a : b; }
};

// Inclusive scan over the block, continued from `carry`; `carry` becomes the last thread's result.
template <int kThreads, class Operation>
__device__ int scan(int value, int& carry, Operation operation) {
  __shared__ int of_warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value = operation(value, other);
  }
  __syncthreads();
  if (lane == 31) of_warps[warp] = value;
  __syncthreads();
  int total = carry;
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other == warp) value = operation(total, value);
    total = operation(total, of_warps[other]);
  }
  carry = total;
  return value;
}

// The segments as the schedule sees them: one more, the padding from offsets[S] to T, which has no keys.
struct Layout {
  const int* offsets;  // [S + 1]
  const int* parent;   // [S]
  int num_segments, num_tokens;

  __device__ int begin(int segment) const { return offsets[segment]; }
  __device__ int end(int segment) const { return segment < num_segments ? offsets[segment + 1] : num_tokens; }
  __device__ bool starts_run(int segment) const {
    return segment == 0 || segment == num_segments || parent[segment] != parent[segment - 1];
  }
  __device__ bool malformed(int segment) const {
    const int owner = parent[segment];
    return offsets[segment] < 0 || offsets[segment] > offsets[segment + 1] || (segment == 0 && offsets[0] != 0) ||
           offsets[segment + 1] > num_tokens || owner < -1 || owner >= segment || (owner >= 0 && parent[owner] != -1);
  }
};

__device__ int cost(const PrefixTile& tile) {
  return tile.parent_end - tile.parent_begin + tile.own_end - tile.own_begin;
}

// Rows [index * rows, ...) of a malformed layout, or an empty tile past the last of them.
__device__ PrefixTile broken_tile(const Layout& layout, int rows, int index) {
  PrefixTile tile{};
  tile.row_begin = static_cast<int>(min(static_cast<int64_t>(index) * rows, static_cast<int64_t>(layout.num_tokens)));
  tile.row_end = min(tile.row_begin + rows, layout.num_tokens);
  tile.flags = kPadding | kBroken;
  return tile;
}

// Tile `index`: `before[s]` tiles begin before segment s, whose run begins with segment run[s].
__device__ PrefixTile make_tile(const Layout& layout, const int* before, const int* run, int rows, int index) {
  int segment = 0, high = layout.num_segments;  // the last segment before which at most `index` tiles begin
  while (segment < high) {
    const int middle = (segment + high + 1) / 2;
    if (before[middle] <= index) segment = middle;
    else high = middle - 1;
  }
  PrefixTile tile{};
  tile.segment = run[segment];
  const int run_begin = layout.begin(tile.segment);
  tile.row_begin =
      run_begin + (ceil_div(layout.begin(segment) - run_begin, rows) + index - before[segment]) * rows;
  int last = segment;
  while (layout.end(last) < tile.row_begin + rows && last + 1 < layout.num_segments && !layout.starts_run(last + 1)) {
    ++last;
  }
  tile.row_end = min(tile.row_begin + rows, layout.end(last));
  if (segment == layout.num_segments) {
    tile.flags = kPadding;
    return tile;
  }
  tile.own_begin = layout.begin(segment);
  tile.own_end = tile.row_end;
  if (layout.end(segment) < tile.row_end) tile.flags = kStraddles;
  if (const int owner = layout.parent[segment]; owner >= 0) {
    tile.parent_begin = layout.begin(owner);
    tile.parent_end = layout.end(owner);
  }
  return tile;
}

// tiles [slots], scratch int32 [2 (S + 1) + 9 slots]. A malformed layout gives tiles over all T rows that are marked
// so: nothing is read or written out of bounds, and the attention's output is NaN.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) build_schedule(
    Layout layout, int rows, int slots, PrefixTile* tiles, int* scratch) {
  int* before = scratch;
  int* run = before + layout.num_segments + 1;
  int* classes = run + layout.num_segments + 1;
  int* unsorted = classes + slots;  // field after field of PrefixTile [slots]
  const int thread = threadIdx.x;

  bool bad = layout.num_segments == 0 && layout.offsets[0] != 0;
  for (int segment = thread; segment < layout.num_segments; segment += kThreads) bad |= layout.malformed(segment);
  if (__syncthreads_or(bad)) {
    for (int index = thread; index < slots; index += kThreads) tiles[index] = broken_tile(layout, rows, index);
    return;
  }

  int run_carry = 0, total = 0;
  for (int base = 0; base <= layout.num_segments; base += kThreads) {
    const int segment = base + thread;
    const bool real = segment <= layout.num_segments;
    const int first = scan<kThreads>(real && layout.starts_run(segment) ? segment : 0, run_carry, Max{});
    int begins = 0;  // tiles whose first row lies in the segment
    if (real) {
      const int run_begin = layout.begin(first);
      begins = ceil_div(layout.end(segment) - run_begin, rows) - ceil_div(layout.begin(segment) - run_begin, rows);
    }
    const int after = scan<kThreads>(begins, total, Sum{});
    if (real) {
      before[segment] = after - begins;
      run[segment] = first;
    }
  }
  __syncthreads();

  // A stable counting sort by class of cost.
  __shared__ int largest, first_of_class[kCostClasses];
  if (thread == 0) largest = 1;
  for (int i = thread; i < kCostClasses; i += kThreads) first_of_class[i] = 0;
  __syncthreads();
  for (int index = thread; index < total; index += kThreads) {
    const PrefixTile tile = make_tile(layout, before, run, rows, index);
    const int fields[kTileInts] = {tile.row_begin, tile.row_end, tile.parent_begin, tile.parent_end,
                                   tile.own_begin, tile.own_end, tile.flags,        tile.segment};
    for (int i = 0; i < kTileInts; ++i) unsorted[i * slots + index] = fields[i];
    classes[index] = cost(tile);
    atomicMax(&largest, cost(tile));
  }
  __syncthreads();
  for (int index = thread; index < total; index += kThreads) {
    const int share = static_cast<int>(static_cast<int64_t>(classes[index]) * (kCostClasses - 1) / largest);
    classes[index] = kCostClasses - 1 - share;
    atomicAdd(&first_of_class[classes[index]], 1);
  }
  __syncthreads();
  if (thread == 0) {
    for (int i = 0, sum = 0; i < kCostClasses; ++i) {
      const int size = first_of_class[i];
      first_of_class[i] = sum;
      sum += size;
    }
  }
  __syncthreads();
  for (int wanted = thread / 32; wanted < kCostClasses; wanted += kThreads / 32) {
    int place = first_of_class[wanted];
    for (int base = 0; base < total; base += 32) {
      const int lane = thread % 32, index = base + lane;
      const bool match = index < total && classes[index] == wanted;
      const unsigned matches = __ballot_sync(~0u, match);
      if (match) {
        const auto field = [&](int i) { return unsorted[i * slots + index]; };
        tiles[place + __popc(matches & ((1u << lane) - 1))] = {field(0), field(1), field(2), field(3),
                                                               field(4), field(5), field(6), field(7)};
      }
      place += __popc(matches);
    }
  }
  for (int index = total + thread; index < slots; index += kThreads) tiles[index] = PrefixTile{};
}

}  // namespace
}  // namespace r4b

#ifdef USE_CUDA
#include "cuda/launch.h"

namespace {

constexpr int kThreads = 1024;

// offsets int32 [S + 1], parent int32 [S]; tiles int32 [slots, 8], of at most `rows` rows each.
void prefix_schedule(
    const Tensor& offsets, const Tensor& parent, int64_t num_tokens, int64_t rows, const Tensor& tiles,
    const Tensor& scratch) {
  using namespace r4b;
  const int64_t segments = parent.numel(), slots = num_slots(num_tokens, segments, rows);
  check(rows > 0 && num_tokens >= 0 && num_tokens + rows < INT_MAX && (2 + kTileInts) * slots < INT_MAX,
        "num_tokens and rows must fit 32 bits");
  check_tensor(offsets, ScalarType::Int, segments + 1, "offsets must be int32 [S + 1]");
  check_tensor(parent, ScalarType::Int, segments, "parent must be int32 [S]");
  check_tensor(tiles, ScalarType::Int, slots * kTileInts, "tiles must be int32 [T / rows + S + 2, 8]");
  check_tensor(scratch, ScalarType::Int, 2 * (segments + 1) + (1 + kTileInts) * slots,
               "scratch must be int32 [2 (S + 1) + 9 slots]");
  const DeviceGuard guard(offsets);
  const Layout layout{offsets.const_data_ptr<int>(), parent.const_data_ptr<int>(), static_cast<int>(segments),
                      static_cast<int>(num_tokens)};
  build_schedule<kThreads><<<1, kThreads, 0, guard.stream()>>>(
      layout, static_cast<int>(rows), static_cast<int>(slots), static_cast<PrefixTile*>(tiles.mutable_data_ptr()),
      scratch.mutable_data_ptr<int>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "prefix_schedule(Tensor offsets, Tensor parent, int num_tokens, int rows, Tensor(a!) tiles, Tensor(b!) scratch) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CUDA, library) { library.impl("prefix_schedule", TORCH_BOX(&prefix_schedule)); }
#endif
