// Where the elements of pairs of bf16 lie: see pairs.h.

// Calls move(place, element) for each of n elements.
template <typename Move>
static MEGAGPT2_INLINE void for_each_place(int64_t n, const Move& move) {
  const int64_t whole = n / kPair * kPair;
  for (int64_t i = 0; i < whole; i += kPair) {
    for (int64_t j = 0; j < kPair; ++j) move(i + j, i + j % kWidth * 2 + j / kWidth);
  }
  for (int64_t i = whole; i < n; ++i) move(i, i);
}
static void to_pairs(const float* from, float* to, int64_t n) {
  for_each_place(n, [=](int64_t place, int64_t element) MEGAGPT2_INLINED { to[place] = from[element]; });
}
static void to_elements(const float* from, float* to, int64_t n) {
  for_each_place(n, [=](int64_t place, int64_t element) MEGAGPT2_INLINED { to[element] = from[place]; });
}
