// One row of the residual stream: z = residual + dropout(x + bias), and the way back. Written as loops are, see
// variants.h. `drawn` are the row's random bits; without them (null) nothing is dropped. A dropped x counts for
// nothing, whatever it is.

static inline Float dropped(Float x, Word drawn, uint32_t threshold, float scale) {
  return choose(drawn >= threshold, x * scale, Float{});
}

// bias: n floats, zeros where there is none.
template <typename T>
static inline void residual_row(
    const T* x, const float* bias, const T* residual, const uint16_t* drawn, uint32_t threshold, float scale, T* z,
    int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    Float h = load(x + i) + load(bias + i);
    if (drawn) h = dropped(h, load_drawn(drawn + i), threshold, scale);
    store_clean(z + i, load(residual + i) + h);
  }
  if (i < n) {
    const int64_t left = n - i;
    Float h = load(x + i, left) + load(bias + i, left);
    if (drawn) h = dropped(h, load_drawn(drawn + i, left), threshold, scale);
    store(z + i, load(residual + i, left) + h, left);
  }
}

// dx = dropout(dz), and d_bias [n] grows by it. Without drawn bits dx is dz, and is not written: it may be null.
template <typename T>
static inline void residual_backward_row(
    const T* dz, const uint16_t* drawn, uint32_t threshold, float scale, T* dx, float* d_bias, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    Float d = load(dz + i);
    if (drawn) {
      d = dropped(d, load_drawn(drawn + i), threshold, scale);
      store_clean(dx + i, d);
    }
    store(d_bias + i, load(d_bias + i) + d);
  }
  if (i < n) {
    const int64_t left = n - i;
    Float d = load(dz + i, left);
    if (drawn) {
      d = dropped(d, load_drawn(drawn + i, left), threshold, scale);
      store(dx + i, d, left);
    }
    store(d_bias + i, load(d_bias + i, left) + d, left);
  }
}
