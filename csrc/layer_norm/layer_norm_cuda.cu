#include "layer_norm/layer_norm.h"

#include "common/column_sums.cuh"
#include "layer_norm/forward.cuh"

namespace megagpt2 {
namespace {

// Rows to normalize that are there already.
template <typename T>
struct Given {
  static constexpr int kWideThreads = 1024;
  const T* values;

  template <int V>
  __device__ __forceinline__ Pack<T, V> take(int64_t, int64_t, int64_t at) const {
    return load_pack<V>(values + at);
  }
};

// Backward: a block takes every kBackwardBlocks-th row, with one thread for each pack of columns (PACKS of them where
// a row has more packs than a block may have threads). A thread keeps the sums of dy xhat and of dy for its columns in
// registers and writes them once, into its rows of `partial` [2, blocks, width]; common/column_sums.cuh adds them.
constexpr int kBackwardBlocks = 528;  // four for each of an H200's 132 processors; a constant, so that sums repeat
constexpr int kBackwardThreads = 384;  // two blocks of so many on a processor leave 80 registers to a thread

template <typename T, int V, int PACKS>
__global__ void __launch_bounds__(kBackwardThreads, PACKS == 1 ? 2 : 1) backward_rows(
    const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ dz, const float* __restrict__ means,
    const float* __restrict__ rstds, const T* __restrict__ weight, T* __restrict__ dx, float* __restrict__ partial,
    int64_t rows, int width) {
  __shared__ float shared[4][kWarp];
  float d_weight[PACKS][V] = {}, d_bias[PACKS][V] = {};
  Pack<T, V> w[PACKS];
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int column = (k * blockDim.x + threadIdx.x) * V;
    if (column < width) w[k] = load_pack<V>(weight + column);
  }
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 2) {
    const int64_t at = row * width;
    const float mean = means[row], rstd = rstds[row];
    Pack<T, V> inputs[PACKS], gradients[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int column = (k * blockDim.x + threadIdx.x) * V;
      if (column < width) {
        inputs[k] = load_pack<V>(x + at + column);
        gradients[k] = load_pack<V>(dy + at + column);
      }
    }
    float sum = 0.0f, product = 0.0f;  // of g = dy weight, and of g xhat
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if ((k * blockDim.x + threadIdx.x) * V < width) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float xhat = (to_float(inputs[k].value[v]) - mean) * rstd, d = to_float(gradients[k].value[v]);
          const float g = d * to_float(w[k].value[v]);
          d_weight[k][v] += d * xhat;
          d_bias[k][v] += d;
          sum += g;
          product += g * xhat;
        }
      }
    }
    const Two sums = block_sum(Two{sum, product}, shared + turn);
    const float a = sums.first / width, b = sums.second / width;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int column = (k * blockDim.x + threadIdx.x) * V;
      if (column < width) {
        Pack<T, V> residual, result;
        if (dz) residual = load_pack<V>(dz + at + column);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float xhat = (to_float(inputs[k].value[v]) - mean) * rstd;
          const float g = to_float(gradients[k].value[v]) * to_float(w[k].value[v]);
          const float d = (g - a - xhat * b) * rstd;
          result.value[v] = from_float<T>(dz ? d + to_float(residual.value[v]) : d);
        }
        store_pack<V>(dx + at + column, result);
      }
    }
  }
  float* weight_sums = partial + int64_t{blockIdx.x} * width;
  float* bias_sums = weight_sums + int64_t{gridDim.x} * width;
#pragma unroll
  for (int k = 0; k < PACKS; ++k) {
    const int column = (k * blockDim.x + threadIdx.x) * V;
    if (column < width) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        weight_sums[column + v] = d_weight[k][v];
        bias_sums[column + v] = d_bias[k][v];
      }
    }
  }
}

constexpr int kWidest = 1024;  // threads

// Rows that are wider than a block's registers: x and dy are read twice, the sums of a block live in its rows of
// `partial`, which begins with zeros.
template <typename T, int V>
__global__ void __launch_bounds__(kWidest) backward_wide_rows(
    const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ dz, const float* __restrict__ means,
    const float* __restrict__ rstds, const T* __restrict__ weight, T* __restrict__ dx, float* __restrict__ partial,
    int64_t rows, int64_t width) {
  __shared__ float shared[4][kWarp];
  float* weight_sums = partial + int64_t{blockIdx.x} * width;
  float* bias_sums = weight_sums + int64_t{gridDim.x} * width;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 2) {
    const int64_t at = row * width;
    const float mean = means[row], rstd = rstds[row];
    float sum = 0.0f, product = 0.0f;
    for (int64_t column = threadIdx.x * V; column < width; column += kWidest * V) {
      const Pack<T, V> input = load_pack<V>(x + at + column), gradient = load_pack<V>(dy + at + column);
      const Pack<T, V> w = load_pack<V>(weight + column);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float xhat = (to_float(input.value[v]) - mean) * rstd, d = to_float(gradient.value[v]);
        const float g = d * to_float(w.value[v]);
        weight_sums[column + v] += d * xhat;
        bias_sums[column + v] += d;
        sum += g;
        product += g * xhat;
      }
    }
    const Two sums = block_sum(Two{sum, product}, shared + turn);
    const float a = sums.first / width, b = sums.second / width;
    for (int64_t column = threadIdx.x * V; column < width; column += kWidest * V) {
      const Pack<T, V> input = load_pack<V>(x + at + column), gradient = load_pack<V>(dy + at + column);
      const Pack<T, V> w = load_pack<V>(weight + column);
      Pack<T, V> result, residual;
      if (dz) residual = load_pack<V>(dz + at + column);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float xhat = (to_float(input.value[v]) - mean) * rstd;
        const float d = (to_float(gradient.value[v]) * to_float(w.value[v]) - a - xhat * b) * rstd;
        result.value[v] = from_float<T>(dz ? d + to_float(residual.value[v]) : d);
      }
      store_pack<V>(dx + at + column, result);
    }
  }
}

