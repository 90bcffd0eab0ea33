// One row of the residual stream: z = residual + dropout(x + bias), and the way back. Written as loops are, see
// variants.h. `drawn` are the row's random bits; without them (null) nothing is dropped. A dropped x counts for
// nothing, whatever it is.

// bias: n floats in the order of pairs of T, zeros where there is none.
template <typename T, typename To>
static MEGAGPT2_INLINE void residual_row_to(
    To z, const T* x, const float* bias, const T* residual, const uint16_t* drawn, uint32_t threshold, float scale,
    int64_t n) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    Pair h = load_pair(x + i) + load_pair(bias + i);
    if (drawn) h = dropped(h, load_drawn_pair<T>(drawn + i), threshold, scale);
    store_clean(z + i, load_pair(residual + i) + h);
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    Float h = load(x + i, left) + load(bias + i, left);
    if (drawn) h = dropped(h, load_drawn(drawn + i, left), threshold, scale);
    store(z + i, load(residual + i, left) + h, left);
  }
}

// past, here and below: the result is written past the caches.
template <typename T>
static MEGAGPT2_INLINE void residual_row(
    const T* x, const float* bias, const T* residual, const uint16_t* drawn, uint32_t threshold, float scale, T* z,
    bool past, int64_t n) {
  past ? residual_row_to(Past<T>{z}, x, bias, residual, drawn, threshold, scale, n)
       : residual_row_to(z, x, bias, residual, drawn, threshold, scale, n);
}

template <typename T, typename To>
static MEGAGPT2_INLINE void residual_backward_row_to(
    To dx, const T* dz, const T* ahead, const uint16_t* drawn, uint32_t threshold, float scale, float* d_bias, int64_t n) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    fetch_pair(ahead + i);
    Pair d = load_pair(dz + i);
    if (drawn) {
      d = dropped(d, load_drawn_pair<T>(drawn + i), threshold, scale);
      store_clean(dx + i, d);
    }
    store_clean(d_bias + i, load_pair(d_bias + i) + d);
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i < kWidth ? n - i : kWidth;
    Float d = load(dz + i, left);
    if (drawn) {
      d = dropped(d, load_drawn(drawn + i, left), threshold, scale);
      store(dx + i, d, left);
    }
    store(d_bias + i, load(d_bias + i, left) + d, left);
  }
}

// dx = dropout(dz), and d_bias [n], in the order of pairs of T, grows by it. Without drawn bits dx is dz, and is not
// written: it may be null. What lies at `ahead` is fetched meanwhile; dz itself where nothing is to be.
template <typename T>
static MEGAGPT2_INLINE void residual_backward_row(
    const T* dz, const T* ahead, const uint16_t* drawn, uint32_t threshold, float scale, T* dx, bool past, float* d_bias,
    int64_t n) {
  past ? residual_backward_row_to(Past<T>{dx}, dz, ahead, drawn, threshold, scale, d_bias, n)
       : residual_backward_row_to(dx, dz, ahead, drawn, threshold, scale, d_bias, n);
}
