// One row of softmax. x, y, weights, dy, dx: `key` elements, of which the first n are visible; the others are not read,
// and 0 in every result. `buffer`: n floats, rounded up to whole vectors.

static inline int64_t at_most_a_vector(int64_t left) { return left < kWidth ? left : kWidth; }

template <typename T>
static inline void zero(T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = T{};
}

// The largest of sign * x over what is neither hidden nor past n; -inf where that is nothing. A NaN is left out here: it
// shows in the exponentials.
template <bool masked, typename T>
static inline float largest_score(const T* x, const uint8_t* hidden, int64_t n, float sign) {
  const Float none = all(-__builtin_inff());
  Float most[4] = {none, none, none, none};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) {
      const int64_t j = i + k * kWidth;
      Float score = load(x + j) * sign;
      if (masked) score = choose(load_flags(hidden + j), none, score);
      most[k] = greater(score, most[k]);
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = at_most_a_vector(n - i);
    Float score = choose(first_lanes(left), load(x + i, left) * sign, none);
    if (masked) score = choose(load_flags(hidden + i, left), none, score);
    most[0] = greater(score, most[0]);
  }
  return largest(greater(greater(most[0], most[1]), greater(most[2], most[3])));
}

// Sums of a row side by side: 32 with any vectors, so that long rows are as exact with all of them.
constexpr int kChains = 32 / kWidth;

// buffer = 2^(size * (sign * x - most)), 0 where it is hidden and after n; returns the sum. The largest comes out as 2^0,
// however large the scores are. This is most of the work: meanwhile
// the row at `next` is fetched, since half rows are too short for the processor to foresee.
template <bool masked, typename T>
static inline float exponentials(
    const T* x, const T* next, const uint8_t* hidden, int64_t n, float sign, Factor size, float most, float* buffer) {
  Float totals[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= n; i += kChains * kWidth) {
    for (int k = 0; k < kChains; ++k) {
      const int64_t j = i + k * kWidth;
      fetch(next, j);
      Float e = power_of_two(load(x + j) * sign - most, size);
      if (masked) e = choose(load_flags(hidden + j), Float{}, e);
      store(buffer + j, e);
      totals[k] += e;
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = at_most_a_vector(n - i);
    Float e = choose(first_lanes(left), power_of_two(load(x + i, left) * sign - most, size), Float{});
    if (masked) e = choose(load_flags(hidden + i, left), Float{}, e);
    store(buffer + i, e);
    totals[0] += e;
  }
  for (int k = 1; k < kChains; ++k) totals[0] += totals[k];
  return sum(totals[0]);
}

// The same past the caches, where nothing is dropped: y [key] = buffer * inverse, and 0 from n on, in whole vectors.
template <typename T>
static inline void normalize_past(const float* buffer, Past<T> y, int64_t n, int64_t key, float inverse) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_clean(y + i, load(buffer + i) * inverse);
  if (i < n) {
    store_clean(y + i, choose(first_lanes(n - i), load(buffer + i) * inverse, Float{}));
    i += kWidth;
  }
  for (; i < key; i += kWidth) store_clean(y + i, Float{});
}

// weights = buffer * inverse, and y what dropout leaves of them; one of both where nothing is dropped.
template <typename T>
static inline void normalize(
    const float* buffer, T* y, T* weights, int64_t n, float inverse, const WeightDropout& dropout) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t left = n - i;
    const Float p = load(buffer + i) * inverse;
    if (!dropout.drawn) {
      left >= kWidth ? store_clean(y + i, p) : store(y + i, p, left);
    } else if (left >= kWidth) {
      store(weights + i, p);
      store(y + i, choose(load_drawn(dropout.drawn + i) >= dropout.threshold, p * dropout.scale, Float{}));
    } else {
      store(weights + i, p, left);
      store(y + i, choose(load_drawn(dropout.drawn + i, left) >= dropout.threshold, p * dropout.scale, Float{}), left);
    }
  }
}

