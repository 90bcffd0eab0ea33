// One row of softmax. x, y, weights, dy, dx: `key` elements, of which the first n are visible; the others are not read,
// and 0 in every result. `buffer`: n floats, rounded up to whole pairs, in whose order they are.

static MEGAGPT2_INLINE int64_t whole_pairs(int64_t n) { return (n + kPair - 1) / kPair * kPair; }

// Brings those of `ahead` nearer that lie where pair(i, left) does, and after a row of n those beyond.
template <typename T>
static MEGAGPT2_INLINE void fetch_beside(Ahead<T> ahead, int64_t i) {
  if (i < ahead.n) fetch_pair(ahead.row + i);
}
template <typename T>
static MEGAGPT2_INLINE void fetch_beyond(Ahead<T> ahead, int64_t n) {
  for (int64_t i = whole_pairs(n); i < ahead.n; i += kPair) fetch_pair(ahead.row + i);
}

// y[from .. key) = 0, in pairs.
template <typename To>
static MEGAGPT2_INLINE void zero(To y, int64_t from, int64_t key) {
  for (int64_t i = from; i < key; i += kPair) store_clean(y + i, Pair{}, key - i);
}

// sign * x, and -inf where it is hidden or not among the first `left`.
template <bool masked, typename T>
static MEGAGPT2_INLINE Pair visible_scores(const T* x, const uint8_t* hidden, int64_t i, int64_t left, float sign) {
  const Pair none = all_of_pair(-__builtin_inff());
  Pair scores = load_pair(x + i, left) * sign;
  if (masked) scores = choose(load_flags_pair<T>(hidden + i, left), none, scores);
  return left < kPair ? choose(first_of_pair<T>(left), scores, none) : scores;
}

// The largest of them; -inf where there is none. A NaN is left out here: it shows in the exponentials.
template <bool masked, typename T>
static MEGAGPT2_INLINE float largest_score(const T* x, const uint8_t* hidden, int64_t n, float sign) {
  return largest_of_pairs(n, [&](int64_t i, int64_t left) MEGAGPT2_INLINED {
    return visible_scores<masked>(x, hidden, i, left, sign);
  });
}

// buffer = 2^(size * (score - most)), which is 0 where the score is -inf and `most` is not; returns the sum. The largest
// comes out as 2^0, however large the scores are. This is most of the work: meanwhile the scores of a row to come are
// fetched, since half rows are too short for the processor to foresee.
template <bool masked, typename T>
static MEGAGPT2_INLINE float exponentials(
    const T* x, Ahead<T> ahead, const uint8_t* hidden, int64_t n, float sign, Factor size, float most, float* buffer) {
  const float smallest = -126.4f / size.value;
  Pair totals[kSideBySide] = {};
  for_each_pair(n, [&](int64_t i, int64_t left, int k) MEGAGPT2_INLINED {
    fetch_beside(ahead, i);
    const Pair below = visible_scores<masked>(x, hidden, i, left, sign) - most;
    const Pair e = power_of_two<kOf32Bits<T>>(below, size, smallest);
    store_clean(buffer + i, e);
    totals[k] = totals[k] + e;
  });
  fetch_beyond(ahead, n);
  return sum_of_pairs(totals);
}

// A pair of a row, whose end is `rest` elements away: zeros after its first `left`, whatever x has there.
template <typename T, typename To>
static MEGAGPT2_INLINE void store_visible(To y, Pair x, int64_t left, int64_t rest) {
  if (left == kPair) return store_clean(y, x);
  store_clean(y, choose(first_of_pair<T>(left), x, Pair{}), rest);
}

// y = buffer * inverse.
template <typename T, typename To>
static MEGAGPT2_INLINE void normalize(const float* buffer, To y, int64_t n, int64_t key, float inverse) {
  for_each_pair(n, [&](int64_t i, int64_t left, int) MEGAGPT2_INLINED {
    store_visible<T>(y + i, load_pair(buffer + i) * inverse, left, key - i);
  });
  zero(y, whole_pairs(n), key);
}

// The same for the weights, and for y, what dropout leaves of them.
template <typename T, typename To>
static MEGAGPT2_INLINE void normalize_and_drop(
    const float* buffer, To y, To weights, int64_t n, int64_t key, float inverse, const WeightDropout& dropout) {
  for_each_pair(n, [&](int64_t i, int64_t left, int) MEGAGPT2_INLINED {
    const Pair p = load_pair(buffer + i) * inverse;
    store_visible<T>(weights + i, p, left, key - i);
    const WordPair drawn = load_drawn_pair<T>(dropout.drawn + i, left);
    store_visible<T>(y + i, dropped(p, drawn, dropout.threshold, dropout.scale), left, key - i);
  });
  zero(weights, whole_pairs(n), key);
  zero(y, whole_pairs(n), key);
}

