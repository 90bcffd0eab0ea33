// Vectors of kWidth floats, in a file of its own for each set of instructions: see variants.h. No include guard, no
// includes, nothing inline from elsewhere.
//
// Loads of any element type give floats, stores round to nearest, ties to even. `load(p, n)` and `store(p, x, n)` are
// for the first n <= kWidth elements alone: what is not there reads as 0, or as `otherwise`.

constexpr int kWidth = MEGAGPT2_WIDTH;
typedef float Float __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Word __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Short __attribute__((vector_size(2 * kWidth)));
typedef float AnyFloat __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t AnyWord __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));
typedef uint16_t AnyShort __attribute__((vector_size(2 * kWidth), aligned(1), may_alias));
typedef uint8_t AnyByte __attribute__((vector_size(kWidth), aligned(1), may_alias));

static MEGAGPT2_INLINE Float all(float x) { return x - Float{}; }
static MEGAGPT2_INLINE Word bits(Float x) { return (Word)x; }
static MEGAGPT2_INLINE Float floats(Word x) { return (Float)x; }
static MEGAGPT2_INLINE Float choose(Int which, Float x, Float y) { return which ? x : y; }
// y where x is NaN. One instruction each, which GCC doesn't find. (With a mask of all, since GCC 12 warns of its own
// header at the forms without.)
#if MEGAGPT2_WIDTH == 16
static MEGAGPT2_INLINE Float greater(Float x, Float y) { return (Float)_mm512_maskz_max_ps(0xFFFF, (__m512)x, (__m512)y); }
static MEGAGPT2_INLINE Float lesser(Float x, Float y) { return (Float)_mm512_maskz_min_ps(0xFFFF, (__m512)x, (__m512)y); }
#elif MEGAGPT2_WIDTH == 8
static MEGAGPT2_INLINE Float greater(Float x, Float y) { return (Float)_mm256_max_ps((__m256)x, (__m256)y); }
static MEGAGPT2_INLINE Float lesser(Float x, Float y) { return (Float)_mm256_min_ps((__m256)x, (__m256)y); }
#else
static MEGAGPT2_INLINE Float greater(Float x, Float y) { return x > y ? x : y; }
static MEGAGPT2_INLINE Float lesser(Float x, Float y) { return x < y ? x : y; }
#endif

