#include "scale_mask_softmax/scale_mask_softmax.h"

#include <algorithm>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/buffer.h"
#include "philox/philox_cpu.h"

#define MEGAGPT2_LOOPS "scale_mask_softmax/scale_mask_softmax_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // what is worth waking a thread for
constexpr int64_t kMostLanes = 16;
constexpr int64_t kQueriesTogether = 16;

// The query whose turn it is: groups are taken from both ends in turns, the first, the last, the second, ... Threads
// share the turns in order, so each has as much to do under a causal mask. Within a group memory is read in order.
int64_t query_of(int64_t turn, int64_t query) {
  const int64_t groups = query / kQueriesTogether, group = turn / kQueriesTogether;
  if (group >= groups) return turn;
  const int64_t taken = group % 2 == 0 ? group / 2 : groups - 1 - group / 2;
  return taken * kQueriesTogether + turn % kQueriesTogether;
}

// Calls row(number, b, h, q, task) for every row, `task` being what make_task() gave this thread.
template <typename MakeTask, typename Row>
void for_each_row(const Scores& shape, const MakeTask& make_task, const Row& row) {
  const int64_t rows_per_task = std::max<int64_t>(kElementsPerTask / std::max<int64_t>(shape.key, 1), 1);
  torch::stable::parallel_for(0, shape.rows(), rows_per_task, [&](int64_t begin, int64_t end) {
    auto task = make_task();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / shape.query, q = query_of(i % shape.query, shape.query);
      row(head * shape.query + q, head / shape.heads, head % shape.heads, q, task);
    }
  });
}

// Draws rows of the dropout mask. Nothing without samples.
struct Dropout {
  std::optional<Tensor> samples;
  Key key;
  uint32_t threshold;
  float factor;
  int64_t start;

  Dropout(
      const Tensor& x, const std::optional<Tensor>& given, int64_t key0, int64_t key1, double probability,
      int64_t start)
      : key{}, threshold(0), factor(1.0f), start(start) {
    if (!given) return;
    check_dropout(x, *given, probability, start);
    samples = packed(*given);
    key = make_key(key0, key1);
    threshold = dropout_threshold(probability);
    factor = static_cast<float>(1.0 / (1.0 - probability));
  }

  // How many words draw() needs: those before the row in its first counter, and whole vectors of counters.
  Buffer<uint32_t> buffer(int64_t width) const { return Buffer<uint32_t>(samples ? width + 64 : 0); }

  // The first n of a row of sample b, which has `offset` elements before it; their words go to `buffer`.
  WeightDropout draw(int64_t b, int64_t offset, int64_t n, Buffer<uint32_t>& buffer) const {
    if (!samples) return {};
    const int64_t first = start + offset, skip = first % 4;
    fill_words(buffer.data(), first / 4, (skip + n + 3) / 4, static_cast<uint64_t>(data<int64_t>(*samples)[b]), key);
    return {buffer.data() + skip, threshold, factor};
  }
};

// The flags of a row of the mask, side by side: themselves, or a copy in `buffer`.
const uint8_t* packed_flags(const uint8_t* flags, int64_t stride, int64_t n, std::vector<uint8_t>& buffer) {
  if (stride == 1) return flags;
  buffer.resize(n);
  for (int64_t i = 0; i < n; ++i) buffer[i] = flags[i * stride];
  return buffer.data();
}

// A row of floats, however long, stays in the second cache level: 16,385 of them are 64 KiB.
struct Buffers {
  Buffer<float> row;
  Buffer<uint32_t> words;
  std::vector<uint8_t> flags;
};

template <typename T>
void forward(
    const Scores& shape, const Tensor& scores, const std::optional<Tensor>& mask, const Tensor& y,
    const Tensor& weights, float scale, const Dropout& dropout) {
  const auto forward_row = MEGAGPT2_VARIANT(forward_row<T>);
  const T* x = data<T>(scores);
  T *results = mutable_data<T>(y), *undropped = mutable_data<T>(weights);
  const uint8_t* flags = mask ? data<uint8_t>(*mask) : nullptr;
  const Strides from = strides_of(scores), masks = mask ? strides_of(*mask) : Strides{};
  const auto make_buffers = [&] {
    return Buffers{Buffer<float>(shape.key + kMostLanes), dropout.buffer(shape.key), {}};
  };
  for_each_row(shape, make_buffers, [&](int64_t number, int64_t b, int64_t h, int64_t q, Buffers& buffers) {
    const int64_t n = shape.visible(q), at = number * shape.key;
    const uint8_t* hidden =
        flags ? packed_flags(flags + masks.row(b, h, q), masks.key, n, buffers.flags) : nullptr;
    const WeightDropout drop = dropout.draw(b, (h * shape.query + q) * shape.key, n, buffers.words);
    const T* row = x + from.row(b, h, q);
    forward_row(
        row, row + from.query, hidden, results + at, drop.words ? undropped + at : nullptr, n, shape.key, scale,
        buffers.row.data(), drop);
  });
}

