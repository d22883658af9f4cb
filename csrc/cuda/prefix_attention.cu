// prefix_attention forward on Hopper: bfloat16, D = 64 or 128, tiles from prefix_schedule.
//
// A persistent block of three warpgroups. The first only issues TMA loads: a tile's Q once, then its blocks of K and V
// through rings of kStages. The other two own 64 query rows each: S = Q K^T from shared memory, online softmax in
// registers, O += P V with P as register operand. The product of block j's scores and that of block j - 1's values are
// in flight together while block j's softmax runs, and the two warpgroups take turns to issue, so that one computes
// exponentials while the other multiplies (FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2).

#include <cmath>
#include <cstdint>

#include "cuda/hopper.cuh"
#include "cuda/prefix_tiles.h"

namespace r4b {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kRows = kTileRows / kConsumers;  // of a consumer
constexpr int kStages = 3;
constexpr float kLog2E = 1.4426950408889634f;

struct Arguments {
  const PrefixTile* tiles;  // [slots]
  const int* offsets;       // [S + 1]
  uint16_t* out;  // bfloat16 [T, Hq, D]
  float* lse;     // [T, Hq]
  int slots, num_segments;         // of the list of tiles; S
  int num_heads, queries_per_key;  // Hq, Hq / Hk
  float scale;                     // > 0
};

// Byte offsets in shared memory.
template <int kHeadDim>
struct Shared {
  static constexpr uint32_t kTile = 128 * kHeadDim * 2;  // one tile of Q, K or V
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kTile;
  static constexpr uint32_t kV = kK + kStages * kTile;
  static constexpr uint32_t kBarriers = kV + kStages * kTile;
  static constexpr uint32_t kBytes = kBarriers + (2 + 4 * kStages) * 8;
  static constexpr uint32_t kAllocated = kBytes + kSwizzleAtom;  // room to align

  static constexpr uint32_t q_full() { return kBarriers; }
  static constexpr uint32_t q_empty() { return kBarriers + 8; }
  static constexpr uint32_t k_full(int stage) { return kBarriers + 16 + 8 * stage; }
  static constexpr uint32_t v_full(int stage) { return k_full(kStages + stage); }
  static constexpr uint32_t k_empty(int stage) { return k_full(2 * kStages + stage); }
  static constexpr uint32_t v_empty(int stage) { return k_full(3 * kStages + stage); }
};

// Position in a ring: the slot, and the parity of the round.
struct Slot {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A tile for one query head.
struct Item {
  PrefixTile tile;
  int head;
};

// Item `turn` of this block; false past the last. Rounds over the blocks, every other one backwards, because the tiles
// with most keys come first. The heads of a tile are neighbours and share its keys.
__device__ bool next_item(const Arguments& args, int turn, Item& item) {
  const int column = turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int index = turn * gridDim.x + column;
  const int place = index / args.num_heads;
  if (place >= args.slots) return false;
  item.tile = args.tiles[place];
  item.head = index - place * args.num_heads;
  return item.tile.row_begin < item.tile.row_end;
}

template <int kHeadDim>
__device__ void load_tile(
    uint32_t destination, const TensorMap* map, uint32_t full_barrier, int head, int first_row) {
  barrier_arrive_expecting(full_barrier, Shared<kHeadDim>::kTile);
  for (int panel = 0; panel < kHeadDim / kPanelColumns; ++panel) {
    tma_load(destination + panel * kTileKeys * kPanelLine, map, full_barrier, panel * kPanelColumns, head, first_row);
  }
}

template <int kHeadDim>
__device__ void produce(
    uint32_t shared, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map, const Arguments& args) {
  using Layout = Shared<kHeadDim>;
  Item item;
  Slot slot;
  uint32_t q_parity = 0;
  for (int turn = 0; next_item(args, turn, item); ++turn) {
    const int blocks = key_blocks(item.tile);
    if (blocks == 0) continue;
    barrier_wait(shared + Layout::q_empty(), q_parity ^ 1);
    load_tile<kHeadDim>(shared + Layout::kQ, q_map, shared + Layout::q_full(), item.head,
                        item.tile.row_begin);
    q_parity ^= 1;
    for (int j = 0; j < blocks; ++j, slot.advance()) {
      const int key = key_block(item.tile, j).begin, key_head = item.head / args.queries_per_key;
      const uint32_t offset = slot.stage * Layout::kTile;
      barrier_wait(shared + Layout::k_empty(slot.stage), slot.parity ^ 1);
      load_tile<kHeadDim>(shared + Layout::kK + offset, k_map, shared + Layout::k_full(slot.stage), key_head, key);
      barrier_wait(shared + Layout::v_empty(slot.stage), slot.parity ^ 1);
      load_tile<kHeadDim>(shared + Layout::kV + offset, v_map, shared + Layout::v_full(slot.stage), key_head, key);
    }
  }
}

// One consumer: 64 rows of a tile, of which a thread holds parts of two.
template <int kHeadDim>
struct Consumer {
  using Layout = Shared<kHeadDim>;
  static constexpr int kScores = kTileKeys / 2;   // registers of S [64, 128]
  static constexpr int kOutputs = kHeadDim / 2;   // registers of O [64, D]
  static constexpr int kSteps = kTileKeys / 16;   // k-steps of P V