// Between bytes, 16-bit and 32-bit words, for the same reason.
#if MEGAGPT2_WIDTH == 16
static MEGAGPT2_INLINE Word widen(const uint8_t* p) { return (Word)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static MEGAGPT2_INLINE Word widen(const uint16_t* p) {
  return (Word)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
static MEGAGPT2_INLINE void narrow(uint16_t* p, Word x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x));
}
#elif MEGAGPT2_WIDTH == 8
static MEGAGPT2_INLINE Word widen(const uint8_t* p) { return (Word)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static MEGAGPT2_INLINE Word widen(const uint16_t* p) { return (Word)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static MEGAGPT2_INLINE void narrow(uint16_t* p, Word x) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // words 0-3 0-3 4-7 4-7
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
}
#else
static MEGAGPT2_INLINE Word widen(const uint8_t* p) { return __builtin_convertvector(*(const AnyByte*)p, Word); }
static MEGAGPT2_INLINE Word widen(const uint16_t* p) { return __builtin_convertvector(*(const AnyShort*)p, Word); }
static MEGAGPT2_INLINE void narrow(uint16_t* p, Word x) { *(AnyShort*)p = __builtin_convertvector(x, Short); }
#endif

static MEGAGPT2_INLINE Float load(const float* p) { return *(const AnyFloat*)p; }
static MEGAGPT2_INLINE void store(float* p, Float x) { *(AnyFloat*)p = x; }

static MEGAGPT2_INLINE Float load(const BFloat16* p) { return floats(widen(&p->bits) << 16); }
// bf16 in the upper half of each word, the lower half to be ignored. The lower half of a NaN must not carry into the upper
// one, from which nothing would be left.
static MEGAGPT2_INLINE Word rounded_clean(Float x) { return bits(x) + 0x7FFFu + ((bits(x) >> 16) & 1u); }
static MEGAGPT2_INLINE void store(BFloat16* p, Float x) {
  narrow(&p->bits, ((x != x) ? (bits(x) | 0x400000u) : rounded_clean(x)) >> 16);
}

#if MEGAGPT2_WIDTH == 16
static MEGAGPT2_INLINE Float load(const Half* p) { return (Float)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static MEGAGPT2_INLINE void store(Half* p, Float x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif MEGAGPT2_WIDTH == 8
static MEGAGPT2_INLINE Float load(const Half* p) { return (Float)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static MEGAGPT2_INLINE void store(Half* p, Float x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// A product with 2**112 moves the exponent's bias from 15 to 127, subnormals included.
static MEGAGPT2_INLINE Float load(const Half* p) {
  const Word half = widen(&p->bits);
  const Word magnitude = (half & 0x7FFFu) << 13;
  const Word finite = bits(floats(magnitude) * 0x1p112f);
  return floats((((half & 0x7C00u) == 0x7C00u) ? (magnitude | 0x7F800000u) : finite) | ((half & 0x8000u) << 16));
}
static MEGAGPT2_INLINE void store(Half* p, Float x) {
  const Word sign = bits(x) & 0x80000000u, magnitude = bits(x) ^ sign;
  const uint32_t exponent = 0x38000000u; // 112 << 23
  const Word normal = (magnitude - exponent + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half in the lowest bits, rounded.
  const Word subnormal = bits(floats(magnitude) + 0.5f) - 0x3F000000u;
  Word half = (magnitude < 0x38800000u) ? subnormal : normal;
  half = (magnitude >= 0x477FF000u) ? (Word{} + 0x7C00u) : half;  // rounds to infinity
  half = (magnitude > 0x7F800000u) ? (Word{} + 0x7E00u) : half;   // NaN
  narrow(&p->bits, half | (sign >> 16));
}
#endif

// store(p, x) for an x that is made of 16-bit numbers and what is no NaN: then the lower half of a NaN is 0.
template <typename T>
static MEGAGPT2_INLINE void store_clean(T* p, Float x) {
  store(p, x);
}
static MEGAGPT2_INLINE void store_clean(BFloat16* p, Float x) { narrow(&p->bits, rounded_clean(x) >> 16); }
// An argument of 32 bits, made such a number.
static MEGAGPT2_INLINE float clean(float x) { return x != x ? __builtin_nanf("") : x; }

// part[0 .. n) = p[0 .. n), and 0 up to kCount, one or two vectors; p[0 .. n) = part[0 .. n).
#if MEGAGPT2_WIDTH == 16
template <int kCount, typename T>
static MEGAGPT2_INLINE void take(T* part, const T* p, int64_t n) {
  const uint32_t some = (uint32_t)((1ull << n) - 1u);
  if (sizeof(T) == 4) {
    for (int i = 0; i < kCount; i += 16)
      _mm512_storeu_si512(part + i, _mm512_maskz_loadu_epi32((__mmask16)(some >> i), p + i));
  } else if (sizeof(T) == 2) {
    if (kCount == 32) _mm512_storeu_si512(part, _mm512_maskz_loadu_epi16(some, p));
    if (kCount == 16) _mm256_storeu_si256((__m256i*)part, _mm256_maskz_loadu_epi16((__mmask16)some, p));
  } else {
    if (kCount == 32) _mm256_storeu_si256((__m256i*)part, _mm256_maskz_loadu_epi8(some, p));
    if (kCount == 16) _mm_storeu_si128((__m128i*)part, _mm_maskz_loadu_epi8((__mmask16)some, p));
  }
}
template <int kCount, typename T>
static MEGAGPT2_INLINE void put(T* p, const T* part, int64_t n) {
  const uint32_t some = (uint32_t)((1ull << n) - 1u);
  if (sizeof(T) == 4) {
    for (int i = 0; i < kCount; i += 16)
      _mm512_mask_storeu_epi32(p + i, (__mmask16)(some >> i), _mm512_loadu_si512(part + i));
  } else {
    if (kCount == 32) _mm512_mask_storeu_epi16(p, some, _mm512_loadu_si512(part));
    if (kCount == 16) _mm256_mask_storeu_epi16(p, (__mmask16)some, _mm256_loadu_si256((const __m256i*)part));
  }
}
#else
template <int kCount, typename T>
static MEGAGPT2_INLINE void take(T* part, const T* p, int64_t n) {
  for (int i = 0; i < kCount; ++i) part[i] = T{};
  __builtin_memcpy(part, p, n * sizeof(T));
}
template <int kCount, typename T>
static MEGAGPT2_INLINE void put(T* p, const T* part, int64_t n) {
  __builtin_memcpy(p, part, n * sizeof(T));
}
#endif

static MEGAGPT2_INLINE Int first_lanes(int64_t n) {
  Int lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < (int32_t)n;
}

template <typename T>
static MEGAGPT2_INLINE Float load(const T* p, int64_t n) {
  T part[kWidth];
  take<kWidth>(part, p, n);
  return load(part);
}
template <typename T>
static MEGAGPT2_INLINE Float load(const T* p, int64_t n, float otherwise) {
  return choose(first_lanes(n), load(p, n), all(otherwise));
}
template <typename T>
static MEGAGPT2_INLINE void store(T* p, Float x, int64_t n) {
  T part[kWidth];
  store(part, x);
  put<kWidth>(p, part, n);
}

// Two vectors of neighbours in the order in which they come apart most cheaply: of bf16, of which a 32-bit word has two,
// those with even numbers and those with odd ones; of other types the first ones and those after them. What lies beside
// rows of T as floats is put into this order by pairs.h.
struct Pair {
  Float first, second;
};
// What holds of its elements, as `choose` takes it.
struct IntPair {
  Int first, second;
};
constexpr int kPair = 2 * kWidth;
static MEGAGPT2_INLINE Pair all_of_pair(float x) { return {all(x), all(x)}; }
static MEGAGPT2_INLINE Pair operator+(Pair x, Pair y) { return {x.first + y.first, x.second + y.second}; }
static MEGAGPT2_INLINE Pair operator*(Pair x, Pair y) { return {x.first * y.first, x.second * y.second}; }
static MEGAGPT2_INLINE Pair operator-(Pair x, float y) { return {x.first - y, x.second - y}; }
static MEGAGPT2_INLINE Pair operator*(Pair x, float y) { return {x.first * y, x.second * y}; }
static MEGAGPT2_INLINE IntPair operator==(Pair x, float y) { return {x.first == y, x.second == y}; }
static MEGAGPT2_INLINE Pair greater(Pair x, Pair y) { return {greater(x.first, y.first), greater(x.second, y.second)}; }

static MEGAGPT2_INLINE Pair choose(IntPair which, Pair x, Pair y) {
  return {choose(which.first, x.first, y.first), choose(which.second, x.second, y.second)};
}

template <typename T>
constexpr bool kAlternate = false;
template <>
constexpr bool kAlternate<BFloat16> = true;

// Which are the first n elements of a pair of T's, for any n.
template <typename T>
static MEGAGPT2_INLINE IntPair first_of_pair(int64_t n) {
  if (kAlternate<T>) return {first_lanes(n / 2 + n % 2), first_lanes(n / 2)};
  return {first_lanes(n), first_lanes(n - kWidth)};
}

template <typename T>
static MEGAGPT2_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kWidth)};
}
static MEGAGPT2_INLINE Pair load_pair(const BFloat16* p) {
  const Word both = *(const AnyWord*)p;
  return {floats(both << 16), floats(both & 0xFFFF0000u)};
}
// What load_whole(p) makes of a pair, of which only the first n > 0 elements may be there: the others read as 0.
template <typename T, typename LoadWhole>
static MEGAGPT2_INLINE auto load_first(const T* p, int64_t n, const LoadWhole& load_whole) {
  if (n >= kPair) return load_whole(p);
  T part[kPair];
  take<kPair>(part, p, n);
  return load_whole((const T*)part);
}
template <typename T>
static MEGAGPT2_INLINE Pair load_pair(const T* p, int64_t n) {
  return load_first(p, n, [](const T* whole) MEGAGPT2_INLINED { return load_pair(whole); });
}
template <typename T>
static MEGAGPT2_INLINE Pair load_pair(const T* p, int64_t n, float otherwise) {
  const Pair x = load_pair(p, n);
  return n < kPair ? choose(first_of_pair<T>(n), x, all_of_pair(otherwise)) : x;
}
template <typename T>
static MEGAGPT2_INLINE void store_clean(T* p, Pair x) {
  store(p, x.first);
  store(p + kWidth, x.second);
}
static MEGAGPT2_INLINE void store_clean(BFloat16* p, Pair x) {
  *(AnyWord*)p = (rounded_clean(x.first) >> 16) | (rounded_clean(x.second) & 0xFFFF0000u);
}

template <typename T>
static MEGAGPT2_INLINE void store_clean(T* p, Pair x, int64_t n) {
  if (n >= kPair) return store_clean(p, x);
  T part[kPair];
  store_clean(part, x);
  put<kPair>(p, part, n);
}

// Brings p[i] nearer, to be read or written soon, where i, in steps of vectors, is the first to reach its cache line. (A
// line is read before a part of it is written.)
template <typename T>
static MEGAGPT2_INLINE void fetch(const T* p, int64_t i) {
  if (i * sizeof(T) % 64 == 0) __builtin_prefetch(p + i);
}
template <typename T>
static MEGAGPT2_INLINE void fetch_pair(const T* p) {
  for (int64_t i = 0; i < kPair; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

// A place to write to past the caches, for what would not stay in them: a line that is written so, whole, is not read
// before. `at` must be at the beginning of a vector of T's in memory. See past_caches.h.
template <typename T>
struct Past {
  T* at;
};
template <typename T>
static MEGAGPT2_INLINE Past<T> operator+(Past<T> p, int64_t i) {
  return {p.at + i};
}
template <typename T>
static MEGAGPT2_INLINE void put_past(T* p, const T* part) {
#if MEGAGPT2_WIDTH == 16
  if (sizeof(T) == 4) return _mm512_stream_si512((__m512i*)p, _mm512_load_si512(part));
#endif
#if MEGAGPT2_WIDTH >= 8
  if (sizeof(T) * kWidth == 32) return _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)part));
#endif
#ifdef MEGAGPT2_X86
  if (sizeof(T) * kWidth == 16) return _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)part));