static inline bool all_hidden(const uint8_t* hidden, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!hidden[i]) return false;
  return true;
}

// next: where the next row probably is. hidden: `key` flags, or null. past: y is written past the caches, if it can be.
template <typename T>
void forward_row(
    const T* x, const T* next, const uint8_t* hidden, T* y, bool past, T* weights, int64_t n, int64_t key,
    Exponent exponent, float* buffer, WeightDropout dropout) {
  const float sign = exponent.sign;
  const Factor size = {exponent.size, exponent.rest, -126.4f / exponent.size};
  const float most = hidden ? largest_score<true>(x, hidden, n, sign) : largest_score<false>(x, hidden, n, sign);
  if (n > 0 && hidden && most == -__builtin_inff() && all_hidden(hidden, n)) n = 0;
  if (n > 0) {
    const float total = hidden ? exponentials<true>(x, next, hidden, n, sign, size, most, buffer)
                               : exponentials<false>(x, next, hidden, n, sign, size, most, buffer);
    const float inverse = 1.0f / total;
    if (past && !hidden && !dropout.drawn) return normalize_past(buffer, Past<T>{y}, n, key, inverse);
    normalize(buffer, y, weights, n, inverse, dropout);
    if (hidden && !(inverse < __builtin_inff())) {  // the row is NaN: what is hidden stays 0
      for (int64_t i = 0; i < n; ++i) {
        if (!hidden[i]) continue;
        y[i] = T{};
        if (dropout.drawn) weights[i] = T{};
      }
    }
  }
  zero(y + n, key - n);
  if (dropout.drawn) zero(weights + n, key - n);
}

// The gradient of the weights p before dropout. It counts for nothing where p is 0, as a hidden weight is, whatever it is.
template <typename T>
static inline Float upstream(const T* dy, Float p, int64_t i, int64_t left, const WeightDropout& dropout) {
  const Float g = choose(p == 0.0f, Float{}, left >= kWidth ? load(dy + i) : load(dy + i, left));
  if (!dropout.drawn) return g;
  const Word drawn = left >= kWidth ? load_drawn(dropout.drawn + i) : load_drawn(dropout.drawn + i, left);
  return choose(drawn >= dropout.threshold, g * dropout.scale, Float{});
}

//     dx = scale p (g - sum(g p))      past: dx is written past the caches
template <typename T>
void backward_row(
    const T* dy, const T* weights, T* dx, bool past, int64_t n, int64_t key, float scale, WeightDropout dropout) {
  Float totals[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) {
      const int64_t j = i + k * kWidth;
      const Float p = load(weights + j);
      totals[k] += upstream(dy, p, j, kWidth, dropout) * p;
    }
  }
  for (; i < n; i += kWidth) {
    const int64_t left = at_most_a_vector(n - i);
    const Float p = load(weights + i, left);
    totals[0] += upstream(dy, p, i, left, dropout) * p;
  }
  const float product = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  const bool finite = product - product == 0.0f;  // else 0 weights need care: 0 times infinity is NaN
  const auto gradient = [&](int64_t at, int64_t left) {
    const Float p = left == kWidth ? load(weights + at) : load(weights + at, left);
    const Float d = (upstream(dy, p, at, left, dropout) - product) * p * scale;
    return finite ? d : choose(p == 0.0f, Float{}, d);
  };
  i = 0;
  if (past) {
    const Past<T> to{dx};
    for (; i + kWidth <= n; i += kWidth) store(to + i, gradient(i, kWidth));
    if (i < n) {
      store(to + i, choose(first_lanes(n - i), gradient(i, n - i), Float{}));
      i += kWidth;
    }
    for (; i < key; i += kWidth) store(to + i, Float{});
    return;
  }
  for (; i + kWidth <= n; i += kWidth) store(dx + i, gradient(i, kWidth));
  if (i < n) store(dx + i, gradient(i, n - i), n - i);
  zero(dx + n, key - n);
}
