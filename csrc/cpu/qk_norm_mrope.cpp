// qk_norm_mrope in float32: norm, weight and rotation of a head while it is in registers and first-level cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/vector.h"
#include "stable.h"

namespace {

using vector::Floats;

constexpr int64_t kGrain = 8192;
// The weight's gradient is summed in this many shares of the tokens, whatever the threads: always the same bits.
constexpr int64_t kShares = 16;

float inverse_rms(const float* x, int64_t dim, float eps) {
  Floats squares{};
  vector::for_each(dim, [&](auto take, auto) { squares += take(x) * take(x); });
  return 1.0f / std::sqrt(vector::sum(squares) / static_cast<float>(dim) + eps);
}

// x [T, heads, D], weight [D], cos and sin [T, 1, D] (of which the second halves are used) -> out [T, heads, D].
void forward(
    const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps, const Tensor& out) {
  const int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2), half = dim / 2;
  const int64_t token_stride = x.stride(0), head_stride = x.stride(1);
  const float *xs = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  const float *coss = cos.const_data_ptr<float>(), *sins = sin.const_data_ptr<float>();
  float* outs = out.mutable_data_ptr<float>();
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float *c = coss + token * dim + half, *s = sins + token * dim + half;
      for (int64_t head = 0; head < heads; ++head) {
        const float* first = xs + token * token_stride + head * head_stride;
        const float* second = first + half;
        float* to = outs + (token * heads + head) * dim;
        const float scale = inverse_rms(first, dim, static_cast<float>(eps));
        vector::for_each(half, [&](auto take, auto put) {
          const Floats a = take(first) * scale * take(w), b = take(second) * scale * take(w + half);
          put(to, a * take(c) - b * take(s));
          put(to + half, b * take(c) + a * take(s));
        });
      }
    }
  };
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, heads * dim)), work);
}

// With n = x / rms(x) and u the gradient turned back by the same angle, s = u weight:
// grad_x = (s - n mean(s n)) / rms(x), grad_weight = sum of u n.
void backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps,
    const Tensor& grad_x, const Tensor& grad_weight) {
  const int64_t tokens = x.size(0), heads = x.size(1), dim = x.size(2), half = dim / 2;
  const int64_t token_stride = x.stride(0), head_stride = x.stride(1);
  const int64_t grad_token_stride = grad.stride(0), grad_head_stride = grad.stride(1);
  const float *grads = grad.const_data_ptr<float>(), *xs = x.const_data_ptr<float>();
  const float *w = weight.const_data_ptr<float>();
  const float *coss = cos.const_data_ptr<float>(), *sins = sin.const_data_ptr<float>();
  float* outs = grad_x.mutable_data_ptr<float>();
  const int64_t per_share = std::max<int64_t>(1, (tokens + kShares - 1) / kShares);
  const int64_t shares = (tokens + per_share - 1) / per_share;
  std::vector<float> partial(shares * dim, 0.0f);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t token = begin * per_share; token < std::min(tokens, end * per_share); ++token) {
      const float *c = coss + token * dim + half, *s = sins + token * dim + half;
      float* sums = partial.data() + token / per_share * dim;
      for (int64_t head = 0; head < heads; ++head) {
        const float* from = xs + token * token_stride + head * head_stride;
        const float* g = grads + token * grad_token_stride + head * grad_head_stride;
        float* to = outs + (token * heads + head) * dim;
        const float scale = inverse_rms(from, dim, static_cast<float>(eps));
        Floats along{};
        vector::for_each(half, [&](auto take, auto put) {
          const Floats g1 = take(g), g2 = take(g + half);
          const Floats u1 = g1 * take(c) + g2 * take(s), u2 = g2 * take(c) - g1 * take(s);
          const Floats p1 = u1 * (take(from) * scale), p2 = u2 * (take(from + half) * scale);
          put(sums, take(sums) + p1);
          put(sums + half, take(sums + half) + p2);
          along += p1 * take(w) + p2 * take(w + half);
          put(to, u1 * take(w));
          put(to + half, u2 * take(w + half));
        });
        const float mean = vector::sum(along) / static_cast<float>(dim);
        vector::for_each(
            dim, [&](auto take, auto put) { put(to, (take(to) - take(from) * scale * mean) * scale); });
      }
    }
  };
  torch::stable::parallel_for(
      0, shares, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, per_share * heads * dim)), work);
  float* total = grad_weight.mutable_data_ptr<float>();
  std::fill(total, total + dim, 0.0f);
  for (int64_t share = 0; share < shares; ++share) {
    const float* sums = partial.data() + share * dim;
    vector::for_each(dim, [&](auto take, auto put) { put(total, take(total) + take(sums)); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "norm_rope(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, Tensor(a!) out) -> ()");
  library.def(
      "norm_rope_backward(Tensor grad, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CPU, library) {
  library.impl("norm_rope", TORCH_BOX(&forward));
  library.impl("norm_rope_backward", TORCH_BOX(&backward));
}