  const Arguments& args;
  uint32_t shared;
  int index, thread;  // of the consumer; within it

  float scores[kScores];
  float output[kOutputs];
  uint32_t weights[kScores / 2];  // P in bfloat16
  float highest[2];               // running maximum of the unscaled scores
  float total[2];                 // running sum of P, of this thread's part

  __device__ Consumer(const Arguments& arguments, uint32_t shared_base)
      : args(arguments),
        shared(shared_base),
        // From one lane, which tells the compiler that the warp agrees on it.
        index(__shfl_sync(~0u, static_cast<int>(threadIdx.x / kWarpgroup), 0) - 1),
        thread(threadIdx.x % kWarpgroup) {}

  __device__ void arrive_once_a_warp(uint32_t barrier) const {
    if (thread % 32 == 0) barrier_arrive(barrier);
  }

  // S = Q K^T, issued.
  __device__ void issue_scores(int stage) {
    hold(scores);
    wgmma_fence();
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 16) {
      wgmma_ss(scores, k_major(shared + Layout::kQ, kTileRows, index * kRows, column),
               k_major(shared + Layout::kK + stage * Layout::kTile, kTileKeys, 0, column), column != 0);
    }
    wgmma_commit();
  }

  // O += P V, issued.
  __device__ void issue_output(int stage) {
    hold(output);
    hold(weights);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma_rs(output, &weights[4 * step], mn_major(shared + Layout::kV + stage * Layout::kTile, kTileKeys, 16 * step));
    }
    wgmma_commit();
  }

  // Rows of V behind the block's end belong to others, and 0 x NaN is NaN: overwrite them. Both consumers write the
  // same zeros, so neither waits for the other.
  __device__ void clear_values(const KeyBlock& block, int stage) const {
    const int kept = block.end - block.begin;
    if (kept == kTileKeys) return;
    for (int panel = 0; panel < kHeadDim / kPanelColumns; ++panel) {
      const uint32_t base = shared + Layout::kV + stage * Layout::kTile + panel * kTileKeys * kPanelLine;
      for (int byte = kept * kPanelLine + thread * 16; byte < kTileKeys * kPanelLine; byte += kWarpgroup * 16) {
        shared_zero(base + byte);
      }
    }
    async_proxy_fence();
    named_barrier_sync(3 + index, kWarpgroup);
  }