#endif
  __builtin_memcpy(p, part, sizeof(T) * kWidth);
}
template <typename T>
static MEGAGPT2_INLINE void store(Past<T> p, Float x) {
  alignas(64) T part[kWidth];
  store(part, x);
  put_past(p.at, part);
}
template <typename T>
static MEGAGPT2_INLINE void store_clean(Past<T> p, Float x) {
  alignas(64) T part[kWidth];
  store_clean(part, x);
  put_past(p.at, part);
}
template <typename T>
static MEGAGPT2_INLINE void store_clean(Past<T> p, Pair x) {
  alignas(64) T part[kPair];
  store_clean(part, x);
  put_past(p.at, part);
  put_past(p.at + kWidth, part + kWidth);
}
template <typename T>
static MEGAGPT2_INLINE void store(Past<T> p, Float x, int64_t n) {
  store(p.at, x, n);
}
template <typename T>
static MEGAGPT2_INLINE void store_clean(Past<T> p, Pair x, int64_t n) {
  n >= kPair ? store_clean(p, x) : store_clean(p.at, x, n);
}
template <typename T>
static MEGAGPT2_INLINE void fetch(Past<T>, int64_t) {}
template <typename T>
static MEGAGPT2_INLINE void fetch_pair(Past<T>) {}

// The 16 random bits of each element.
static MEGAGPT2_INLINE Word load_drawn(const uint16_t* p) { return widen(p); }
static MEGAGPT2_INLINE Word load_drawn(const uint16_t* p, int64_t n) {
  uint16_t part[kWidth];
  take<kWidth>(part, p, n);
  return load_drawn(part);
}

