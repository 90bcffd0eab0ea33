#include "scale_mask_softmax/scale_mask_softmax.h"

#include "common/cuda.cuh"
#include "dropout/row_dropout.cuh"

namespace megagpt2 {
namespace {

// A row belongs to a warp, or to a whole block where it is long. Each thread keeps its PACKS packs in registers from
// the one read on, as scores times the scale's sign. The largest is subtracted before they are multiplied by the rest of
// the scale, over log 2 as exp2 is what the hardware has: so that large scores lose nothing to rounding.
//
//     warp per row      4 rows a block         up to 4 packs a lane: 1024 keys of 16 bits
//     block per row     256 or 512 threads     up to 4 packs a thread: 16,384 keys of 16 bits
//     longer rows       512 threads            read three times, from a cache mostly; unaligned rows too
//
// Packs are read up to the last visible key: its pack may hold hidden ones, which are not used.
constexpr int kRowsOfWarps = 4;
constexpr int kWidest = 512;  // threads: with more, dropout would not find its registers

// Bit v: whether element `offset` + v of sample b stays.
template <int V>
__device__ __forceinline__ unsigned stay(const RowDropout& dropout, int64_t b, int64_t offset) {
  const auto first = static_cast<uint64_t>(dropout.start + offset), sample = static_cast<uint64_t>(dropout.samples[b]);
  return kept_bits<V>(first, sample, dropout.key, dropout.threshold);
}

// A row of a tensor, and the place of its first element in the sample.
struct Row {
  int64_t b, h, q, n, offset;
};

__device__ __forceinline__ Row row_of(const Scores& shape, int64_t number) {
  const int64_t head = number / shape.query, q = number % shape.query;
  const int64_t b = head / shape.heads, h = head % shape.heads;
  return {b, h, q, shape.visible(q), (h * shape.query + q) * shape.key};
}

// What lanes of a row's warp, or threads of its block, do together.
template <int THREADS>
struct Team {
  static constexpr bool kBlock = THREADS != kWarp;
  static constexpr int kRows = kBlock ? 1 : kRowsOfWarps, kThreads = THREADS * kRows;  // of a block

  static __device__ __forceinline__ int lane() { return kBlock ? threadIdx.x : threadIdx.x % kWarp; }
  static __device__ __forceinline__ int64_t first() {
    return int64_t{blockIdx.x} * kRows + (kBlock ? 0 : threadIdx.x / kWarp);
  }
  static __device__ __forceinline__ int64_t step() { return int64_t{gridDim.x} * kRows; }
  static __device__ __forceinline__ float sum(float x, float* shared) {
    if constexpr (kBlock) return block_sum(x, shared);
    return warp_sum(x);
  }
  static __device__ __forceinline__ float max(float x, float* shared) {
    if constexpr (kBlock) return block_max(x, shared);
    return warp_max(x);
  }
};

template <typename T>
struct Forward {
  Scores shape;
  const T* scores;
  const bool* mask;  // or null
  T *y, *weights;
  Strides from, masks;
  Exponent exponent;
  RowDropout dropout;

  // Bit v: whether the row sees key column + v.
  template <int V, bool PLAIN>
  __device__ __forceinline__ unsigned visible(const Row& row, int64_t column) const {
    const int64_t left = row.n - column;
    unsigned bits = left >= V ? (1u << V) - 1u : left > 0 ? (1u << left) - 1u : 0u;
    if (!PLAIN && mask && bits) {
      const bool* flags = mask + masks.row(row.b, row.h, row.q) + column * masks.key;
      const int last = left < V ? static_cast<int>(left) - 1 : V - 1;
#pragma unroll
      for (int v = 0; v < V; ++v) bits &= ~(static_cast<unsigned>(flags[(v < last ? v : last) * masks.key]) << v);
    }
    return bits;
  }

  // Whether the row sees one of the keys first, first + step, ..., V at each.
  template <int V, bool PLAIN>
  __device__ __forceinline__ bool sees_any(const Row& row, int64_t first, int64_t step) const {
    unsigned bits = 0;
#pragma unroll 1
    for (int64_t column = first; column < row.n; column += step) bits |= visible<V, PLAIN>(row, column);
    return bits != 0;
  }

  template <int V, bool PLAIN>
  __device__ __forceinline__ void signed_scores(
      const Row& row, int64_t column, const Pack<T, V>& x, float (&z)[V]) const {
    const unsigned bits = visible<V, PLAIN>(row, column);
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = bits >> v & 1u ? to_float(x.value[v]) * exponent.sign : -INFINITY;
  }

  // 0 for a hidden key, whose z is -infinity, where another one is larger.
  __device__ __forceinline__ float exponential(float z, float most) const { return exp2f((z - most) * exponent.size); }

