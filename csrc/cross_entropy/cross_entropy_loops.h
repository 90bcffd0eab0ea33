// Rows of a chunk of logits [rows, width], of which the first `words` columns count.

constexpr int64_t kPiece = 2048;  // logits whose maximum and exponentials are made before the next: they stay in L1

template <typename T>
static MEGAGPT2_INLINE float largest_of(const T* x, int64_t n) {
  const float infinity = __builtin_inff();
  Float peaks[4] = {all(-infinity), all(-infinity), all(-infinity), all(-infinity)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) peaks[k] = greater(load(x + i + k * kWidth), peaks[k]);
  for (; i + kWidth <= n; i += kWidth) peaks[0] = greater(load(x + i), peaks[0]);
  if (i < n) peaks[1] = greater(load(x + i, n - i, -infinity), peaks[1]);
  return largest(greater(greater(peaks[0], peaks[1]), greater(peaks[2], peaks[3])));
}

template <typename T>
static MEGAGPT2_INLINE float sum_of_exponentials(const T* x, int64_t n, float peak) {
  Float sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) sums[k] += exponential(load(x + i + k * kWidth) - peak);
  for (; i + kWidth <= n; i += kWidth) sums[0] += exponential(load(x + i) - peak);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (i < n) {
    float part[kWidth];
    store(part, exponential(load(x + i, n - i) - peak));
    for (int64_t k = 0; k < n - i; ++k) total += part[k];
  }
  return total;
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
        sums *= exponential(all(peak - found))[0];
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
    const float peak = maximum[r], scale = factor / normalizer[r];
    const int64_t word = targets[r] - first;
    const bool mine = word >= 0 && word < words;
    const Float kept = mine ? load(logits + word, 1) : Float{};  // the 1 is subtracted before the rounding to T
    int64_t i = 0;
    for (; i + kWidth <= words; i += kWidth) store(logits + i, exponential(load(logits + i) - peak) * scale);
    if (i < words) store(logits + i, exponential(load(logits + i, words - i) - peak) * scale, words - i);
    if (mine) store(logits + word, exponential(kept - peak) * scale - factor, 1);
    for (i = words; i < width; ++i) logits[i] = T{};
  }
}