// Of a pair of T's.
struct WordPair {
  Word first, second;
};
template <typename T>
static MEGAGPT2_INLINE WordPair load_drawn_pair(const uint16_t* p) {
  if (!kAlternate<T>) return {load_drawn(p), load_drawn(p + kWidth)};
  const Word both = *(const AnyWord*)p;
  return {both & 0xFFFFu, both >> 16};
}
template <typename T>
static MEGAGPT2_INLINE WordPair load_drawn_pair(const uint16_t* p, int64_t n) {
  return load_first(p, n, [](const uint16_t* whole) MEGAGPT2_INLINED { return load_drawn_pair<T>(whole); });
}

// x scale where it is kept, else 0, whatever x is.
static MEGAGPT2_INLINE Float dropped(Float x, Word drawn, uint32_t threshold, float scale) {
  return choose(drawn >= threshold, x * scale, Float{});
}
static MEGAGPT2_INLINE Pair dropped(Pair x, WordPair drawn, uint32_t threshold, float scale) {
  return {dropped(x.first, drawn.first, threshold, scale), dropped(x.second, drawn.second, threshold, scale)};
}

// Which bools are true, of a pair of T's.
template <typename T>
static MEGAGPT2_INLINE IntPair load_flags_pair(const uint8_t* p) {
  if (!kAlternate<T>) return {widen(p) != 0u, widen(p + kWidth) != 0u};
  const Word both = widen((const uint16_t*)p);  // two flags each
  return {(both & 0xFFu) != 0u, both > 0xFFu};
}
template <typename T>
static MEGAGPT2_INLINE IntPair load_flags_pair(const uint8_t* p, int64_t n) {
  return load_first(p, n, [](const uint8_t* whole) MEGAGPT2_INLINED { return load_flags_pair<T>(whole); });
}