  // Writes V weights, from their exponentials e where there is a visible key. Hidden ones among these are 0 in e, but for
  // a row whose weights are not finite, or that sees nothing: then they are asked for again.
  template <int V, bool PLAIN>
  __device__ __forceinline__ void write(
      const Row& row, int64_t at, int64_t column, const float (&e)[V], float inverse) const {
    Pack<T, V> p, dropped;
    const bool trusted = inverse > 0.0f && inverse < INFINITY;
    const unsigned bits = column >= row.n ? 0u : trusted ? ~0u : visible<V, PLAIN>(row, column);
    const unsigned kept =
        !PLAIN && dropout.samples && column < row.n ? stay<V>(dropout, row.b, row.offset + column) : 0u;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float weight = bits >> v & 1u ? e[v] * inverse : 0.0f;
      p.value[v] = from_float<T>(weight);
      if constexpr (!PLAIN) dropped.value[v] = from_float<T>(kept >> v & 1u ? weight * dropout.scale : 0.0f);
    }
    if (PLAIN || !dropout.samples) {
      store_pack<V>(y + at + column, p);
    } else {
      store_pack<V>(weights + at + column, p);
      store_pack<V>(y + at + column, dropped);
    }
  }
};

// 1 / total, or 0 for a row that sees nothing, whose total is NaN like that of a row of -infinities. seen(): whether
// this thread knows of a visible key; asked only where it matters.
template <typename Team, typename Seen>
__device__ __forceinline__ float inverse_of(float total, float most, const Seen& seen, float* shared) {
  if (most > -INFINITY) return 1.0f / total;
  return Team::max(seen() ? 1.0f : 0.0f, shared) > 0.0f ? 1.0f / total : 0.0f;
}

template <typename T, int V, int THREADS, int PACKS, bool PLAIN>
__global__ void __launch_bounds__(Team<THREADS>::kThreads, 1) forward_rows(const Forward<T> f) {
  using Us = Team<THREADS>;
  __shared__ float shared[2][3][kWarp];
  int turn = 0;  // successive rows use different pieces
  for (int64_t number = Us::first(); number < f.shape.rows(); number += Us::step(), turn ^= 1) {
    const Row row = row_of(f.shape, number);
    const T* x = f.scores + f.from.row(row.b, row.h, row.q);
    const auto column = [&](int k) { return (k * THREADS + Us::lane()) * V; };
    Pack<T, V> part[PACKS] = {};
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if (column(k) < row.n) part[k] = load_pack<V>(x + column(k));
    }
    float z[PACKS][V], most = -INFINITY, total = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      f.template signed_scores<V, PLAIN>(row, column(k), part[k], z[k]);
#pragma unroll
      for (int v = 0; v < V; ++v) most = fmaxf(most, z[k][v]);
    }
    most = Us::max(most, shared[turn][0]);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if (column(k) >= row.n) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) total += z[k][v] = f.exponential(z[k][v], most);
    }
    total = Us::sum(total, shared[turn][1]);
    const auto seen = [&] { return f.template sees_any<V, PLAIN>(row, column(0), THREADS * V); };
    const float inverse = inverse_of<Us>(total, most, seen, shared[turn][2]);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if (column(k) < f.shape.key) f.template write<V, PLAIN>(row, number * f.shape.key, column(k), z[k], inverse);
    }
  }
}

// One block on a processor is enough: said, as ptxas would rather spill a few registers than use more than 64.
template <typename T, int V>
__global__ void __launch_bounds__(kWidest, 1) forward_long_rows(const Forward<T> f) {
  using Us = Team<kWidest>;
  __shared__ float shared[2][3][kWarp];
  int turn = 0;
  const int64_t first = threadIdx.x * V, step = int64_t{blockDim.x} * V;
  for (int64_t number = blockIdx.x; number < f.shape.rows(); number += gridDim.x, turn ^= 1) {
    const Row row = row_of(f.shape, number);
    const T* x = f.scores + f.from.row(row.b, row.h, row.q);
    float z[V] = {}, most = -INFINITY, total = 0.0f;
    for (int64_t column = first; column < row.n; column += step) {
      f.template signed_scores<V, false>(row, column, load_pack<V>(x + column), z);
#pragma unroll
      for (int v = 0; v < V; ++v) most = fmaxf(most, z[v]);
    }
    most = Us::max(most, shared[turn][0]);
    for (int64_t column = first; column < row.n; column += step) {
      f.template signed_scores<V, false>(row, column, load_pack<V>(x + column), z);
#pragma unroll
      for (int v = 0; v < V; ++v) total += f.exponential(z[v], most);
    }
    total = Us::sum(total, shared[turn][1]);
    const auto seen = [&] { return f.template sees_any<V, false>(row, first, step); };
    const float inverse = inverse_of<Us>(total, most, seen, shared[turn][2]);
    for (int64_t column = first; column < f.shape.key; column += step) {
      if (column < row.n) {
        f.template signed_scores<V, false>(row, column, load_pack<V>(x + column), z);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] = f.exponential(z[v], most);
      }
      f.template write<V, false>(row, number * f.shape.key, column, z, inverse);
    }
  }
}

