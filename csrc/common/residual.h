// One row of the residual stream: z = residual + dropout(x + bias), and the way back. Written as loops are, see
// variants.h. `drawn` are the row's random bits; without them (null) nothing is dropped. A dropped x counts for
// nothing, whatever it is.

static MEGAGPT2_INLINE Float dropped(Float x, Word drawn, uint32_t threshold, float scale) {
  return choose(drawn >= threshold, x * scale, Float{});
}

// bias: n floats in the order of pairs of T, zeros where there is none.
template <typename T, typename To>
static MEGAGPT2_INLINE void residual_row_to(
    To z, const T* x, const float* bias, const T* residual, const uint16_t* drawn, uint32_t threshold, float scale,
    int64_t n) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const Pair a = load_pair(x + i), b = load_pair(bias + i), stream = load_pair(residual + i);
    Pair h = {a.first + b.first, a.second + b.second};
    if (drawn) {
      const WordPair words = load_drawn_pair<T>(drawn + i);
      h = {dropped(h.first, words.first, threshold, scale), dropped(h.second, words.second, threshold, scale)};
    }
    store_clean(z + i, Pair{stream.first + h.first, stream.second + h.second});
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
      const WordPair words = load_drawn_pair<T>(drawn + i);
      d = {dropped(d.first, words.first, threshold, scale), dropped(d.second, words.second, threshold, scale)};
      store_clean(dx + i, d);
    }
    store(d_bias + i, load(d_bias + i) + d.first);
    store(d_bias + i + kWidth, load(d_bias + i + kWidth) + d.second);
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