// Halves of a vector are put together until four lanes are left: in registers, as through memory it takes longer than the
// rest of a short row.
typedef float Four __attribute__((vector_size(16)));
template <typename Together>
static MEGAGPT2_INLINE Four fold(Float x, const Together& together) {
#if MEGAGPT2_WIDTH == 4
  (void)together;
  return x;
#else
#if MEGAGPT2_WIDTH == 16
  typedef float Eight __attribute__((vector_size(32)));
  const Eight lower = (Eight)_mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 0);
  const Eight upper = (Eight)_mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 1);
  const __m256 eight = (__m256)together(lower, upper);
#else
  const __m256 eight = (__m256)x;
#endif
  return together((Four)_mm256_castps256_ps128(eight), (Four)_mm256_extractf128_ps(eight, 1));
#endif
}
static MEGAGPT2_INLINE float sum(Float x) {
  const Four four = fold(x, [](auto a, auto b) MEGAGPT2_INLINED { return a + b; });
  return (four[0] + four[2]) + (four[1] + four[3]);
}
static MEGAGPT2_INLINE float largest(Float x) {
  const Four four = fold(x, [](auto a, auto b) MEGAGPT2_INLINED { return a > b ? a : b; });
  const float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
  return even > odd ? even : odd;
}

// Calls pair(i, left, k) for every pair of n elements: from element i on it has `left`, kPair but for the last. What
// pairs of one k make can be added up beside that of others, in as many sums with any vectors, so that long rows are as
// exact with all of them.
constexpr int kSideBySide = 32 / kPair;
template <typename OfPair>
static MEGAGPT2_INLINE void for_each_pair(int64_t n, const OfPair& pair) {
  int64_t i = 0;
  for (; i + kSideBySide * kPair <= n; i += kSideBySide * kPair)
    for (int k = 0; k < kSideBySide; ++k) pair(i + k * kPair, (int64_t)kPair, k);
  for (; i + kPair <= n; i += kPair) pair(i, (int64_t)kPair, 0);
  if (i < n) pair(i, n - i, 0);
}
static MEGAGPT2_INLINE float sum_of_pairs(Pair* totals) {
  for (int k = 1; k < kSideBySide; ++k) totals[0] = totals[0] + totals[k];
  return sum(totals[0].first + totals[0].second);
}
// The largest of score(i, left), made of every pair of n elements; -inf where there is none. A NaN is left out.
template <typename Score>
static MEGAGPT2_INLINE float largest_of_pairs(int64_t n, const Score& score) {
  Pair most[kSideBySide];
  for (Pair& m : most) m = all_of_pair(-__builtin_inff());
  for_each_pair(n, [&](int64_t i, int64_t left, int k) MEGAGPT2_INLINED { most[k] = greater(score(i, left), most[k]); });
  for (int k = 1; k < kSideBySide; ++k) most[0] = greater(most[0], most[k]);
  return largest(greater(most[0].first, most[0].second));
}

