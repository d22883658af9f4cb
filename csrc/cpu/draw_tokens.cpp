// draw_tokens in float32: two passes over a row of logits, the second with its exponentials, then one over the CDF.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/exponential.h"
#include "cpu/vector.h"
#include "stable.h"

namespace {

using vector::Floats;
using vector::kLanes;

// Logits a thread should have at least.
constexpr int64_t kGrain = 16384;

struct Distribution {
  int64_t most_probable;
  float largest;     // logit / temperature
  float log_total;   // of the exponentials over the largest
  float entropy;
};

// A row's exponentials over its largest logit into weights, and what they say.
Distribution exponentials(const float* logits, int64_t count, float temperature, float* weights) {
  const int64_t most_probable = std::max_element(logits, logits + count) - logits;
  const float largest = logits[most_probable] / temperature;
  Floats total{}, product{};
  int64_t i = 0;
  const auto add = [&](Floats x) {
    const Floats weight = vector::exponential(x);
    total += weight;
    product += weight > 0.0f ? weight * x : Floats{};  // not 0 times the logarithm of 0
    return weight;
  };
  for (; i + kLanes <= count; i += kLanes) {
    vector::store(weights + i, add(vector::load(logits + i) / temperature - largest));
  }
  if (const int64_t rest = count - i; rest > 0) {
    Floats x = Floats{} - std::numeric_limits<float>::infinity();
    for (int64_t lane = 0; lane < rest; ++lane) x[lane] = logits[i + lane] / temperature - largest;
    vector::store(weights + i, add(x), rest);
  }
  const float sum = vector::sum(total), log_total = std::log(sum);
  return {most_probable, largest, log_total, log_total - vector::sum(product) / sum};
}

// Zeros every weight outside the smallest set of the largest that reaches a share of their sum.
void keep_nucleus(float* weights, int64_t count, double share, std::vector<std::pair<float, int64_t>>& heap) {
  double total = 0, kept = 0;
  heap.clear();
  for (int64_t i = 0; i < count; ++i) {
    total += weights[i];
    heap.emplace_back(weights[i], -i);  // of equals the first
  }
  std::make_heap(heap.begin(), heap.end());
  std::fill_n(weights, count, 0.0f);
  for (auto end = heap.end(); end != heap.begin() && kept < share * total; --end) {
    std::pop_heap(heap.begin(), end);
    const auto [weight, place] = *(end - 1);
    weights[-place] = weight;
    kept += weight;
  }
}

// The first token whose cumulative weight is above point times the sum; it has a weight.
int64_t invert(const float* weights, int64_t count, double point) {
  double total = 0, reached = 0;
  for (int64_t i = 0; i < count; ++i) total += weights[i];
  const double target = point * total;
  for (int64_t i = 0; i < count; ++i) {
    reached += weights[i];
    if (reached > target) return i;
  }
  return count - 1;  // logits that are not numbers
}

// logits [N, V], point float64 [N], forced int64 [N] or none -> token int64 [N], logprob and entropy [N].
void forward(
    const Tensor& logits, const Tensor& point, const std::optional<Tensor>& forced, double temperature, double top_p,
    const Tensor& token, const Tensor& logprob, const Tensor& entropy) {
  const int64_t rows = logits.size(0), count = logits.size(1);
  const float *xs = logits.const_data_ptr<float>(), divisor = temperature > 0 ? static_cast<float>(temperature) : 1.0f;
  const double* points = point.const_data_ptr<double>();
  const int64_t* given = forced ? forced->const_data_ptr<int64_t>() : nullptr;
  int64_t* tokens = token.mutable_data_ptr<int64_t>();
  float *logprobs = logprob.mutable_data_ptr<float>(), *entropies = entropy.mutable_data_ptr<float>();
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> weights(count);
    std::vector<std::pair<float, int64_t>> heap;
    for (int64_t row = begin; row < end; ++row) {
      const float* x = xs + row * count;
      const Distribution distribution = exponentials(x, count, divisor, weights.data());
      int64_t drawn = given ? given[row] : -1;
      if (drawn < 0 && temperature == 0) {
        drawn = distribution.most_probable;
      } else if (drawn < 0) {
        if (top_p < 1) keep_nucleus(weights.data(), count, top_p, heap);
        drawn = invert(weights.data(), count, points[row]);
      }
      tokens[row] = drawn;
      logprobs[row] = x[drawn] / divisor - distribution.largest - distribution.log_total;
      entropies[row] = distribution.entropy;
    }
  };
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / count), work);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(r4b_native, library) {
  library.def(
      "draw_tokens(Tensor logits, Tensor point, Tensor? forced, float temperature, float top_p, Tensor(a!) token, "
      "Tensor(b!) logprob, Tensor(c!) entropy) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(r4b_native, CPU, library) { library.impl("draw_tokens", TORCH_BOX(&forward)); }
