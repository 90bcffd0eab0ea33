// One row of softmax. x, y, weights, dy, dx: `key` elements, of which the first n are visible; the others are not read,
// and 0 in every result. `buffer`: n floats, rounded up to whole vectors.

static inline int64_t at_most_a_vector(int64_t left) { return left < kWidth ? left : kWidth; }

template <typename T>
static inline void zero(T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = T{};
}

// The largest of scale * x over what is neither hidden nor past n; -inf where that is nothing. A NaN is left out here:
// it shows in the exponentials.
template <bool masked, typename T>
static inline float largest_score(const T* x, const uint8_t* hidden, int64_t n, float scale) {
  const Float none = all(-__builtin_inff());
  Float most[4] = {none, none, none, none};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) {
      const int64_t j = i + k * kWidth;
      Float score = load(x + j) * scale;
      if (masked) score = choose(load_flags(hidden + j), none, score);
      most[k] = greater(score, most[k]);
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = at_most_a_vector(n - i);
    Float score = choose(first_lanes(left), load(x + i, left) * scale, none);
    if (masked) score = choose(load_flags(hidden + i, left), none, score);
    most[0] = greater(score, most[0]);
  }
  return largest(greater(greater(most[0], most[1]), greater(most[2], most[3])));
}

// Sums of a row side by side: 32 with any vectors, so that long rows are as exact with all of them.
constexpr int kChains = 32 / kWidth;

// buffer = exp(scale * x - most), 0 where it is hidden and after n; returns the sum. This is most of the work:
// meanwhile the row at `next` is fetched, since half rows are too short for the processor to foresee.
template <bool masked, typename T>
static inline float exponentials(
    const T* x, const T* next, const uint8_t* hidden, int64_t n, float scale, float most, float* buffer) {
  Float totals[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
    for (int k = 0; k < kChains; ++k) {
      const int64_t j = i + k * kWidth;
      fetch(next, j);
      Float e = decay(load(x + j) * scale - most);
      if (masked) e = choose(load_flags(hidden + j), Float{}, e);
      store(buffer + j, e);
      totals[k] += e;
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = at_most_a_vector(n - i);
    Float e = choose(first_lanes(left), decay(load(x + i, left) * scale - most), Float{});
    if (masked) e = choose(load_flags(hidden + i, left), Float{}, e);
    store(buffer + i, e);
    totals[0] += e;
  }
  for (int k = 1; k < kChains; ++k) totals[0] += totals[k];
  return sum(totals[0]);
}

// weights = buffer * inverse, and y what dropout leaves of them; one of both where nothing is dropped.
template <typename T>
static inline void normalize(
    const float* buffer, T* y, T* weights, int64_t n, float inverse, const WeightDropout& dropout) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t left = n - i;
    const Float p = load(buffer + i) * inverse;
    if (!dropout.words) {
      left >= kWidth ? store(y + i, p) : store(y + i, p, left);
    } else if (left >= kWidth) {
      store(weights + i, p);
      store(y + i, choose(load_words(dropout.words + i) >= dropout.threshold, p * dropout.factor, Float{}));
    } else {
      store(weights + i, p, left);
      store(y + i, choose(load_words(dropout.words + i, left) >= dropout.threshold, p * dropout.factor, Float{}), left);
    }
  }
}

static inline bool all_hidden(const uint8_t* hidden, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!hidden[i]) return false;
  return true;
}

// next: where the next row probably is. hidden: `key` flags, or null.
template <typename T>
void forward_row(
    const T* x, const T* next, const uint8_t* hidden, T* y, T* weights, int64_t n, int64_t key, float scale,
    float* buffer, WeightDropout dropout) {
  const float most = hidden ? largest_score<true>(x, hidden, n, scale) : largest_score<false>(x, hidden, n, scale);
  if (n > 0 && hidden && most == -__builtin_inff() && all_hidden(hidden, n)) n = 0;
  if (n > 0) {
    const float total = hidden ? exponentials<true>(x, next, hidden, n, scale, most, buffer)
                               : exponentials<false>(x, next, hidden, n, scale, most, buffer);
    const float inverse = 1.0f / total;
    normalize(buffer, y, weights, n, inverse, dropout);
    if (hidden && !(inverse < __builtin_inff())) {  // the row is NaN: what is hidden stays 0
      for (int64_t i = 0; i < n; ++i) {
        if (!hidden[i]) continue;
        y[i] = T{};
        if (dropout.words) weights[i] = T{};
      }
    }
  }
  zero(y + n, key - n);
  if (dropout.words) zero(weights + n, key - n);
}

// The gradient of the weights before dropout.
template <typename T>
static inline Float upstream(const T* dy, int64_t i, int64_t left, const WeightDropout& dropout) {
  const Float g = left >= kWidth ? load(dy + i) : load(dy + i, left);
  if (!dropout.words) return g;
  const Word words = left >= kWidth ? load_words(dropout.words + i) : load_words(dropout.words + i, left);
  return choose(words >= dropout.threshold, g * dropout.factor, Float{});
}

//     dx = scale p (g - sum(g p))
template <typename T>
void backward_row(const T* dy, const T* weights, T* dx, int64_t n, int64_t key, float scale, WeightDropout dropout) {
  Float totals[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) {
      const int64_t j = i + k * kWidth;
      totals[k] += upstream(dy, j, kWidth, dropout) * load(weights + j);
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = at_most_a_vector(n - i);
    totals[0] += upstream(dy, i, left, dropout) * load(weights + i, left);
  }
  const float product = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  for (i = 0; i + kWidth <= n; i += kWidth) {
    store(dx + i, (upstream(dy, i, kWidth, dropout) - product) * load(weights + i) * scale);
  }
  if (i < n) store(dx + i, (upstream(dy, i, n - i, dropout) - product) * load(weights + i, n - i) * scale, n - i);
  zero(dx + n, key - n);
}