static MEGAGPT2_INLINE bool all_hidden(const uint8_t* hidden, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!hidden[i]) return false;
  return true;
}

template <bool masked, typename T>
static MEGAGPT2_INLINE void forward_row_of(
    const T* x, Ahead<T> ahead, const uint8_t* hidden, T* y, bool past, T* weights, int64_t n, int64_t key,
    Exponent exponent, float* buffer, WeightDropout dropout) {
  const float most = largest_score<masked>(x, hidden, n, exponent.sign);
  if (masked && most == -__builtin_inff() && all_hidden(hidden, n)) n = 0;
  float inverse = 0.0f;
  if (n > 0) {
    const Factor size = {exponent.size, exponent.rest};
    inverse = 1.0f / exponentials<masked>(x, ahead, hidden, n, exponent.sign, size, most, buffer);
  }
  if (dropout.drawn && past) {
    normalize_and_drop<T>(buffer, Past<T>{y}, Past<T>{weights}, n, key, inverse, dropout);
  } else if (dropout.drawn) {
    normalize_and_drop<T>(buffer, y, weights, n, key, inverse, dropout);
  } else if (past) {
    normalize<T>(buffer, Past<T>{y}, n, key, inverse);
  } else {
    normalize<T>(buffer, y, n, key, inverse);
  }
  if (masked && !(inverse < __builtin_inff())) {  // the row is NaN: what is hidden stays 0
    for (int64_t i = 0; i < n; ++i) {
      if (!hidden[i]) continue;
      y[i] = T{};
      if (dropout.drawn) weights[i] = T{};
    }
  }
}

// hidden: `key` flags, or null. past: the results are written past the caches.
template <typename T>
void forward_row(
    const T* x, Ahead<T> ahead, const uint8_t* hidden, T* y, bool past, T* weights, int64_t n, int64_t key,
    Exponent exponent, float* buffer, WeightDropout dropout) {
  if (hidden) {
    forward_row_of<true>(x, ahead, hidden, y, past, weights, n, key, exponent, buffer, dropout);
  } else {
    forward_row_of<false>(x, ahead, hidden, y, past, weights, n, key, exponent, buffer, dropout);
  }
}

// The gradient of the weights p before dropout. It counts for nothing where p is 0, as a hidden weight is, whatever it is.
template <typename T>
static MEGAGPT2_INLINE Pair upstream(const T* dy, Pair p, int64_t i, int64_t left, const WeightDropout& dropout) {
  const Pair g = choose(p == 0.0f, Pair{}, load_pair(dy + i, left));
  if (!dropout.drawn) return g;
  return dropped(g, load_drawn_pair<T>(dropout.drawn + i, left), dropout.threshold, dropout.scale);
}

//     dx = scale p (g - sum(g p))
template <typename T, typename To>
static MEGAGPT2_INLINE void backward_row_to(
    To dx, const T* dy, const T* weights, Ahead<T> dy_ahead, Ahead<T> weights_ahead, int64_t n, int64_t key, float scale,
    const WeightDropout& dropout) {
  Pair totals[kSideBySide] = {};
  for_each_pair(n, [&](int64_t i, int64_t left, int k) MEGAGPT2_INLINED {
    fetch_beside(dy_ahead, i);
    fetch_beside(weights_ahead, i);
    const Pair p = load_pair(weights + i, left);
    totals[k] = totals[k] + upstream(dy, p, i, left, dropout) * p;
  });
  fetch_beyond(dy_ahead, n);
  fetch_beyond(weights_ahead, n);
  const float product = sum_of_pairs(totals);
  const bool finite = product - product == 0.0f && scale - scale == 0.0f;  // else 0 weights need care: 0 inf is NaN
  for_each_pair(n, [&](int64_t i, int64_t left, int) MEGAGPT2_INLINED {
    const Pair p = load_pair(weights + i, left);
    const Pair d = (upstream(dy, p, i, left, dropout) - product) * p * scale;
    store_clean(dx + i, finite && left == kPair ? d : choose(p == 0.0f, Pair{}, d), key - i);
  });
  zero(dx, whole_pairs(n), key);
}

// past: dx is written past the caches.
template <typename T>
void backward_row(
    const T* dy, const T* weights, Ahead<T> dy_ahead, Ahead<T> weights_ahead, T* dx, bool past, int64_t n, int64_t key,
    float scale, WeightDropout dropout) {
  scale = clean(scale);
  if (past) {
    backward_row_to(Past<T>{dx}, dy, weights, dy_ahead, weights_ahead, n, key, scale, dropout);
  } else {
    backward_row_to(dx, dy, weights, dy_ahead, weights_ahead, n, key, scale, dropout);
  }
}
