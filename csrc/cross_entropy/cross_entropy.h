// What the cross-entropy does with a chunk of logits, beside the matrix products: one pass for each row's maximum, sum of
// exponentials and target, one that puts the gradient in the logits' place. megagpt2/kernels/cross_entropy.py has the
// contract and the reference.
#pragma once

#include "common/tensor.h"

namespace megagpt2 {

// logits [n, width], whose first `words` columns are the words first, first + 1, ... and the rest padding; targets int64
// [n] -> float32 [3, n]: maximum over the words, sum of exp(logit - maximum), the target's logit (0 where the target is
// not among these words). Without a word the maximum is -infinity and the sum 0.
Tensor cross_entropy_statistics_cpu(Tensor logits, Tensor targets, int64_t first, int64_t words);

// logits [n, width], contiguous, become factor * (exp(logit - maximum) / normalizer - [word is target]), 0 in the
// padding. maximum and normalizer: float32 [n], over the whole vocabulary. A power of two as the factor rounds nothing.
void cross_entropy_gradient_cpu(
    Tensor logits, Tensor targets, Tensor maximum, Tensor normalizer, int64_t first, int64_t words, double factor);

// Throws std::runtime_error unless the shapes and types are those above.
inline void check_chunk(const Tensor& logits, const Tensor& targets, int64_t words) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [tokens, rows of the vocabulary]");
  STD_TORCH_CHECK(
      targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.scalar_type() == ScalarType::Long,
      "targets must be int64, one for each of the ", logits.size(0), " rows of logits");
  STD_TORCH_CHECK(
      words >= 0 && words <= logits.size(1), "words is ", words, ": it must be in [0, ", logits.size(1),
      "], the columns of logits");
}

inline void check_gradient(
    const Tensor& logits, const Tensor& targets, const Tensor& maximum, const Tensor& normalizer, int64_t words) {
  check_chunk(logits, targets, words);
  for (const Tensor& values : {maximum, normalizer}) {
    STD_TORCH_CHECK(
        values.dim() == 1 && values.size(0) == logits.size(0) && values.scalar_type() == ScalarType::Float,
        "maximum and normalizer must be float32, one for each of the ", logits.size(0), " rows of logits");
  }
  STD_TORCH_CHECK(logits.is_contiguous(), "logits must be contiguous: the gradient is put in their place");
}

}  // namespace megagpt2