template <typename T>
struct Backward {
  Scores shape;
  const T *dy, *weights;
  T* dx;
  Strides from, kept;
  float scale;
  RowDropout dropout;

  // The gradients of V weights before dropout, but for its factor, and the weights; both 0 past the visible keys. Where a
  // weight is 0, as a hidden one is, its gradient counts for nothing, whatever it is.
  template <int V>
  __device__ __forceinline__ void load(const Row& row, int64_t column, Pack<T, V>& g, Pack<T, V>& p) const {
    if (column >= row.n) {
      g = p = {};
      return;
    }
    g = load_pack<V>(dy + from.row(row.b, row.h, row.q) + column);
    p = load_pack<V>(weights + kept.row(row.b, row.h, row.q) + column);
    unsigned bits = dropout.samples ? stay<V>(dropout, row.b, row.offset + column) : ~0u;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (column + v >= row.n) p.value[v] = {};
      if (to_float(p.value[v]) == 0.0f || !(bits >> v & 1u)) g.value[v] = {};
    }
  }

  template <int V>
  __device__ __forceinline__ float product(const Pack<T, V>& g, const Pack<T, V>& p) const {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) sum += to_float(g.value[v]) * dropout.scale * to_float(p.value[v]);
    return sum;
  }

  //     dx = scale p (g - sum(g p))
  template <int V>
  __device__ __forceinline__ void write(
      const Row& row, int64_t at, int64_t column, const Pack<T, V>& g, const Pack<T, V>& p, float sum) const {
    Pack<T, V> d = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (to_float(p.value[v]) != 0.0f) {  // 0 times an infinite sum would be NaN
        d.value[v] = from_float<T>((to_float(g.value[v]) * dropout.scale - sum) * to_float(p.value[v]) * scale);
      }
    }
    store_pack<V>(dx + at + column, d);
  }
};

template <typename T, int V, int THREADS, int PACKS>
__global__ void __launch_bounds__(Team<THREADS>::kThreads) backward_rows(const Backward<T> f) {
  using Us = Team<THREADS>;
  __shared__ float shared[2][kWarp];
  int turn = 0;
  for (int64_t number = Us::first(); number < f.shape.rows(); number += Us::step(), turn ^= 1) {
    const Row row = row_of(f.shape, number);
    const auto column = [&](int k) { return (k * THREADS + Us::lane()) * V; };
    Pack<T, V> g[PACKS], p[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) f.template load<V>(row, column(k), g[k], p[k]);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) sum += f.template product<V>(g[k], p[k]);
    sum = Us::sum(sum, shared[turn]);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if (column(k) < f.shape.key) f.template write<V>(row, number * f.shape.key, column(k), g[k], p[k], sum);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kWidest) backward_long_rows(const Backward<T> f) {
  __shared__ float shared[2][kWarp];
  int turn = 0;
  const int64_t first = threadIdx.x * V, step = int64_t{blockDim.x} * V;
  for (int64_t number = blockIdx.x; number < f.shape.rows(); number += gridDim.x, turn ^= 1) {
    const Row row = row_of(f.shape, number);
    Pack<T, V> g, p;
    float sum = 0.0f;
    for (int64_t column = first; column < row.n; column += step) {
      f.template load<V>(row, column, g, p);
      sum += f.template product<V>(g, p);
    }
    sum = block_sum(sum, shared[turn]);
    for (int64_t column = first; column < f.shape.key; column += step) {
      f.template load<V>(row, column, g, p);
      f.template write<V>(row, number * f.shape.key, column, g, p, sum);
    }
  }
}

template <int THREADS>
unsigned blocks_of(int64_t rows) {
  return grid_of((rows + Team<THREADS>::kRows - 1) / Team<THREADS>::kRows);
}

// Calls launch(threads, packs) with constants that hold a row of `key` elements, V at a time, or rest(threads) where
// there are none: for long rows, and those that are read one by one.
template <int V, typename Launch, typename Rest>
void by_length(int64_t key, const Launch& launch, const Rest& rest) {
  using std::integral_constant;
  constexpr integral_constant<int, kWarp> warp{};
  const int64_t packs = (key + V - 1) / V;
  if constexpr (V > 1) {
    if (packs <= kWarp) return launch(warp, integral_constant<int, 1>{});
    if (packs <= 2 * kWarp) return launch(warp, integral_constant<int, 2>{});
    if (packs <= 4 * kWarp) return launch(warp, integral_constant<int, 4>{});
    if (packs <= 4 * 256) return launch(integral_constant<int, 256>{}, integral_constant<int, 4>{});
    if (packs <= 4 * kWidest) return launch(integral_constant<int, kWidest>{}, integral_constant<int, 4>{});
  }
  rest(static_cast<unsigned>(packs < kWidest ? (packs + kWarp - 1) / kWarp * kWarp : kWidest));
}

