// decode_attention in float32: what a decoder layer does between its two projections, for one new token per row.
//
// Shapes: N rows, Hk key/value heads, s queries per key/value head, D head dim, G prompts, P and M columns of the
// prompts' and the rows' own caches; P, M and D are multiples of eight.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/exponential.h"
#include "cpu/vector.h"
#include "stable.h"

namespace {

using vector::Floats;
using vector::kLanes;

// Queries that pass over a prompt's keys together, and multiplications a thread should have at least.
constexpr int64_t kQueries = 16;
constexpr int64_t kGrain = 65536;
constexpr float kNever = -std::numeric_limits<float>::infinity();

int64_t whole_vectors(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// to[r, j] = (from ? from[r, j] : 0) + sum over k of a[r, k] b[k, j], for a tile of rows and vectors of columns. The sum
// goes by ascending k whatever the tile, so that a row's bits do not depend on its neighbours.
template <int kRows, int kVectors>
void tile(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, const float* from, float* to,
    int64_t stride) {
  Floats sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = from ? vector::load(from + r * stride + v * kLanes) : Floats{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats terms[kVectors];
    for (int v = 0; v < kVectors; ++v) terms[v] = vector::load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float factor = a[r * a_stride + k];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * terms[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) vector::store(to + r * stride + v * kLanes, sums[r][v]);
  }
}

// The tiles of kRows rows side by side: kVectors vectors wide while they fit, then narrower.
template <int kRows, int kVectors>
void row_of_tiles(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, int64_t columns,
    const float* from, float* to, int64_t stride) {
  constexpr int64_t kWidth = kVectors * kLanes;
  for (; columns >= kWidth; columns -= kWidth, b += kWidth, to += kWidth) {
    tile<kRows, kVectors>(a, a_stride, b, b_stride, depth, from, to, stride);
    if (from) from += kWidth;
  }
  if constexpr (kVectors > 1) {
    row_of_tiles<kRows, kVectors - 1>(a, a_stride, b, b_stride, depth, columns, from, to, stride);
  }
}

// to = from + a b with a [rows, depth], b [depth, columns]; from (null: zeros) and to [rows, columns] share a stride.
void multiply(
    int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
    const float* from, float* to, int64_t stride) {
  while (rows > 0) {
    const int64_t taken = rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    const auto part = taken == 4 ? row_of_tiles<4, 2> : taken == 2 ? row_of_tiles<2, 4> : row_of_tiles<1, 4>;
    part(a, a_stride, b, b_stride, depth, columns, from, to, stride);
    a += taken * a_stride;
    if (from) from += taken * stride;
    to += taken * stride;
    rows -= taken;
  }
}

// A head by its norm and weight, turned by its row's angles and times scale. cos and sin are second halves of tables.
void norm_and_turn(
    const float* x, const float* weight, const float* cos, const float* sin, int64_t dim, float eps, float scale,
    float* to) {
  Floats squares{};
  vector::for_each(dim, [&](auto take, auto) { squares += take(x) * take(x); });
  const float factor = scale / std::sqrt(vector::sum(squares) / static_cast<float>(dim) + eps);
  const int64_t half = dim / 2;
  vector::for_each(half, [&](auto take, auto put) {
    const Floats a = take(x) * factor * take(weight), b = take(x + half) * factor * take(weight + half);
    put(to, a * take(cos) - b * take(sin));
    put(to + half, b * take(cos) + a * take(sin));
  });
}

// Scores of which the last whole vector may hold more than count: what is beyond becomes -inf. Vectors are read and
// written whole, because a processor waits where it reads a vector of which a part has just been written.
void hide_rest(float* scores, int64_t count) {
  if (const int64_t rest = count % kLanes; rest > 0) {
    float* last = scores + count - rest;
    vector::store(last, vector::first(vector::load(last), rest, kNever));
  }
}

// scores -> their exponentials over the largest, in place; returns the sum.
float exponentials(float* scores, int64_t columns) {
  Floats most = vector::load(scores), total{};
  for (int64_t j = kLanes; j < columns; j += kLanes) most = vector::larger(most, vector::load(scores + j));
  const float offset = vector::largest(most);
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Floats weight = vector::exponential(vector::load(scores + j) - offset);
    total += weight;
    vector::store(scores + j, weight);
  }
  return vector::sum(total);
}

// The op on the memory of its tensors. A block is `count` rows from `row` on that respond to one prompt, of one head;
// `head * rows + row` is the first of its places in the own caches.
struct Step {
  int64_t rows, heads, share, dim, prompts, longest, own;  // N, Hk, s, D, G, P, M
  float eps, scale;
  const float *mixed, *q_weight, *k_weight, *cos, *sin, *prompt_keys, *prompt_values;
  const int64_t *column, *lengths, *ends;
  float *keys, *values, *out;

  // The scores of a query: those of its prompt, in whole vectors, then its own.
  int64_t stride() const { return longest + own; }
  int64_t own_length(int64_t row) const { return std::clamp<int64_t>(column[row] + 1, 0, own); }

  // queries [count, s, D], and the new keys and values in the caches. A key is transposed on its way through `key` [D].
  void project(int64_t head, int64_t row, int64_t count, float* queries, float* key) const {
    for (int64_t n = row; n < row + count; ++n) {
      const float* x = mixed + (n * heads + head) * (share + 2) * dim;
      const float *c = cos + n * dim, *s = sin + n * dim;
      for (int64_t q = 0; q < share; ++q, x += dim, queries += dim) {
        norm_and_turn(x, q_weight, c, s, dim, eps, scale, queries);
      }
      norm_and_turn(x, k_weight, c, s, dim, eps, 1.0f, key);
      const int64_t cached = head * rows + n, place = std::clamp<int64_t>(column[n], 0, own - 1);
      for (int64_t d = 0; d < dim; ++d) keys[(cached * dim + d) * own + place] = key[d];
      std::copy_n(x + dim, dim, values + (cached * own + place) * dim);
    }
  }