  __device__ void mask(const KeyBlock& block, const Visible (&seen)[2]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int key = block.begin + accumulator_column(thread, i);
      scores[i] = sees(seen[i / 2 % 2], key) ? scores[i] : -INFINITY;
    }
  }

  // Scores to exponentials, in place; returns the factors that bring earlier sums to the new maxima.
  __device__ void softmax(float (&rescale)[2]) {
    const float factor = args.scale * kLog2E;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = highest[row];
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      // A row that has seen no key yet keeps -inf; 0 in its place makes every exponential 0, not NaN.
      const float shift = top == -INFINITY ? 0.0f : top * factor;
      rescale[row] = exp2_fast(highest[row] * factor - shift);
      highest[row] = top;
      float sum = 0.0f;
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) {
        scores[i] = exp2_fast(scores[i] * factor - shift);
        scores[i + 1] = exp2_fast(scores[i + 1] * factor - shift);
        sum += scores[i] + scores[i + 1];
      }
      total[row] = total[row] * rescale[row] + sum;
    }
  }

  __device__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      const int source = operand_source(i / 4, i % 4);
      weights[i] = bfloat16_pair(scores[source], scores[source + 1]);
    }
  }

  __device__ void scale_output(const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) output[i] *= rescale[i / 2 % 2];
  }

  // Four lanes hold four column pairs of each of four 8-column groups; afterwards each holds one group: 16 bytes.
  __device__ static void transpose_quad(uint32_t (&pair)[4], int lane) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & step) continue;
        const bool upper = lane & step;
        const uint32_t received = __shfl_xor_sync(~0u, upper ? pair[i] : pair[i + step], step);
        (upper ? pair[i] : pair[i + step]) = received;
      }
    }
  }

  __device__ void store(const PrefixTile& tile, int head) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = total[row];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float inverse = 1.0f / sum;
      const int token = tile.row_begin + index * kRows + accumulator_row(thread, 2 * row);
      const bool live = token < tile.row_end;
      const int64_t place = static_cast<int64_t>(token) * args.num_heads + head;
      if (live && thread % 4 == 0) args.lse[place] = highest[row] * args.scale + logf(sum);
#pragma unroll
      for (int group = 0; group < kHeadDim / 32; ++group) {
        uint32_t chunk[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int source = 16 * group + 4 * i + 2 * row;
          chunk[i] = bfloat16_pair(output[source] * inverse, output[source + 1] * inverse);
        }
        transpose_quad(chunk, thread % 4);
        if (live) {
          *reinterpret_cast<uint4*>(args.out + place * kHeadDim + 32 * group + thread % 4 * 8) =
              uint4{chunk[0], chunk[1], chunk[2], chunk[3]};
        }
      }
    }
  }

  // Padding (output 0, log-sum-exp -inf) or rows of a malformed layout (NaN).
  __device__ void store_constant(const PrefixTile& tile, int head) const {
    const bool broken = tile.flags & kBroken;
    const uint32_t value = broken ? 0x7fff7fffu : 0u;
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a row
    for (int i = thread; i < kRows * kChunks; i += kWarpgroup) {
      const int token = tile.row_begin + index * kRows + i / kChunks;
      if (token >= tile.row_end) return;
      const int64_t place = static_cast<int64_t>(token) * args.num_heads + head;
      *reinterpret_cast<uint4*>(args.out + place * kHeadDim + i % kChunks * 8) = uint4{value, value, value, value};
      if (i % kChunks == 0) args.lse[place] = broken ? NAN : -INFINITY;
    }
  }

  // The turn to issue products goes back and forth between the consumers, through barriers 1 and 2; the first begins.
  __device__ void wait_for_turn() const { named_barrier_sync(1 + index, kConsumers * kWarpgroup); }
  __device__ void pass_turn() const { named_barrier_arrive(1 + (index ^ 1), kConsumers * kWarpgroup); }

  __device__ void attend(const PrefixTile& tile, int head, Slot& slot, uint32_t q_parity) {
    const int blocks = key_blocks(tile), first_row = tile.row_begin + index * kRows;
    int row[2], begin[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row[i] = first_row + accumulator_row(thread, 2 * i);
      begin[i] = segment_begin(tile, args.offsets, args.num_segments, row[i]);
      highest[i] = -INFINITY;
      total[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) output[i] = 0.0f;

    float rescale[2];
    KeyBlock block = key_block(tile, 0);
    const auto to_weights = [&] {
      if (needs_mask(tile, block, first_row)) {
        mask(block, {visible(block, row[0], begin[0]), visible(block, row[1], begin[1])});
      }
      softmax(rescale);
    };

    barrier_wait(shared + Layout::q_full(), q_parity);
    barrier_wait(shared + Layout::k_full(slot.stage), slot.parity);
    issue_scores(slot.stage);
    wgmma_wait<0>();
    hold(scores);
    arrive_once_a_warp(shared + Layout::k_empty(slot.stage));
    to_weights();
    round_weights();

#pragma unroll 1
    for (int j = 1; j < blocks; ++j) {
      const Slot previous = slot;
      slot.advance();
      barrier_wait(shared + Layout::k_full(slot.stage), slot.parity);
      barrier_wait(shared + Layout::v_full(previous.stage), previous.parity);
      clear_values(block, previous.stage);
      block = key_block(tile, j);
      wait_for_turn();
      issue_scores(slot.stage);
      issue_output(previous.stage);
      pass_turn();
      wgmma_wait<1>();
      hold(scores);
      arrive_once_a_warp(shared + Layout::k_empty(slot.stage));
      to_weights();
      // Never true, but not known to the assembler, which else waits for the product before it computes exponentials.
      if (total[0] + total[1] < 0.0f) __trap();
      wgmma_wait<0>();
      hold(output);
      hold(weights);
      arrive_once_a_warp(shared + Layout::v_empty(previous.stage));
      scale_output(rescale);
      round_weights();
    }

    arrive_once_a_warp(shared + Layout::q_empty());
    barrier_wait(shared + Layout::v_full(slot.stage), slot.parity);
    clear_values(block, slot.stage);
    issue_output(slot.stage);
    wgmma_wait<0>();
    hold(output);
    arrive_once_a_warp(shared + Layout::v_empty(slot.stage));
    slot.advance();
    store(tile, head);
  }

  __device__ void run() {
    Item item;
    Slot slot;
    uint32_t q_parity = 0;
    if (index == 1) pass_turn();
#pragma unroll 1
    for (int turn = 0; next_item(args, turn, item); ++turn) {
      if (key_blocks(item.tile) == 0) {
        store_constant(item.tile, item.head);
        continue;
      }
      attend(item.tile, item.head, slot, q_parity);
      q_parity ^= 1;
    }
    if (index == 0) wait_for_turn();  // takes the turn that is left over
  }
};