template <typename T, int V>
void backward(
    const T* dy, const T* x, const T* dz, const float* means, const float* rstds, const T* weight, T* dx,
    float* partial, int blocks, int64_t rows, int64_t width, cudaStream_t stream) {
  const int64_t packs = (width + V - 1) / V;
  const auto launch = [&](auto kernel, int count) {
    const int64_t threads = (packs + count - 1) / count;
    kernel<<<blocks, static_cast<unsigned>((threads + kWarp - 1) / kWarp * kWarp), 0, stream>>>(
        dy, x, dz, means, rstds, weight, dx, partial, rows, static_cast<int>(width));
  };
  if (packs <= kBackwardThreads) {
    launch(backward_rows<T, V, 1>, 1);
  } else if (packs <= 2 * kBackwardThreads) {
    launch(backward_rows<T, V, 2>, 2);
  } else if (packs <= 4 * kBackwardThreads) {
    launch(backward_rows<T, V, 4>, 4);
  } else {
    STD_CUDA_CHECK(cudaMemsetAsync(partial, 0, 2 * sizeof(float) * blocks * width, stream));
    backward_wide_rows<T, V><<<blocks, kWidest, 0, stream>>>(
        dy, x, dz, means, rstds, weight, dx, partial, rows, width);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_cuda(Tensor x, Tensor weight, Tensor bias, double epsilon) {
  const auto [rows, width] = checked_rows(x, weight, bias);
  const Tensor from = packed(x), weights = packed(weight), biases = packed(bias);
  Tensor y = empty_contiguous_like(x);
  Tensor mean = empty_floats(x, {rows}), rstd = empty_floats(x, {rows});
  if (x.numel() == 0) return {y, mean, rstd};
  const DeviceGuard guard(x.get_device_index());
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const T *source = data<T>(from), *w = data<T>(weights), *b = data<T>(biases);
    T* target = mutable_data<T>(y);
    with_pack<T>(
        width,
        [&](auto v) {
          forward<T, decltype(v)::value>(
              Given<T>{source}, w, b, target, mutable_data<float>(mean), mutable_data<float>(rstd), rows, width,
              static_cast<float>(epsilon), stream_of(x));
        },
        source, w, b, target);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, std::optional<Tensor> dz) {
  const auto [rows, width] = checked_rows(dy, x, mean, rstd, weight, dz);
  const Tensor gradients = packed(dy), inputs = packed(x), weights = packed(weight);
  const Tensor residual = dz ? packed(*dz) : inputs;
  Tensor dx = empty_contiguous_like(x), d_weight = empty(x, {width}), d_bias = empty(x, {width});
  const int blocks = static_cast<int>(rows < kBackwardBlocks ? rows : kBackwardBlocks);
  const DeviceGuard guard(x.get_device_index());
  if (x.numel() == 0) return {dx, torch::stable::zero_(d_weight), torch::stable::zero_(d_bias)};
  Tensor partial = empty_floats(x, {2, blocks, width});
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const T *dys = data<T>(gradients), *xs = data<T>(inputs), *w = data<T>(weights);
    const T* dzs = dz ? data<T>(residual) : nullptr;
    T* out = mutable_data<T>(dx);
    with_pack<T>(
        width,
        [&](auto v) {
          backward<T, decltype(v)::value>(
              dys, xs, dzs, data<float>(mean), data<float>(rstd), w, out, mutable_data<float>(partial), blocks, rows,
              width, stream_of(x));
        },
        dys, xs, w, out, dzs);
    const float* parts = data<float>(partial);
    launch_add_partials<T>(parts, blocks, width, mutable_data<T>(d_weight), stream_of(x));
    launch_add_partials<T>(parts + blocks * width, blocks, width, mutable_data<T>(d_bias), stream_of(x));
  });
  return {dx, d_weight, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm_cuda));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward_cuda));
}

}  // namespace megagpt2