template <typename T>
void backward(
    const Scores& shape, const Tensor& dy, const Tensor& weights, const Tensor& dx, float scale,
    const Dropout& dropout) {
  const auto backward_row = MEGAGPT2_VARIANT(backward_row<T>);
  const T *gradients = data<T>(dy), *p = data<T>(weights);
  T* results = mutable_data<T>(dx);
  const Strides from = strides_of(dy), kept = strides_of(weights);
  const auto make_buffer = [&] { return dropout.buffer(shape.key); };
  for_each_row(
      shape, make_buffer, [&](int64_t number, int64_t b, int64_t h, int64_t q, Buffer<uint32_t>& words) {
        const int64_t n = shape.visible(q);
        const WeightDropout drop = dropout.draw(b, (h * shape.query + q) * shape.key, n, words);
        backward_row(
            gradients + from.row(b, h, q), p + kept.row(b, h, q), results + number * shape.key, n, shape.key, scale,
            drop);
      });
}

}  // namespace

Scores scores_of(const Tensor& x, bool causal) {
  STD_TORCH_CHECK(x.dim() == 4, "scores have ", x.dim(), " dimensions: they must be [batch, heads, query, key]");
  return {x.size(0), x.size(1), x.size(2), x.size(3), causal};
}

void check_mask(const Tensor& x, const std::optional<Tensor>& mask) {
  if (!mask) return;
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Bool && same_shape(*mask, x) && mask->is_cuda() == x.is_cuda(),
      "the mask must be bool, of the scores' shape (expand it) and on their device");
}

std::tuple<Tensor, Tensor> scale_mask_softmax_cpu(
    Tensor scores, double scale, bool causal, std::optional<Tensor> mask, std::optional<Tensor> samples, int64_t key0,
    int64_t key1, double probability, int64_t start) {
  const Scores shape = scores_of(scores, causal);
  check_mask(scores, mask);
  const Dropout dropout(scores, samples, key0, key1, probability, start);
  const Tensor from = with_packed_rows(scores);
  Tensor y = empty_contiguous_like(scores);
  Tensor weights = samples ? empty_contiguous_like(scores) : empty(scores, {0});
  with_type(scores.scalar_type(), [&](auto element) {
    forward<decltype(element)>(shape, from, mask, y, weights, static_cast<float>(scale), dropout);
  });
  return {y, weights};
}

Tensor scale_mask_softmax_backward_cpu(
    Tensor dy, Tensor weights, double scale, bool causal, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start) {
  const Scores shape = scores_of(weights, causal);
  check_same(weights, dy, "weights and dy");
  const Dropout dropout(weights, samples, key0, key1, probability, start);
  Tensor dx = empty_contiguous_like(weights);
  with_type(weights.scalar_type(), [&](auto element) {
    backward<decltype(element)>(
        shape, with_packed_rows(dy), with_packed_rows(weights), dx, static_cast<float>(scale), dropout);
  });
  return dx;
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def(
      "scale_mask_softmax(Tensor scores, float scale, bool causal, Tensor? mask, Tensor? samples, int key0, int key1,"
      " float probability, SymInt start) -> (Tensor, Tensor)");
  m.def(
      "scale_mask_softmax_backward(Tensor dy, Tensor weights, float scale, bool causal, Tensor? samples, int key0,"
      " int key1, float probability, SymInt start) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("scale_mask_softmax", TORCH_BOX(&scale_mask_softmax_cpu));
  m.impl("scale_mask_softmax_backward", TORCH_BOX(&scale_mask_softmax_backward_cpu));
}

}  // namespace megagpt2
