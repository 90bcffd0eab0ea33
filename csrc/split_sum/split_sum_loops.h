// n sums, each of whose float32 has its upper half in `high` and its lower half in `low`.

template <typename X>
static MEGAGPT2_INLINE void add_vector(uint16_t* high, uint16_t* low, const X* x) {
  const Word sums = bits(floats((widen(high) << 16) | widen(low)) + load(x));
  narrow(high, sums >> 16);
  narrow(low, sums & 0xFFFFu);
}

template <typename T>
static MEGAGPT2_INLINE void round_vector(uint16_t* high, const uint16_t* low, float scale) {
  const Float x = floats((widen(high) << 16) | widen(low)) * scale;
  store((T*)high, choose(x != x, all(__builtin_nanf("")), x));  // terms in fp32 may bring any NaN
}

template <typename X>
void add_terms(uint16_t* high, uint16_t* low, const X* x, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) add_vector(high + i, low + i, x + i);
  if (i == n) return;
  uint16_t last_high[kWidth] = {}, last_low[kWidth] = {};
  X last[kWidth] = {};
  for (int64_t k = 0; k < n - i; ++k) last_high[k] = high[i + k], last_low[k] = low[i + k], last[k] = x[i + k];
  add_vector(last_high, last_low, last);
  for (int64_t k = 0; k < n - i; ++k) high[i + k] = last_high[k], low[i + k] = last_low[k];
}

template <typename T>
void round_sums(uint16_t* high, const uint16_t* low, float scale, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) round_vector<T>(high + i, low + i, scale);
  if (i == n) return;
  uint16_t last_high[kWidth] = {}, last_low[kWidth] = {};
  for (int64_t k = 0; k < n - i; ++k) last_high[k] = high[i + k], last_low[k] = low[i + k];
  round_vector<T>(last_high, last_low, scale);
  for (int64_t k = 0; k < n - i; ++k) high[i + k] = last_high[k];
}
