// scatter_vision in float32: every row of the result is written once.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/vector.h"
#include "stable.h"

namespace {

constexpr int64_t kGrain = 32768;

// Rows (or columns) a thread should have at least, each of so many elements.
int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)); }

// embeddings [T, H], features [P, H], index [T] in -1 .. P - 1 -> out [T, H].
void forward(
    const Tensor& embeddings, const Tensor& features, const Tensor& index, bool accumulate, const Tensor& out) {
  const int64_t tokens = embeddings.size(0), width = embeddings.size(1);
  const float *streams = embeddings.const_data_ptr<float>(), *seen = features.const_data_ptr<float>();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  float* outs = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tokens, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* stream = streams + token * width;
      const float* feature = seen + rows[token] * width;
      float* to = outs + token * width;
      if (rows[token] >= 0 && accumulate) {
        vector::for_each(width, [&](auto take, auto put) { put(to, take(stream) + take(feature)); });
      } else {
        std::memcpy(to, rows[token] >= 0 ? feature : stream, width * sizeof(float));
      }
    }
  });
}

// grad [T, H], index [T] -> grad_embeddings [T, H] (left alone if accumulate), grad_features [P, H]. Tokens that share
// a feature add up in ascending order.
void backward(
    const Tensor& grad, const Tensor& index, bool accumulate, const Tensor& grad_embeddings,
    const Tensor& grad_features) {
  const int64_t tokens = grad.size(0), width = grad.size(1), features = grad_features.size(0);
  const float* grads = grad.const_data_ptr<float>();
  const int64_t* rows = index.const_data_ptr<int64_t>();
  float* sums = grad_features.mutable_data_ptr<float>();
  std::vector<int64_t> uses(features, 0);
  for (int64_t token = 0; token < tokens; ++token) {
    if (rows[token] >= 0) ++uses[rows[token]];
  }
  for (int64_t feature = 0; feature < features; ++feature) {
    if (uses[feature] != 1) std::fill_n(sums + feature * width, width, 0.0f);
  }
  float* streams = accumulate ? nullptr : grad_embeddings.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tokens, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = rows[token];
      const float* from = grads + token * width;
      if (streams != nullptr && row < 0) std::memcpy(streams + token * width, from, width * sizeof(float));
      if (streams != nullptr && row >= 0) std::fill_n(streams + token * width, width, 0.0f);
      if (row >= 0 && uses[row] == 1) std::memcpy(sums + row * width, from, width * sizeof(float));
    }
  });
  if (std::none_of(uses.begin(), uses.end(), [](int64_t count) { return count > 1; })) return;
  // Threads have columns, not tokens: the order of the sums is that of the tokens.
  torch::stable::parallel_for(0, width, grain(tokens), [&](int64_t begin, int64_t end) {
    for (int64_t token = 0; token < tokens; ++token) {
      if (rows[token] < 0 || uses[rows[token]] < 2) continue;
      const float* from = grads + token * width + begin;
      float* to = sums + rows[token] * width + begin;
      vector::for_each(end - begin, [&](auto take, auto put) { put(to, take(to) + take(from)); });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "scatter_vision(Tensor embeddings, Tensor features, Tensor index, bool accumulate, Tensor(a!) out) -> ()");
  library.def(
      "scatter_vision_backward(Tensor grad, Tensor index, bool accumulate, Tensor(a!) grad_embeddings, "
      "Tensor(b!) grad_features) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CPU, library) {
  library.impl("scatter_vision", TORCH_BOX(&forward));
  library.impl("scatter_vision_backward", TORCH_BOX(&backward));
}