// Whether the rows of a tensor of these strides begin where packs do.
template <typename T>
bool keeps_alignment(const Strides& x) {
  return x.batch % kPackOf<T> == 0 && x.head % kPackOf<T> == 0 && x.query % kPackOf<T> == 0;
}

template <typename T, int V>
void launch_forward(const Forward<T>& f, cudaStream_t stream) {
  const int64_t rows = f.shape.rows();
  const bool plain = !f.mask && !f.dropout.samples;
  by_length<V>(
      f.shape.key,
      [&](auto threads, auto packs) {
        constexpr int kThreads = decltype(threads)::value, kPacks = decltype(packs)::value;
        const auto kernel =
            plain ? forward_rows<T, V, kThreads, kPacks, true> : forward_rows<T, V, kThreads, kPacks, false>;
        kernel<<<blocks_of<kThreads>(rows), Team<kThreads>::kThreads, 0, stream>>>(f);
      },
      [&](unsigned threads) { forward_long_rows<T, V><<<grid_of(rows), threads, 0, stream>>>(f); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, int V>
void launch_backward(const Backward<T>& f, cudaStream_t stream) {
  const int64_t rows = f.shape.rows();
  by_length<V>(
      f.shape.key,
      [&](auto threads, auto packs) {
        constexpr int kThreads = decltype(threads)::value, kPacks = decltype(packs)::value;
        backward_rows<T, V, kThreads, kPacks><<<blocks_of<kThreads>(rows), Team<kThreads>::kThreads, 0, stream>>>(f);
      },
      [&](unsigned threads) { backward_long_rows<T, V><<<grid_of(rows), threads, 0, stream>>>(f); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::tuple<Tensor, Tensor> scale_mask_softmax_cuda(
    Tensor scores, double scale, bool causal, std::optional<Tensor> mask, std::optional<Tensor> samples, int64_t key0,
    int64_t key1, double probability, int64_t start) {
  const Scores shape = scores_of(scores, causal);
  check_mask(scores, mask);
  const DeviceGuard guard(scores.get_device_index());
  const DropoutArguments dropout = dropout_arguments(scores, samples, key0, key1, probability, start);
  const Tensor from = with_packed_rows(scores);
  Tensor y = empty_contiguous_like(scores);
  Tensor weights = samples ? empty_contiguous_like(scores) : empty(scores, {0});
  if (scores.numel() == 0) return {y, weights};
  with_type(scores.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Forward<T> f = {
        shape, data<T>(from), mask ? data<bool>(*mask) : nullptr, mutable_data<T>(y), mutable_data<T>(weights),
        strides_of(from), mask ? strides_of(*mask) : Strides{}, exponent_of(scale), dropout.rows};
    if (takes_packs<T>(shape.key, f.scores, f.y, f.weights) && keeps_alignment<T>(f.from)) {
      launch_forward<T, kPackOf<T>>(f, stream_of(scores));
    } else {
      launch_forward<T, 1>(f, stream_of(scores));
    }
  });
  return {y, weights};
}

Tensor scale_mask_softmax_backward_cuda(
    Tensor dy, Tensor weights, double scale, bool causal, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start) {
  const Scores shape = scores_of(weights, causal);
  check_same(weights, dy, "weights and dy");
  const DeviceGuard guard(weights.get_device_index());
  const DropoutArguments dropout = dropout_arguments(weights, samples, key0, key1, probability, start);
  const Tensor gradients = with_packed_rows(dy), p = with_packed_rows(weights);
  Tensor dx = empty_contiguous_like(weights);
  if (weights.numel() == 0) return dx;
  with_type(weights.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Backward<T> f = {
        shape, data<T>(gradients), data<T>(p), mutable_data<T>(dx), strides_of(gradients), strides_of(p),
        static_cast<float>(scale), dropout.rows};
    if (takes_packs<T>(shape.key, f.dy, f.weights, f.dx) && keeps_alignment<T>(f.from) && keeps_alignment<T>(f.kept)) {
      launch_backward<T, kPackOf<T>>(f, stream_of(weights));
    } else {
      launch_backward<T, 1>(f, stream_of(weights));
    }
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) {
  m.impl("scale_mask_softmax", TORCH_BOX(&scale_mask_softmax_cuda));
  m.impl("scale_mask_softmax_backward", TORCH_BOX(&scale_mask_softmax_backward_cuda));
}

}  // namespace megagpt2