// x factor - n for the integer n that is nearest to the product, which isn't rounded on the way. Processors do it at once;
// without such an instruction it is put together of products that are exact: of 12 bits each (Dekker 1971).
static MEGAGPT2_INLINE Float product_minus(Float x, float factor, Float n) {
#if MEGAGPT2_WIDTH == 4 && defined(MEGAGPT2_X86)
  const Float upper = floats(bits(x) & 0xFFFFF000u), lower = x - upper;
  const Float big = floats(bits(all(factor)) & 0xFFFFF000u), small = factor - big;
  return ((upper * big - n) + (upper * small + lower * big)) + lower * small;
#else
  return x * factor - n;
#endif
}

// Exponentials come in two degrees of exactness, by what their results become: numbers of 32 bits, to 1.6 units in the last
// place, or of 16, to 1e-5 of themselves.
template <typename T>
constexpr bool kOf32Bits = sizeof(T) == 4;

// A factor of 32 bits and what rounding left of it.
struct Factor {
  float value, rest;
};
// A power of two in two parts: 2^r for |r| <= 1/2, by the polynomial of least relative error whose constant is 1, and n +
// 127 in the lowest bits of `whole`.
struct Power {
  Float fraction;
  Word whole;
};
// 2^(x factor), x factor = n + r, which is never rounded as a whole.
template <bool of_32_bits>
static MEGAGPT2_INLINE Power power(Float x, Factor factor) {
  const Float shift = all(0x1.8p23f + 127.0f);  // adding it rounds to an integer, which is in the lowest bits then
  const Float scaled = x * factor.value + shift;
  Float r = product_minus(x, factor.value, scaled - shift), p;
  if (of_32_bits) {
    r = x * factor.rest + r;
    p = all(1.55946778e-4f);
    p = p * r + 1.34066434e-3f;
    p = p * r + 9.61769279e-3f;
    p = p * r + 5.55031039e-2f;
    p = p * r + 2.40226522e-1f;
    p = p * r + 6.93147242e-1f;
  } else {
    p = all(9.58284338e-3f);
    p = p * r + 5.59064256e-2f;
    p = p * r + 2.40240988e-1f;
    p = p * r + 6.93124193e-1f;
  }
  return {p * r + 1.0f, bits(scaled)};
}

// 2^(x factor) for a product that is 0 or below, or hardly above; 0 where x is below `smallest`, at which the product is
// -126.4. A NaN stays.
template <bool of_32_bits>
static MEGAGPT2_INLINE Float power_of_two(Float x, Factor factor, float smallest) {
  const Power found = power<of_32_bits>(greater(all(smallest), x), factor);
  return choose(x < smallest, Float{}, found.fraction * floats(found.whole << 23));
}
template <bool of_32_bits>
static MEGAGPT2_INLINE Pair power_of_two(Pair x, Factor factor, float smallest) {
  return {power_of_two<of_32_bits>(x.first, factor, smallest), power_of_two<of_32_bits>(x.second, factor, smallest)};
}

constexpr Factor kLog2E = {1.44269502162933349609375f, 1.92596299112661746887e-8f};

// e^x, for an x that is 0 or below, or hardly above; 0 below -87.6.
template <bool of_32_bits, typename Vector>
static MEGAGPT2_INLINE Vector exponential_below(Vector x) {
  return power_of_two<of_32_bits>(x, kLog2E, -87.6f);
}

// e^x. Below -87.3 it is 0, above 88.7 infinity; a NaN stays.
template <bool of_32_bits>
static MEGAGPT2_INLINE Float exponential(Float x) {
  const Power found = power<of_32_bits>(greater(all(-87.4f), lesser(all(88.8f), x)), kLog2E);
  const Float result = floats(bits(found.fraction) + ((found.whole - 127u) << 23));
  const Float limited = choose(x > 88.72283f, all(__builtin_inff()), choose(x < -87.3365f, Float{}, result));
  return choose(x != x, x, limited);
}
