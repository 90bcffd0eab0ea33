// softmax(scale * scores) over the keys that a query sees, with counter-based dropout if asked for.
// megagpt2/kernels/scale_mask_softmax.py has the contract and the reference.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/tensor.h"
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

// What is dropped of a row's visible elements, on the CPU: those with words below `threshold`; the others are
// multiplied by `factor`. words: null where nothing is dropped.
struct WeightDropout {
  const uint32_t* words = nullptr;
  uint32_t threshold = 0;
  float factor = 1.0f;
};

inline Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

// x itself where the keys of a row lie side by side, else a copy of which that is true.
inline Tensor with_packed_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

// The shape of x. Throws std::runtime_error unless it has four dimensions.
Scores scores_of(const Tensor& x, bool causal);

// Throws std::runtime_error unless `mask` is bool, of x's shape, and where x is.
void check_mask(const Tensor& x, const std::optional<Tensor>& mask);

// Throws std::runtime_error unless there is a sample for each x[i], where x is, a probability in [0, 1), and a start
// from which elements can have numbers.
void check_dropout(const Tensor& x, const Tensor& samples, double probability, int64_t start);

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