// 227 KiB are what a block can have.
static_assert(Shared<128>::kAllocated <= 232448);

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) attention_forward(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map, const Arguments args) {
  using Layout = Shared<kHeadDim>;
  const uint32_t shared = dynamic_shared();
  if (threadIdx.x == 0) {
    tma_prefetch_map(&q_map);
    tma_prefetch_map(&k_map);
    tma_prefetch_map(&v_map);
    barrier_init(shared + Layout::q_full(), 1);
    barrier_init(shared + Layout::q_empty(), kConsumers * 4);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared + Layout::k_full(stage), 1);
      barrier_init(shared + Layout::v_full(stage), 1);
      barrier_init(shared + Layout::k_empty(stage), kConsumers * 4);
      barrier_init(shared + Layout::v_empty(stage), kConsumers * 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  // 24 x 128 + 240 x 256 registers: what 384 threads have.
  if (threadIdx.x < kWarpgroup) {
    registers_lower<24>();
    if (threadIdx.x == 0) produce<kHeadDim>(shared, &q_map, &k_map, &v_map, args);
  } else {
    registers_raise<240>();
    Consumer<kHeadDim>(args, shared).run();
  }
}

}  // namespace
}  // namespace r4b

#ifdef USE_CUDA
#include <climits>

#include "cuda/launch.h"

