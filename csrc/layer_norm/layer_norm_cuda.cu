#include "layer_norm/layer_norm.h"

#include "common/column_sums.cuh"
#include "common/cuda.cuh"

namespace megagpt2 {
namespace {

// Forward: a row belongs to a warp, or to a whole block where it is wide. Each thread keeps its PACKS packs of x in
// registers from the one read on: the mean, the variance about it, and y are made of them.
//
//     warp per row      4 rows a block         up to 8 packs a lane
//     block per row     256 or 1024 threads    up to 4 packs a thread
//     wider rows        1024 threads           x is read again for the variance and for y, from the L2 cache mostly
constexpr int kRowsOfWarps = 4;

template <bool whole_block>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  if constexpr (whole_block) {
    return block_sum(x, shared);
  } else {
    return warp_sum(x);
  }
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> normalized(
    const Pack<T, V>& x, const T* weight, const T* bias, float mean, float rstd) {
  const Pack<T, V> w = load_pack<V>(weight), b = load_pack<V>(bias);
  Pack<T, V> y;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    y.value[v] = from_float<T>((to_float(x.value[v]) - mean) * rstd * to_float(w.value[v]) + to_float(b.value[v]));
  }
  return y;
}

template <typename T, int V, int THREADS, int PACKS>
__global__ void __launch_bounds__(THREADS == kWarp ? kRowsOfWarps * kWarp : THREADS) forward_rows(
    const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y,
    float* __restrict__ means, float* __restrict__ rstds, int64_t rows, int width, float epsilon) {
  constexpr bool kWholeBlock = THREADS > kWarp;
  __shared__ float shared[kWholeBlock ? 4 : 1][kWarp];
  const int lane = kWholeBlock ? threadIdx.x : threadIdx.x % kWarp;
  const int64_t first = kWholeBlock ? blockIdx.x : int64_t{blockIdx.x} * kRowsOfWarps + threadIdx.x / kWarp;
  const int64_t step = kWholeBlock ? gridDim.x : int64_t{gridDim.x} * kRowsOfWarps;
  int turn = 0;  // successive sums use different pieces of shared memory
  for (int64_t row = first; row < rows; row += step, turn ^= 2) {
    const T* from = x + row * width;
    Pack<T, V> part[PACKS];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int column = (k * THREADS + lane) * V;
      if (column < width) part[k] = load_pack<V>(from + column);
    }
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if ((k * THREADS + lane) * V < width) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum += to_float(part[k].value[v]);
      }
    }
    const float mean = row_sum<kWholeBlock>(sum, shared[kWholeBlock ? turn : 0]) / width;
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if ((k * THREADS + lane) * V < width) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float d = to_float(part[k].value[v]) - mean;
          squares += d * d;
        }
      }
    }
    const float rstd = rsqrtf(row_sum<kWholeBlock>(squares, shared[kWholeBlock ? turn + 1 : 0]) / width + epsilon);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int column = (k * THREADS + lane) * V;
      if (column < width) {
        store_pack<V>(y + row * width + column, normalized<T, V>(part[k], weight + column, bias + column, mean, rstd));
      }
    }
    if (lane == 0) {
      means[row] = mean;
      rstds[row] = rstd;
    }
  }
}

constexpr int kWidest = 1024;  // threads

template <typename T, int V>
__global__ void __launch_bounds__(kWidest) forward_wide_rows(
    const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y,
    float* __restrict__ means, float* __restrict__ rstds, int64_t rows, int64_t width, float epsilon) {
  __shared__ float shared[4][kWarp];
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 2) {
    const T* from = x + row * width;
    float sum = 0.0f, squares = 0.0f;
    for (int64_t column = threadIdx.x * V; column < width; column += kWidest * V) {
      const Pack<T, V> part = load_pack<V>(from + column);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += to_float(part.value[v]);
    }
    const float mean = block_sum(sum, shared[turn]) / width;
    for (int64_t column = threadIdx.x * V; column < width; column += kWidest * V) {
      const Pack<T, V> part = load_pack<V>(from + column);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float d = to_float(part.value[v]) - mean;
        squares += d * d;
      }
    }
    const float rstd = rsqrtf(block_sum(squares, shared[turn + 1]) / width + epsilon);
    for (int64_t column = threadIdx.x * V; column < width; column += kWidest * V) {
      store_pack<V>(
          y + row * width + column,
          normalized<T, V>(load_pack<V>(from + column), weight + column, bias + column, mean, rstd));
    }
    if (threadIdx.x == 0) {
      means[row] = mean;
      rstds[row] = rstd;
    }
  }
}

template <typename T, int V, int THREADS, int PACKS>
void launch_forward(
    const T* x, const T* weight, const T* bias, T* y, float* means, float* rstds, int64_t rows, int64_t width,
    float epsilon, cudaStream_t stream) {
  constexpr int kRows = THREADS == kWarp ? kRowsOfWarps : 1;
  forward_rows<T, V, THREADS, PACKS><<<grid_of((rows + kRows - 1) / kRows), THREADS * kRows, 0, stream>>>(
      x, weight, bias, y, means, rstds, rows, static_cast<int>(width), epsilon);
}

template <typename T, int V>
void forward(
    const T* x, const T* weight, const T* bias, T* y, float* means, float* rstds, int64_t rows, int64_t width,
    float epsilon, cudaStream_t stream) {
  const int64_t packs = (width + V - 1) / V;
  const auto launch = [&](auto kernel) { kernel(x, weight, bias, y, means, rstds, rows, width, epsilon, stream); };
  if (packs <= 2 * kWarp) {
    launch(launch_forward<T, V, kWarp, 2>);
  } else if (packs <= 4 * kWarp) {
    launch(launch_forward<T, V, kWarp, 4>);
  } else if (packs <= 8 * kWarp) {
    launch(launch_forward<T, V, kWarp, 8>);
  } else if (packs <= 4 * 256) {
    launch(launch_forward<T, V, 256, 4>);
  } else if (packs <= 4 * 1024) {
    launch(launch_forward<T, V, 1024, 4>);
  } else {
    forward_wide_rows<T, V><<<grid_of(rows), kWidest, 0, stream>>>(
        x, weight, bias, y, means, rstds, rows, width, epsilon);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

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
    const float a = block_sum(sum, shared[turn]) / width, b = block_sum(product, shared[turn + 1]) / width;
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
    const float a = block_sum(sum, shared[turn]) / width, b = block_sum(product, shared[turn + 1]) / width;
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
  Tensor mean = empty(x, {rows}, ScalarType::Float), rstd = empty(x, {rows}, ScalarType::Float);
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
              source, w, b, target, mutable_data<float>(mean), mutable_data<float>(rstd), rows, width,
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
  Tensor partial = empty(x, {2, blocks, width}, ScalarType::Float);
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