  // Exponentials of the scores [count, s, P + M], and their sums [count, s].
  void weigh(
      int64_t head, int64_t prompt, int64_t row, int64_t count, const float* queries, float* scores,
      float* totals) const {
    const int64_t length = lengths[prompt], shared = whole_vectors(length);
    const float* of_prompt = prompt_keys + (head * prompts + prompt) * dim * longest;
    multiply(count * share, dim, shared, queries, dim, of_prompt, longest, nullptr, scores, stride());
    for (int64_t n = row; n < row + count; ++n, queries += share * dim) {
      const int64_t seen = own_length(n), written = whole_vectors(seen);
      const float* of_row = keys + (head * rows + n) * dim * own;
      multiply(share, dim, written, queries, dim, of_row, own, nullptr, scores + shared, stride());
      for (int64_t q = 0; q < share; ++q, scores += stride()) {
        hide_rest(scores, length);
        hide_rest(scores + shared, seen);
        *totals++ = exponentials(scores, shared + written);
      }
    }
  }

  // The values in the proportion of the weights, by way of the prompt's share `sums` [count, s, D].
  void mix(
      int64_t head, int64_t prompt, int64_t row, int64_t count, const float* weights, const float* totals,
      float* sums) const {
    const int64_t length = lengths[prompt], shared = whole_vectors(length);
    const float* of_prompt = prompt_values + (head * prompts + prompt) * longest * dim;
    multiply(count * share, length, dim, weights, stride(), of_prompt, dim, nullptr, sums, dim);
    for (int64_t n = row; n < row + count; ++n, weights += share * stride(), sums += share * dim) {
      const float* of_row = values + (head * rows + n) * own * dim;
      float* to = out + (n * heads + head) * share * dim;
      multiply(share, own_length(n), dim, weights + shared, stride(), of_row, dim, sums, to, dim);
      for (int64_t q = 0; q < share; ++q, to += dim) {
        const float factor = 1.0f / *totals++;
        vector::for_each(dim, [&](auto take, auto put) { put(to, take(to) * factor); });
      }
    }
  }

  void run() const {
    const int64_t block = std::max<int64_t>(1, kQueries / share), block_queries = block * share;
    const auto work = [&](int64_t begin, int64_t end) {
      std::vector<float> memory(block_queries * (2 * dim + stride() + 1));
      float *queries = memory.data(), *sums = queries + block_queries * dim, *totals = sums + block_queries * dim;
      float* scores = totals + block_queries;
      for (int64_t item = begin; item < end;) {
        const int64_t head = item / rows, row = item % rows;
        const int64_t prompt = std::upper_bound(ends, ends + prompts, row) - ends;
        const int64_t count = std::min({block, ends[prompt] - row, end - item});
        project(head, row, count, queries, sums);
        weigh(head, prompt, row, count, queries, scores, totals);
        mix(head, prompt, row, count, scores, totals, sums);
        item += count;
      }
    };
    torch::stable::parallel_for(0, heads * rows, std::max<int64_t>(block, kGrain / (share * dim * stride())), work);
  }
};

void forward(
    const Tensor& mixed, const Tensor& q_weight, const Tensor& k_weight, const Tensor& rope, const Tensor& column,
    const Tensor& prompt_keys, const Tensor& prompt_values, const Tensor& prompt_lengths, const Tensor& offsets,
    const Tensor& own_keys, const Tensor& own_values, double eps, double scale, const Tensor& out) {
  const int64_t rows = mixed.size(0), dim = mixed.size(3);
  const float* cos = rope.const_data_ptr<float>() + dim / 2;
  const Step step{
      .rows = rows,
      .heads = mixed.size(1),
      .share = mixed.size(2) - 2,
      .dim = dim,
      .prompts = prompt_lengths.numel(),
      .longest = prompt_values.size(2),
      .own = own_values.size(2),
      .eps = static_cast<float>(eps),
      .scale = static_cast<float>(scale),
      .mixed = mixed.const_data_ptr<float>(),
      .q_weight = q_weight.const_data_ptr<float>(),
      .k_weight = k_weight.const_data_ptr<float>(),
      .cos = cos,
      .sin = cos + rows * dim,
      .prompt_keys = prompt_keys.const_data_ptr<float>(),
      .prompt_values = prompt_values.const_data_ptr<float>(),
      .column = column.const_data_ptr<int64_t>(),
      .lengths = prompt_lengths.const_data_ptr<int64_t>(),
      .ends = offsets.const_data_ptr<int64_t>() + 1,
      .keys = own_keys.mutable_data_ptr<float>(),
      .values = own_values.mutable_data_ptr<float>(),
      .out = out.mutable_data_ptr<float>(),
  };
  step.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "decode_attention(Tensor mixed, Tensor q_weight, Tensor k_weight, Tensor rope, Tensor column, "
      "Tensor prompt_keys, Tensor prompt_values, Tensor prompt_lengths, Tensor offsets, Tensor(a!) own_keys, "
      "Tensor(b!) own_values, float eps, float scale, Tensor(c!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CPU, library) { library.impl("decode_attention", TORCH_BOX(&forward)); }
