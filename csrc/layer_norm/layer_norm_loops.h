// Rows of layer normalization. x, y, dy, dx: [rows, width]; weight and bias as floats, forward in the order of pairs;
// `buffer` holds 2 * width + 2 * kWidth floats. Sums are made of four vectors at a time, so that additions need not wait
// for one another.

// The mean of n floats, and the square root's inverse of their variance + epsilon. What the sum lost to rounding is what
// the mean of the differences from it is: it counts where the values are far from zero and close to one another.
static MEGAGPT2_INLINE void moments(const float* row, Float total, int64_t n, float epsilon, float* mean, float* rstd) {
  const float center = sum(total) / (float)n;
  Float squares[4] = {}, differences[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) {
      const Float d = load(row + i + k * kWidth) - center;
      squares[k] += d * d;
      differences[k] += d;
    }
  }
  for (; i < n; i += kWidth) {
    const Float d = (n - i >= kWidth ? load(row + i) : load(row + i, n - i, center)) - center;
    squares[0] += d * d;
    differences[0] += d;
  }
  const float lost = sum((differences[0] + differences[1]) + (differences[2] + differences[3])) / (float)n;
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)n - lost * lost;
  *mean = center + lost;
  *rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + epsilon);
}

static MEGAGPT2_INLINE Float affine(Float x, float mean, float rstd, Float weight, Float bias) {
  return (x - mean) * rstd * weight + bias;
}

// Meanwhile the row at `next` is fetched.
template <typename T, typename To>
static MEGAGPT2_INLINE void normalize(
    const float* row, const T* next, To y, const float* weight, const float* bias, float mean, float rstd, int64_t n) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    fetch_pair(next + i);
    const Pair x = load_pair(row + i), w = load_pair(weight + i), b = load_pair(bias + i);
    store_clean(
        y + i, {affine(x.first, mean, rstd, w.first, b.first), affine(x.second, mean, rstd, w.second, b.second)});
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    store(y + i, affine(load(row + i, left), mean, rstd, load(weight + i, left), load(bias + i, left)), left);
  }
}

template <typename T, typename To>
static MEGAGPT2_INLINE void forward_rows_to(
    To y, const T* x, float* mean, float* rstd, const float* weight, const float* bias, int64_t rows, int64_t n,
    float epsilon, float* buffer) {
  epsilon = clean(epsilon);
  for (int64_t r = 0; r < rows; ++r, x += n, y = y + n) {
    Float totals[4] = {};
    int64_t i = 0;
    const auto take = [&](Float* total) MEGAGPT2_INLINED {
      const Pair part = load_pair(x + i);
      store(buffer + i, part.first);
      store(buffer + i + kWidth, part.second);
      total[0] += part.first;
      total[1] += part.second;
      fetch_pair(y + i);
      i += kPair;
    };
    while (i + 2 * kPair <= n) {
      take(totals);
      take(totals + 2);
    }
    if (i + kPair <= n) take(totals);
    for (; i < n; i += kWidth) {
      const Float value = n - i >= kWidth ? load(x + i) : load(x + i, n - i);
      store(buffer + i, value);  // the buffer has room for the whole vector
      totals[2] += value;
    }
    moments(buffer, (totals[0] + totals[1]) + (totals[2] + totals[3]), n, epsilon, mean + r, rstd + r);
    normalize(buffer, r + 1 < rows ? x + n : x, y, weight, bias, mean[r], rstd[r], n);
  }
}

// past: y is written past the caches.
template <typename T>
void forward_rows(
    const T* x, T* y, bool past, float* mean, float* rstd, const float* weight, const float* bias, int64_t rows,
    int64_t n, float epsilon, float* buffer) {
  if (past) {
    forward_rows_to(Past<T>{y}, x, mean, rstd, weight, bias, rows, n, epsilon, buffer);
  } else {
    forward_rows_to(y, x, mean, rstd, weight, bias, rows, n, epsilon, buffer);
  }
}

// One vector of the backward pass: what comes of x and dy, on the way to dx.
struct BackwardSums {
  Float gradient = {}, product = {};  // of dy * weight, and of that times the normalized x
};

static MEGAGPT2_INLINE void backward_vector(
    Float x, Float dy, Float weight, float mean, float rstd, float* normalized, float* gradient, BackwardSums* sums) {
  const Float xhat = (x - mean) * rstd, g = dy * weight;
  store(normalized, xhat);
  store(gradient, g);
  sums->gradient += g;
  sums->product += g * xhat;
}

// d_weight, d_bias [width]: added to. dz [rows, width] or null: added to dx.
//
//     dx = rstd (g - mean(g) - xhat mean(g xhat)) + dz      g = dy weight     d weight = sum dy xhat     d bias = sum dy
template <typename T, typename To>
static MEGAGPT2_INLINE void backward_rows_to(
    To dx, const T* dy, const T* x, const T* dz, const float* mean, const float* rstd, const float* weight,
    float* d_weight, float* d_bias, int64_t rows, int64_t n, float* buffer) {
  float* normalized = buffer;
  float* gradient = buffer + (n + kWidth - 1) / kWidth * kWidth;
  for (int64_t r = 0; r < rows; ++r, x += n, dy += n, dx = dx + n) {
    BackwardSums sums[2];
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      for (int k = 0; k < 2; ++k) {
        const int64_t j = i + k * kWidth;
        const Float d = load(dy + j);
        backward_vector(load(x + j), d, load(weight + j), mean[r], rstd[r], normalized + j, gradient + j, sums + k);
        store(d_weight + j, load(d_weight + j) + d * load(normalized + j));
        store(d_bias + j, load(d_bias + j) + d);
        fetch(dx, j);
      }
    }
    for (; i < n; i += kWidth) {
      const int64_t left = n - i < kWidth ? n - i : kWidth;
      const Float d = load(dy + i, left);
      backward_vector(
          load(x + i, left), d, load(weight + i, left), mean[r], rstd[r], normalized + i, gradient + i, sums);
      store(d_weight + i, load(d_weight + i, left) + d * load(normalized + i), left);
      store(d_bias + i, load(d_bias + i, left) + d, left);
    }
    const int64_t next = r + 1 < rows ? n : 0;
    const float a = sum(sums[0].gradient + sums[1].gradient) / (float)n;
    const float b = sum(sums[0].product + sums[1].product) / (float)n;
    for (i = 0; i < n; i += kWidth) {
      const int64_t left = n - i;
      Float d = (load(gradient + i) - a - load(normalized + i) * b) * rstd[r];
      if (left >= kWidth) {
        fetch(x + next, i);
        fetch(dy + next, i);
        if (dz) d += load(dz + i);
        store(dx + i, d);
      } else {
        if (dz) d += load(dz + i, left);
        store(dx + i, d, left);
      }
    }
    if (dz) dz += n;
  }
}

// past: dx is written past the caches.
template <typename T>
void backward_rows(
    const T* dy, const T* x, const T* dz, const float* mean, const float* rstd, const float* weight, T* dx, bool past,
    float* d_weight, float* d_bias, int64_t rows, int64_t n, float* buffer) {
  if (past) {
    backward_rows_to(Past<T>{dx}, dy, x, dz, mean, rstd, weight, d_weight, d_bias, rows, n, buffer);
  } else {
    backward_rows_to(dx, dy, x, dz, mean, rstd, weight, d_weight, d_bias, rows, n, buffer);
  }
}
