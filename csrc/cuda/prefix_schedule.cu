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
    return segment == 0 || segment == num_segments || parent[segment] < 0 || parent[segment] != parent[segment - 1];
  }
  __device__ bool malformed(int segment) const {
    const int owner = parent[segment];
    return offsets[segment] < 0 || offsets[segment] > offsets[segment + 1] || (segment == 0 && offsets[0] != 0) ||
           offsets[segment + 1] > num_tokens || owner < -1 || owner >= segment || (owner >= 0 && parent[owner] != -1);
  }
};

__device__ int cost(const PrefixTile& tile) {
  return tile.parent_end - tile.parent_begin + tile.row_end - tile.own_begin;
}

// Tile `index` of the segment list; of_segment[s] tiles begin before segment s, whose run begins at run_begin[s].
__device__ PrefixTile make_tile(const Layout& layout, const int* of_segment, const int* run_begin, int index) {
  int low = 0, high = layout.num_segments;  // the last segment before which at most `index` tiles begin
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (of_segment[middle] <= index) low = middle;
    else high = middle - 1;
  }
  const int run = run_begin[low];
  PrefixTile tile{};
  tile.row_begin = run + (ceil_div(layout.begin(low) - run, kTileRows) + index - of_segment[low]) * kTileRows;
  const int full = tile.row_begin + kTileRows;
  int stop = low + 1;
  while (layout.end(stop - 1) < full && stop < layout.num_segments && !layout.starts_run(stop)) ++stop;
  tile.row_end = min(full, layout.end(stop - 1));
  tile.first_segment = low;
  tile.end_segment = stop;
  tile.own_begin = low < layout.num_segments ? layout.begin(low) : tile.row_end;
  if (const int owner = low < layout.num_segments ? layout.parent[low] : -1; owner >= 0) {
    tile.parent_begin = layout.begin(owner);
    tile.parent_end = layout.end(owner);
  }
  return tile;
}

// tiles [capacity], count [1], scratch [2 (S + 1) + 9 capacity] integers. A malformed layout gives tiles over all T rows
// that are marked so: nothing is read or written out of bounds, and the attention's output is NaN.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) build_schedule(
    Layout layout, int capacity, PrefixTile* tiles, int* count, int* scratch) {
  int* of_segment = scratch;
  int* run_begin = of_segment + layout.num_segments + 1;
  int* classes = run_begin + layout.num_segments + 1;
  int* unsorted = classes + capacity;  // PrefixTile [capacity], as integers: not aligned
  const int thread = threadIdx.x;

  bool bad = layout.num_segments == 0 && layout.offsets[0] != 0;
  for (int segment = thread; segment < layout.num_segments; segment += kThreads) bad |= layout.malformed(segment);
  if (__syncthreads_or(bad)) {
    const int total = ceil_div(layout.num_tokens, kTileRows);
    for (int index = thread; index < total; index += kThreads) {
      PrefixTile tile{};
      tile.row_begin = index * kTileRows;
      tile.row_end = min(tile.row_begin + kTileRows, layout.num_tokens);
      tile.own_begin = tile.row_end;
      tile.malformed = 1;
      tiles[index] = tile;
    }
    if (thread == 0) *count = total;
    return;
  }

  int run_carry = 0, total = 0;
  for (int base = 0; base <= layout.num_segments; base += kThreads) {
    const int segment = base + thread;
    const bool real = segment <= layout.num_segments;
    const int run =
        scan<kThreads>(real && layout.starts_run(segment) ? layout.begin(segment) : 0, run_carry, Max{});
    int begins = 0;  // tiles whose first row lies in the segment
    if (real) {
      begins = ceil_div(layout.end(segment) - run, kTileRows) - ceil_div(layout.begin(segment) - run, kTileRows);
    }
    const int after = scan<kThreads>(begins, total, Sum{});
    if (real) {
      of_segment[segment] = after - begins;
      run_begin[segment] = run;
    }
  }
  __syncthreads();

  // A stable counting sort by class of cost.
  __shared__ int largest, first_of_class[kCostClasses];
  if (thread == 0) largest = 1;
  for (int i = thread; i < kCostClasses; i += kThreads) first_of_class[i] = 0;
  __syncthreads();
  for (int index = thread; index < total; index += kThreads) {
    const PrefixTile tile = make_tile(layout, of_segment, run_begin, index);
    const int fields[kTileInts] = {tile.row_begin,    tile.row_end,    tile.first_segment, tile.end_segment,
                                   tile.parent_begin, tile.parent_end, tile.own_begin,     tile.malformed};
    for (int i = 0; i < kTileInts; ++i) unsorted[i * capacity + index] = fields[i];
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
    for (int i = 0, before = 0; i < kCostClasses; ++i) {
      const int size = first_of_class[i];
      first_of_class[i] = before;
      before += size;
    }
    *count = total;
  }
  __syncthreads();
  for (int wanted = thread / 32; wanted < kCostClasses; wanted += kThreads / 32) {
    int place = first_of_class[wanted];
    for (int base = 0; base < total; base += 32) {
      const int lane = thread % 32, index = base + lane;
      const bool match = index < total && classes[index] == wanted;
      const unsigned matches = __ballot_sync(~0u, match);
      if (match) {
        const auto field = [&](int i) { return unsorted[i * capacity + index]; };
        tiles[place + __popc(matches & ((1u << lane) - 1))] = {field(0), field(1), field(2), field(3),
                                                               field(4), field(5), field(6), field(7)};
      }
      place += __popc(matches);
    }
  }
}

}  // namespace
}  // namespace r4b

#ifdef USE_CUDA
#include "cuda/launch.h"

namespace {

constexpr int kThreads = 1024;

// offsets int32 [S + 1], parent int32 [S]; tiles int32 [capacity, 8], count int32 [1].
void prefix_schedule(
    const Tensor& offsets, const Tensor& parent, int64_t num_tokens, const Tensor& tiles, const Tensor& count) {
  using namespace r4b;
  const int64_t segments = parent.numel(), capacity = most_tiles(num_tokens, segments);
  check(num_tokens >= 0 && num_tokens + kTileRows < INT_MAX, "num_tokens must fit 32 bits");
  check_tensor(offsets, torch::headeronly::ScalarType::Int, segments + 1, "offsets must be int32 [S + 1]");
  check_tensor(parent, torch::headeronly::ScalarType::Int, segments, "parent must be int32 [S]");
  check_tensor(tiles, torch::headeronly::ScalarType::Int, capacity * kTileInts, "tiles must be int32 [capacity, 8]");
  check_tensor(count, torch::headeronly::ScalarType::Int, 1, "count must be int32 [1]");
  const DeviceGuard guard(offsets);
  const Tensor scratch = torch::stable::new_empty(offsets, {2 * (segments + 1) + (1 + kTileInts) * capacity});
  const Layout layout{offsets.const_data_ptr<int>(), parent.const_data_ptr<int>(), static_cast<int>(segments),
                      static_cast<int>(num_tokens)};
  build_schedule<kThreads><<<1, kThreads, 0, guard.stream()>>>(
      layout, static_cast<int>(capacity), static_cast<PrefixTile*>(tiles.mutable_data_ptr()),
      count.mutable_data_ptr<int>(), scratch.mutable_data_ptr<int>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "prefix_schedule(Tensor offsets, Tensor parent, int num_tokens, Tensor(a!) tiles, Tensor(b!) count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CUDA, library) { library.impl("prefix_schedule", TORCH_BOX(&prefix_schedule)); }
#endif
