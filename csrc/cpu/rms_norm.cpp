// rms_norm in float32: each row is read once from memory and stays in the cache for its second pass.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/vector.h"
#include "stable.h"

namespace {

using vector::Floats;

// Elements a thread should have at least.
constexpr int64_t kGrain = 16384;
// The weight's gradient is summed in this many shares of the rows, whatever the threads: always the same bits.
constexpr int64_t kShares = 16;

// x [M, H], weight [H] -> out [M, H], rstd [M].
void forward(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, const Tensor& rstd) {
  const int64_t width = weight.numel(), rows = rstd.numel();
  const float *xs = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float *outs = out.mutable_data_ptr<float>(), *rstds = rstd.mutable_data_ptr<float>();
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = xs + row * width;
      float* to = outs + row * width;
      Floats squares{};
      vector::for_each(width, [&](auto take, auto) { squares += take(from) * take(from); });
      const float mean = vector::sum(squares) / static_cast<float>(width);
      const float scale = 1.0f / std::sqrt(mean + static_cast<float>(eps));
      vector::for_each(width, [&](auto take, auto put) { put(to, take(from) * scale * take(w)); });
      rstds[row] = scale;
    }
  };
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), work);
}

// With n = x rstd and s = grad weight: grad_x = rstd (s - n mean(s n)) [M, H], grad_weight = sum of grad n [H].
void backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& grad_x,
    const Tensor& grad_weight) {
  const int64_t width = weight.numel(), rows = rstd.numel();
  const float *grads = grad.const_data_ptr<float>(), *xs = x.const_data_ptr<float>();
  const float *w = weight.const_data_ptr<float>(), *rstds = rstd.const_data_ptr<float>();
  float* outs = grad_x.mutable_data_ptr<float>();
  const int64_t per_share = std::max<int64_t>(1, (rows + kShares - 1) / kShares);
  const int64_t shares = (rows + per_share - 1) / per_share;
  std::vector<float> partial(shares * width, 0.0f);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * per_share; row < std::min(rows, end * per_share); ++row) {
      const float *from = xs + row * width, *g = grads + row * width, scale = rstds[row];
      float *to = outs + row * width, *sums = partial.data() + row / per_share * width;
      Floats along{};
      vector::for_each(width, [&](auto take, auto put) {
        const Floats normed = take(from) * scale, product = take(g) * normed;
        put(sums, take(sums) + product);
        along += product * take(w);
      });
      const float mean = vector::sum(along) / static_cast<float>(width);
      vector::for_each(width, [&](auto take, auto put) {
        put(to, (take(g) * take(w) - take(from) * scale * mean) * scale);
      });
    }
  };
  torch::stable::parallel_for(0, shares, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width * per_share)), work);
  float* total = grad_weight.mutable_data_ptr<float>();
  std::fill(total, total + width, 0.0f);
  for (int64_t share = 0; share < shares; ++share) {
    const float* sums = partial.data() + share * width;
    vector::for_each(width, [&](auto take, auto put) { put(total, take(total) + take(sums)); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) rstd) -> ()");
  library.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor(a!) grad_x, "
      "Tensor(b!) grad_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&forward));
  library.impl("rms_norm_backward", TORCH_BOX(&backward));
}
