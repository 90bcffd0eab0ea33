#include "scale_mask_softmax/scale_mask_softmax.h"

#include <algorithm>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/buffer.h"
#include "common/past_caches.h"
#include "dropout/row_bits.h"

#define MEGAGPT2_LOOPS "scale_mask_softmax/scale_mask_softmax_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // what is worth waking a thread for
constexpr int64_t kMostOfPair = 32;
constexpr int64_t kQueriesTogether = 16;

// The query whose turn it is: groups are taken from both ends in turns, the first, the last, the second, ... Threads
// share the turns in order, so each has as much to do under a causal mask. Within a group memory is read in order.
int64_t query_of(int64_t turn, int64_t query) {
  const int64_t groups = query / kQueriesTogether, group = turn / kQueriesTogether;
  if (group >= groups) return turn;
  const int64_t taken = group % 2 == 0 ? group / 2 : groups - 1 - group / 2;
  return taken * kQueriesTogether + turn % kQueriesTogether;
}

// A row: number * key is where it begins in a contiguous tensor.
struct Place {
  int64_t number, b, h, q;

  int64_t in(const Strides& strides) const { return strides.row(b, h, q); }
};

// Calls row(place, ahead, task) for every row: `ahead` is where this thread is kRowsAhead rows later, `task` what
// make_task() gave it.
constexpr int64_t kRowsAhead = 2;
template <typename MakeTask, typename Row>
void for_each_row(const Scores& shape, const MakeTask& make_task, const Row& row) {
  const int64_t rows_per_task = std::max<int64_t>(kElementsPerTask / std::max<int64_t>(shape.key, 1), 1);
  torch::stable::parallel_for(0, shape.rows(), rows_per_task, [&](int64_t begin, int64_t end) {
    const auto place = [&](int64_t i) {
      i = std::min(i, end - 1);
      const int64_t head = i / shape.query, q = query_of(i % shape.query, shape.query);
      return Place{head * shape.query + q, head / shape.heads, head % shape.heads, q};
    };
    auto task = make_task();
    Place places[kRowsAhead + 1];
    for (int64_t i = 0; i < kRowsAhead; ++i) places[i] = place(begin + i);
    for (int64_t i = begin; i < end; ++i) {
      places[kRowsAhead] = place(i + kRowsAhead);
      row(places[0], places[kRowsAhead], task);
      std::copy(places + 1, places + kRowsAhead + 1, places);
    }
  });
}

// What is dropped of the first n elements of a row, whose bits go to `room`.
WeightDropout draw(const RowDropout& dropout, int64_t row, int64_t n, Buffer<uint16_t>& room) {
  if (!dropout.samples) return {};
  return {draw_row(dropout, row, 0, n, room.data()), dropout.threshold, dropout.scale};
}
Buffer<uint16_t> room_for(const RowDropout& dropout) {
  return Buffer<uint16_t>(dropout.samples ? room_for_row(dropout.width) : 0);
}

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
  Buffer<uint16_t> bits;
  std::vector<uint8_t> flags;
  Fence fence;
};

template <typename T>
void forward(
    const Scores& shape, const Tensor& scores, const std::optional<Tensor>& mask, const Tensor& y,
    const Tensor& weights, Exponent exponent, const RowDropout& dropout) {
  const auto forward_row = MEGAGPT2_VARIANT(forward_row<T>);
  const T* x = data<T>(scores);
  T *results = mutable_data<T>(y), *undropped = mutable_data<T>(weights);
  const uint8_t* flags = mask ? data<uint8_t>(*mask) : nullptr;
  const Strides from = strides_of(scores), masks = mask ? strides_of(*mask) : Strides{};
  const int64_t tensors = dropout.samples ? 3 : 2;
  const bool past = past_caches(tensors, results, shape.rows(), shape.key) &&
      (!dropout.samples || past_caches(tensors, undropped, shape.rows(), shape.key));
  const auto make_buffers = [&] {
    return Buffers{Buffer<float>(shape.key + kMostOfPair), room_for(dropout), {}, Fence(past)};
  };
  for_each_row(shape, make_buffers, [&](const Place& place, const Place& ahead, Buffers& buffers) {
    const int64_t n = shape.visible(place.q), at = place.number * shape.key;
    const uint8_t* hidden = flags ? packed_flags(flags + place.in(masks), masks.key, n, buffers.flags) : nullptr;
    const WeightDropout drop = draw(dropout, place.number, n, buffers.bits);
    forward_row(
        x + place.in(from), Ahead<T>{x + ahead.in(from), shape.visible(ahead.q)}, hidden, results + at, past,
        drop.drawn ? undropped + at : nullptr, n, shape.key, exponent, buffers.row.data(), drop);
  });
}

template <typename T>
void backward(
    const Scores& shape, const Tensor& dy, const Tensor& weights, const Tensor& dx, float scale,
    const RowDropout& dropout) {
  const auto backward_row = MEGAGPT2_VARIANT(backward_row<T>);
  const T *gradients = data<T>(dy), *p = data<T>(weights);
  T* results = mutable_data<T>(dx);
  const Strides from = strides_of(dy), kept = strides_of(weights);
  const bool past = past_caches(3, results, shape.rows(), shape.key);
  struct Task {
    Buffer<uint16_t> bits;
    Fence fence;
  };
  const auto make_task = [&] { return Task{room_for(dropout), Fence(past)}; };
  for_each_row(shape, make_task, [&](const Place& place, const Place& ahead, Task& task) {
    const int64_t n = shape.visible(place.q), m = shape.visible(ahead.q);
    backward_row(
        gradients + place.in(from), p + place.in(kept), Ahead<T>{gradients + ahead.in(from), m},
        Ahead<T>{p + ahead.in(kept), m}, results + place.number * shape.key, past, n, shape.key, scale,
        draw(dropout, place.number, n, task.bits));
  });
}

}  // namespace

std::tuple<Tensor, Tensor> scale_mask_softmax_cpu(
    Tensor scores, double scale, bool causal, std::optional<Tensor> mask, std::optional<Tensor> samples, int64_t key0,
    int64_t key1, double probability, int64_t start) {
  const Scores shape = scores_of(scores, causal);
  check_mask(scores, mask);
  const DropoutArguments dropout = dropout_arguments(scores, samples, key0, key1, probability, start);
  const Tensor from = with_packed_rows(scores);
  Tensor y = empty_contiguous_like(scores);
  Tensor weights = samples ? empty_contiguous_like(scores) : empty(scores, {0});
  with_type(scores.scalar_type(), [&](auto element) {
    forward<decltype(element)>(shape, from, mask, y, weights, exponent_of(scale), dropout.rows);
  });
  return {y, weights};
}

Tensor scale_mask_softmax_backward_cpu(
    Tensor dy, Tensor weights, double scale, bool causal, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start) {
  const Scores shape = scores_of(weights, causal);
  check_same(weights, dy, "weights and dy");
  const DropoutArguments dropout = dropout_arguments(weights, samples, key0, key1, probability, start);
  Tensor dx = empty_contiguous_like(weights);
  with_type(weights.scalar_type(), [&](auto element) {
    backward<decltype(element)>(
        shape, with_packed_rows(dy), with_packed_rows(weights), dx, static_cast<float>(scale), dropout.rows);
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
