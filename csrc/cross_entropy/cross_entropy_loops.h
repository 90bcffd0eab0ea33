// Rows of a chunk of logits [rows, width], of which the first `words` columns count.

constexpr int64_t kPiece = 2048;  // logits whose maximum and exponentials are made before the next: they stay in L1

template <typename T>
static MEGAGPT2_INLINE float largest_of(const T* x, int64_t n) {
  return largest_of_pairs(n, [&](int64_t i, int64_t left) MEGAGPT2_INLINED {
    return load_pair(x + i, left, -__builtin_inff());
  });
}

// The loss is a number of 32 bits, whatever the logits are.
template <typename T>
static MEGAGPT2_INLINE float sum_of_exponentials(const T* x, int64_t n, float peak) {
  Pair totals[kSideBySide] = {};
  for_each_pair(n, [&](int64_t i, int64_t left, int k) MEGAGPT2_INLINED {
    totals[k] = totals[k] + exponential_below<true>(load_pair(x + i, left, -__builtin_inff()) - peak);
  });
  return sum_of_pairs(totals);
}

// The sum is kept relative to the largest logit so far: a larger one scales it down (Milakov and Gimelshein 2018, "Online
// normalizer calculation for softmax"). A NaN is no maximum, but makes the sum one.
template <typename T>
void statistics_rows(
    const T* logits, const int64_t* targets, float* maximum, float* total, float* target, int64_t rows, int64_t width,
    int64_t first, int64_t words) {
  const float infinity = __builtin_inff();
  for (int64_t r = 0; r < rows; ++r, logits += width) {
    float peak = -infinity, sums = 0.0f;
    for (int64_t i = 0; i < words; i += kPiece) {
      const int64_t n = words - i < kPiece ? words - i : kPiece;
      const float found = largest_of(logits + i, n);
      if (found > peak) {
        sums *= exponential_below<true>(all(peak - found))[0];
        peak = found;
      }
      sums += sum_of_exponentials(logits + i, n, peak == -infinity ? 0.0f : peak);
    }
    const int64_t word = targets[r] - first;
    maximum[r] = peak;
    total[r] = sums;
    target[r] = word >= 0 && word < words ? load(logits + word, 1)[0] : 0.0f;
  }
}

template <typename T>
void gradient_rows(
    T* logits, const int64_t* targets, const float* maximum, const float* normalizer, int64_t rows, int64_t width,
    int64_t first, int64_t words, float factor) {
  for (int64_t r = 0; r < rows; ++r, logits += width) {
    const float peak = clean(maximum[r]), scale = clean(factor / normalizer[r]);
    const int64_t word = targets[r] - first;
    const bool mine = word >= 0 && word < words;
    const Float kept = mine ? load(logits + word, 1) : Float{};  // the 1 is subtracted before the rounding to T
    for_each_pair(words, [&](int64_t i, int64_t left, int) MEGAGPT2_INLINED {
      const Pair e = exponential_below<kOf32Bits<T>>(load_pair(logits + i, left) - peak);
      store_clean(logits + i, e * scale, left);
    });
    if (mine) store(logits + word, exponential_below<kOf32Bits<T>>(kept - peak) * scale - factor, 1);
    for (int64_t i = words; i < width; ++i) logits[i] = T{};
  }
}