namespace {

using namespace r4b;

// The driver's encoder, found through the runtime: the object links no libcuda and loads where there is none.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status));
    check(status == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled: it must be 12.0 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

// Boxes of 128 tokens x one head x 64 columns of a tensor [T, heads, D] with 128-byte swizzling; zeros outside.
TensorMap tensor_map(const Tensor& tensor) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(tensor.size(2)), static_cast<cuuint64_t>(tensor.size(1)),
                               static_cast<cuuint64_t>(tensor.size(0))};
  // Strides of dimensions of size 1 mean nothing, but must be valid.
  const cuuint64_t head_stride = tensor.size(1) == 1 ? sizes[0] : static_cast<cuuint64_t>(tensor.stride(1));
  const cuuint64_t token_stride = tensor.size(0) == 1 ? sizes[0] * sizes[1] : static_cast<cuuint64_t>(tensor.stride(0));
  const cuuint64_t strides[2] = {head_stride * 2, token_stride * 2};  // bytes
  const cuuint32_t box[3] = {kPanelColumns, 1, kTileKeys}, steps[3] = {1, 1, 1};
  TensorMap map{};
  const CUresult result = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(tensor.const_data_ptr()), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS,
        "q, k and v must begin at a multiple of 16 bytes, with strides that are, and a last dimension without gaps");
  return map;
}

template <int kHeadDim>
void launch(const Tensor& q, const Tensor& k, const Tensor& v, const Arguments& args, int64_t most_items) {
  const DeviceGuard guard(q);
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, guard.device()));
  constexpr int kBytes = Shared<kHeadDim>::kAllocated;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(attention_forward<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const int blocks = static_cast<int>(most_items < processors ? most_items : processors);
  attention_forward<kHeadDim><<<blocks, kThreads, kBytes, guard.stream()>>>(
      tensor_map(q), tensor_map(k), tensor_map(v), args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// q [T, Hq, D], k and v [T, Hk, D] bfloat16; offsets int32 [S + 1] and tiles int32 [slots, 8], of 128 rows; out
// [T, Hq, D] bfloat16 and lse [T, Hq] float32, both contiguous.
void prefix_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets, const Tensor& tiles, double scale,
    const Tensor& out, const Tensor& lse) {
  const int64_t tokens = q.size(0), heads = q.size(1), head_dim = q.size(2);
  for (const Tensor* tensor : {&q, &k, &v}) {
    check(tensor->scalar_type() == ScalarType::BFloat16 && tensor->dim() == 3 && tensor->size(0) == tokens &&
              tensor->size(2) == head_dim && tensor->stride(2) == 1,
          "q, k and v must be bfloat16 [T, heads, D] with a last dimension without gaps");
  }
  check(k.size(1) == v.size(1) && k.size(1) > 0 && heads % k.size(1) == 0,
        "the heads of k and v must divide those of q");
  check(scale > 0, "scale must be positive");
  const int64_t segments = offsets.numel() - 1, slots = num_slots(tokens, segments, kTileRows);
  check(segments >= 0 && tokens + kTileRows < INT_MAX && slots * heads < INT_MAX / 2,
        "the numbers of tokens and of tiles times heads must fit 32 bits");
  check_tensor(offsets, ScalarType::Int, offsets.numel(), "offsets must be int32 [S + 1]");
  check_tensor(tiles, ScalarType::Int, slots * kTileInts, "tiles must be int32 [slots, 8]");
  check_tensor(out, ScalarType::BFloat16, q.numel(), "out must be bfloat16 [T, Hq, D]");
  check_tensor(lse, ScalarType::Float, tokens * heads, "lse must be float32 [T, Hq]");
  if (q.numel() == 0) return;
  const Arguments args{static_cast<const PrefixTile*>(tiles.const_data_ptr()),
                       offsets.const_data_ptr<int>(),
                       static_cast<uint16_t*>(out.mutable_data_ptr()),
                       lse.mutable_data_ptr<float>(),
                       static_cast<int>(slots),
                       static_cast<int>(segments),
                       static_cast<int>(heads),
                       static_cast<int>(heads / k.size(1)),
                       static_cast<float>(scale)};
  check(head_dim == 64 || head_dim == 128, "D must be 64 or 128");
  (head_dim == 64 ? launch<64> : launch<128>)(q, k, v, args, slots * heads);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor tiles, float scale, Tensor(a!) out, "
      "Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CUDA, library) {
  library.impl("prefix_attention", TORCH_BOX(&prefix_attention));
}
#endif
