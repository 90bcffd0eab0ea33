// softmax(scale * scores) over the keys that a query sees, with counter-based dropout if asked for.
// megagpt2/kernels/scale_mask_softmax.py has the contract and the reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "dropout/row_dropout.h"
#include "philox/philox.h"

namespace megagpt2 {

// Scores [batch, heads, query, key], cut into rows: one for each query of each head of each sample.
struct Scores {
  int64_t batch, heads, query, key;
  bool causal;

  MEGAGPT2_HOST_DEVICE int64_t rows() const { return batch * heads * query; }

  // How many keys query q sees, the first ones: the last query sees all, as keys before the first query are a cache.
  MEGAGPT2_HOST_DEVICE int64_t visible(int64_t q) const {
    if (!causal) return key;
    const int64_t bound = q + 1 + key - query;
    return bound < 0 ? 0 : bound > key ? key : bound;
  }
};

// Where a row's elements lie in a tensor [batch, heads, query, key] of any strides.
struct Strides {
  int64_t batch, head, query, key;

  MEGAGPT2_HOST_DEVICE int64_t row(int64_t b, int64_t h, int64_t q) const { return b * batch + h * head + q * query; }
};

// The visible elements of a row that is worked on soon, on the CPU.
template <typename T>
struct Ahead {
  const T* row;
  int64_t n;
};

// What is dropped of a row's visible elements, on the CPU: those whose bits are below `threshold`; the others are
// multiplied by `scale`. drawn: null where nothing is dropped.
struct WeightDropout {
  const uint16_t* drawn = nullptr;
  uint32_t threshold = 0;
  float scale = 1.0f;
};

inline Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

// x itself where the keys of a row lie side by side, else a copy of which that is true.
inline Tensor with_packed_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

// A weight is 2^(size * (sign * score - the row's largest sign * score)) over their sum; rest: what size lost to rounding.
struct Exponent {
  float sign, size, rest;
};
inline Exponent exponent_of(double scale) {
  // A scale of 0 makes every finite score 0, and of the others NaN, as in torch.
  if (static_cast<float>(scale) == 0.0f) return {0.0f, 1.0f, 0.0f};
  if (std::isnan(scale)) return {1.0f, std::numeric_limits<float>::quiet_NaN(), 0.0f};
  const double size = std::abs(scale) * 1.4426950408889634;  // log2(e)
  constexpr float largest = std::numeric_limits<float>::max();
  const float sign = scale < 0.0 ? -1.0f : 1.0f;
  if (size >= largest) return {sign, std::isinf(static_cast<float>(scale)) ? HUGE_VALF : largest, 0.0f};
  return {sign, static_cast<float>(size), static_cast<float>(size - static_cast<float>(size))};
}

// The shape of x. Throws std::runtime_error unless it has four dimensions.
inline Scores scores_of(const Tensor& x, bool causal) {
  STD_TORCH_CHECK(x.dim() == 4, "scores have ", x.dim(), " dimensions: they must be [batch, heads, query, key]");
  return {x.size(0), x.size(1), x.size(2), x.size(3), causal};
}

// Throws std::runtime_error unless `mask` is bool, of x's shape, and where x is.
inline void check_mask(const Tensor& x, const std::optional<Tensor>& mask) {
  if (!mask) return;
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Bool && same_shape(*mask, x) && mask->is_cuda() == x.is_cuda(),
      "the mask must be bool, of the scores' shape (expand it) and on their device");
}

// scores [batch, heads, query, key] of any strides; mask bool of the same shape, true where a key is hidden, or none;
// samples int64 [batch], or nothing where nothing is dropped -> (y, weights), contiguous, of scores' type. weights:
// what y is before dropout; empty [0] without it.
std::tuple<Tensor, Tensor> scale_mask_softmax_cpu(
    Tensor scores, double scale, bool causal, std::optional<Tensor> mask, std::optional<Tensor> samples, int64_t key0,
    int64_t key1, double probability, int64_t start);

std::tuple<Tensor, Tensor> scale_mask_softmax_cuda(
    Tensor scores, double scale, bool causal, std::optional<Tensor> mask, std::optional<Tensor> samples, int64_t key0,
    int64_t key1, double probability, int64_t start);

// dy like weights -> d scores, contiguous. weights: before dropout.
Tensor scale_mask_softmax_backward_cpu(
    Tensor dy, Tensor weights, double scale, bool causal, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start);
Tensor scale_mask_softmax_backward_cuda(
    Tensor dy, Tensor weights, double scale, bool causal, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start);

}  // namespace megagpt2
