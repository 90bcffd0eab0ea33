// y = x * scale where the drawn bits are at least `threshold`, else 0, whatever x is there. The product is made in float
// for the 16-bit types and rounded once, as torch multiplies by a number.

template <typename T>
void keep_tile(const T* x, T* y, const uint16_t* drawn, int64_t n, uint32_t threshold, double scale) {
  const Float factor = all((float)scale);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(y + i, choose(load_drawn(drawn + i) >= threshold, load(x + i) * factor, Float{}));
  }
  if (i < n) {
    store(y + i, choose(load_drawn(drawn + i, n - i) >= threshold, load(x + i, n - i) * factor, Float{}), n - i);
  }
}

template <>
void keep_tile(const double* x, double* y, const uint16_t* drawn, int64_t n, uint32_t threshold, double scale) {
  for (int64_t i = 0; i < n; ++i) y[i] = drawn[i] >= threshold ? x[i] * scale : 0.0;
}
