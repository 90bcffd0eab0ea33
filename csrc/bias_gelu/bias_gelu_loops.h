// Rows of GELU with a bias, by the formulas of bias_gelu.h. x, y, dy, dx: [rows, width]; bias as floats. A NaN stays.

template <typename T>
static MEGAGPT2_INLINE Float gelu(Float h) {
  return h / (1.0f + exponential<kOf32Bits<T>>(h * (kGeluA + kGeluB * (h * h))));
}

template <typename T>
static MEGAGPT2_INLINE Float gelu_slope(Float h) {
  const Float limited = lesser(all(10.0f), h), square = limited * limited;
  const Float e = exponential<kOf32Bits<T>>(limited * (kGeluA + kGeluB * square));
  const Float s = 1.0f / (1.0f + e);
  const Float slope = s - limited * (e * s) * s * (kGeluA + 3.0f * kGeluB * square);
  return choose(h < -10.0f, Float{}, slope);
}

template <typename T, typename To>
static MEGAGPT2_INLINE void bias_gelu_rows_to(To y, const T* x, const float* bias, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, x += n, y = y + n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store_clean(y + i, gelu<T>(load(x + i) + load(bias + i)));
    if (i < n) store(y + i, gelu<T>(load(x + i, n - i) + load(bias + i, n - i)), n - i);
  }
}

// past, here and below: the result is written past the caches.
template <typename T>
void bias_gelu_rows(const T* x, const float* bias, T* y, bool past, int64_t rows, int64_t n) {
  past ? bias_gelu_rows_to(Past<T>{y}, x, bias, rows, n) : bias_gelu_rows_to(y, x, bias, rows, n);
}

template <typename T, typename To>
static MEGAGPT2_INLINE void bias_gelu_backward_rows_to(
    To dx, const T* dy, const T* x, const float* bias, float* d_bias, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, x += n, dy += n, dx = dx + n) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Float d = load(dy + i) * gelu_slope<T>(load(x + i) + load(bias + i));
      store_clean(dx + i, d);
      store(d_bias + i, load(d_bias + i) + d);
    }
    if (i < n) {
      const int64_t left = n - i;
      const Float d = load(dy + i, left) * gelu_slope<T>(load(x + i, left) + load(bias + i, left));
      store(dx + i, d, left);
      store(d_bias + i, load(d_bias + i, left) + d, left);
    }
  }
}

// d_bias [width]: added to.
template <typename T>
void bias_gelu_backward_rows(
    const T* dy, const T* x, const float* bias, T* dx, bool past, float* d_bias, int64_t rows, int64_t n) {
  past ? bias_gelu_backward_rows_to(Past<T>{dx}, dy, x, bias, d_bias, rows, n)
       : bias_gelu_backward_rows_to(dx, dy, x, bias, d_bias, rows, n);
}
