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
typedef uint16_t AnyShort __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
typedef uint8_t AnyByte __attribute__((vector_size(kWidth), aligned(1), may_alias));

static inline Float all(float x) { return x - Float{}; }
static inline Word bits(Float x) { return (Word)x; }
static inline Float floats(Word x) { return (Float)x; }
static inline Float choose(Int which, Float x, Float y) { return which ? x : y; }
// y where x is NaN. One instruction each, which GCC doesn't find. (With a mask of all, since GCC 12 warns of its own
// header at the forms without.)
#if MEGAGPT2_WIDTH == 16
static inline Float greater(Float x, Float y) { return (Float)_mm512_maskz_max_ps(0xFFFF, (__m512)x, (__m512)y); }
static inline Float lesser(Float x, Float y) { return (Float)_mm512_maskz_min_ps(0xFFFF, (__m512)x, (__m512)y); }
#elif MEGAGPT2_WIDTH == 8
static inline Float greater(Float x, Float y) { return (Float)_mm256_max_ps((__m256)x, (__m256)y); }
static inline Float lesser(Float x, Float y) { return (Float)_mm256_min_ps((__m256)x, (__m256)y); }
#else
static inline Float greater(Float x, Float y) { return x > y ? x : y; }
static inline Float lesser(Float x, Float y) { return x < y ? x : y; }
#endif

// Between bytes, 16-bit and 32-bit words, for the same reason.
#if MEGAGPT2_WIDTH == 16
static inline Word widen(const uint8_t* p) { return (Word)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline Word widen(const uint16_t* p) {
  return (Word)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
static inline void narrow(uint16_t* p, Word x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x));
}
#elif MEGAGPT2_WIDTH == 8
static inline Word widen(const uint8_t* p) { return (Word)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline Word widen(const uint16_t* p) { return (Word)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline void narrow(uint16_t* p, Word x) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // words 0-3 0-3 4-7 4-7
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
}
#else
static inline Word widen(const uint8_t* p) { return __builtin_convertvector(*(const AnyByte*)p, Word); }
static inline Word widen(const uint16_t* p) { return __builtin_convertvector(*(const AnyShort*)p, Word); }
static inline void narrow(uint16_t* p, Word x) { *(AnyShort*)p = __builtin_convertvector(x, Short); }
#endif

static inline Float load(const float* p) { return *(const AnyFloat*)p; }
static inline void store(float* p, Float x) { *(AnyFloat*)p = x; }

static inline Float load(const BFloat16* p) { return floats(widen(&p->bits) << 16); }
// bf16 in the upper half of each word, the lower half to be ignored. The lower half of a NaN must not carry into the upper
// one, from which nothing would be left.
static inline Word rounded_clean(Float x) { return bits(x) + 0x7FFFu + ((bits(x) >> 16) & 1u); }
static inline void store(BFloat16* p, Float x) {
  narrow(&p->bits, ((x != x) ? (bits(x) | 0x400000u) : rounded_clean(x)) >> 16);
}

#if MEGAGPT2_WIDTH == 16
static inline Float load(const Half* p) { return (Float)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(Half* p, Float x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif MEGAGPT2_WIDTH == 8
static inline Float load(const Half* p) { return (Float)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(Half* p, Float x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// A product with 2**112 moves the exponent's bias from 15 to 127, subnormals included.
static inline Float load(const Half* p) {
  const Word half = widen(&p->bits);
  const Word magnitude = (half & 0x7FFFu) << 13;
  const Word finite = bits(floats(magnitude) * 0x1p112f);
  return floats((((half & 0x7C00u) == 0x7C00u) ? (magnitude | 0x7F800000u) : finite) | ((half & 0x8000u) << 16));
}
static inline void store(Half* p, Float x) {
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
static inline void store_clean(T* p, Float x) {
  store(p, x);
}
static inline void store_clean(BFloat16* p, Float x) { narrow(&p->bits, rounded_clean(x) >> 16); }
// An argument of 32 bits, made such a number.
static inline float clean(float x) { return x != x ? __builtin_nanf("") : x; }

// part[0 .. n) = p[0 .. n), and 0 up to kWidth; p[0 .. n) = part[0 .. n).
#if MEGAGPT2_WIDTH == 16
template <typename T>
static inline void take(T* part, const T* p, int64_t n) {
  const __mmask16 some = (__mmask16)((1u << n) - 1u);
  if (sizeof(T) == 4) _mm512_storeu_si512(part, _mm512_maskz_loadu_epi32(some, p));
  if (sizeof(T) == 2) _mm256_storeu_si256((__m256i*)part, _mm256_maskz_loadu_epi16(some, p));
  if (sizeof(T) == 1) _mm_storeu_si128((__m128i*)part, _mm_maskz_loadu_epi8(some, p));
}
template <typename T>
static inline void put(T* p, const T* part, int64_t n) {
  const __mmask16 some = (__mmask16)((1u << n) - 1u);
  if (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, some, _mm512_loadu_si512(part));
  if (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, some, _mm256_loadu_si256((const __m256i*)part));
}
#else
template <typename T>
static inline void take(T* part, const T* p, int64_t n) {
  for (int i = 0; i < kWidth; ++i) part[i] = T{};
  __builtin_memcpy(part, p, n * sizeof(T));
}
template <typename T>
static inline void put(T* p, const T* part, int64_t n) {
  __builtin_memcpy(p, part, n * sizeof(T));
}
#endif

static inline Int first_lanes(int64_t n) {
  Int lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < (int32_t)n;
}

template <typename T>
static inline Float load(const T* p, int64_t n) {
  T part[kWidth];
  take(part, p, n);
  return load(part);
}
template <typename T>
static inline Float load(const T* p, int64_t n, float otherwise) {
  return choose(first_lanes(n), load(p, n), all(otherwise));
}
template <typename T>
static inline void store(T* p, Float x, int64_t n) {
  T part[kWidth];
  store(part, x);
  put(p, part, n);
}

// Two vectors of neighbours in the order in which they come apart most cheaply: of bf16, of which a 32-bit word has two,
// those with even numbers and those with odd ones; of other types the first ones and those after them. What lies beside
// rows of T as floats is put into this order by pairs.h.
struct Pair {
  Float first, second;
};
constexpr int kPair = 2 * kWidth;
template <typename T>
constexpr bool kAlternate = false;
template <>
constexpr bool kAlternate<BFloat16> = true;

template <typename T>
static inline Pair load_pair(const T* p) {
  return {load(p), load(p + kWidth)};
}
static inline Pair load_pair(const BFloat16* p) {
  const Word both = *(const AnyWord*)p;
  return {floats(both << 16), floats(both & 0xFFFF0000u)};
}
template <typename T>
static inline void store_clean(T* p, Pair x) {
  store(p, x.first);
  store(p + kWidth, x.second);
}
static inline void store_clean(BFloat16* p, Pair x) {
  *(AnyWord*)p = (rounded_clean(x.first) >> 16) | (rounded_clean(x.second) & 0xFFFF0000u);
}

// Brings p[i] nearer, to be read or written soon, where i, in steps of vectors, is the first to reach its cache line. (A
// line is read before a part of it is written.)
template <typename T>
static inline void fetch(const T* p, int64_t i) {
  if (i * sizeof(T) % 64 == 0) __builtin_prefetch(p + i);
}
template <typename T>
static inline void fetch_pair(const T* p) {
  for (int64_t i = 0; i < kPair; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i);
}

// A place to write to past the caches, for what would not stay in them: a line that is written so, whole, is not read
// before. `at` must be at the beginning of a vector of T's in memory. See past_caches.h.
template <typename T>
struct Past {
  T* at;
};
template <typename T>
static inline Past<T> operator+(Past<T> p, int64_t i) {
  return {p.at + i};
}
template <typename T>
static inline void put_past(T* p, const T* part) {
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
static inline void store(Past<T> p, Float x) {
  alignas(64) T part[kWidth];
  store(part, x);
  put_past(p.at, part);
}
template <typename T>
static inline void store_clean(Past<T> p, Float x) {
  alignas(64) T part[kWidth];
  store_clean(part, x);
  put_past(p.at, part);
}
template <typename T>
static inline void store_clean(Past<T> p, Pair x) {
  alignas(64) T part[kPair];
  store_clean(part, x);
  put_past(p.at, part);
  put_past(p.at + kWidth, part + kWidth);
}
template <typename T>
static inline void store(Past<T> p, Float x, int64_t n) {
  store(p.at, x, n);
}
template <typename T>
static inline void fetch(Past<T>, int64_t) {}
template <typename T>
static inline void fetch_pair(Past<T>) {}

// The 16 random bits of each element.
static inline Word load_drawn(const uint16_t* p) { return widen(p); }
static inline Word load_drawn(const uint16_t* p, int64_t n) {
  uint16_t part[kWidth];
  take(part, p, n);
  return load_drawn(part);
}

// Of a pair of T's.
struct WordPair {
  Word first, second;
};
template <typename T>
static inline WordPair load_drawn_pair(const uint16_t* p) {
  if (!kAlternate<T>) return {load_drawn(p), load_drawn(p + kWidth)};
  const Word both = *(const AnyWord*)p;
  return {both & 0xFFFFu, both >> 16};
}

// Which of kWidth bools are true, as `choose` takes it.
static inline Int load_flags(const uint8_t* p) { return widen(p) != 0u; }
static inline Int load_flags(const uint8_t* p, int64_t n) {
  uint8_t part[kWidth];
  take(part, p, n);
  return load_flags(part);
}

static inline float sum(Float x) {
  float part[kWidth];
  store(part, x);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  return part[0];
}
static inline float largest(Float x) {
  float part[kWidth];
  store(part, x);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) part[i] = part[i] > part[i + step] ? part[i] : part[i + step];
  return part[0];
}

// e^r for |r| <= log(2) / 2 by its Taylor polynomial, with coefficients for least error (Cephes).
static inline Float small_exponential(Float r) {
  Float p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// e^x to 1 unit in the last place: x = n log 2 + r. Below -87.3 it is 0, above 88.7 infinity; a NaN stays.
static inline Float exponential(Float x) {
  const Float shift = all(0x1.8p23f);  // adding it rounds to an integer, which is in the low bits then
  const Float clamped = greater(lesser(x, all(88.8f)), all(-87.4f));
  const Float scaled = clamped * 1.44269504088896341f + shift;
  const Float n = scaled - shift;
  const Float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  const Word whole = bits(scaled) << 23;  // n, where the exponent is
  const Float result = floats(bits(small_exponential(r)) + whole);
  const Float limited = choose(x > 88.72283f, all(__builtin_inff()), choose(x < -87.3365f, Float{}, result));
  return choose(x != x, x, limited);
}

// A factor of 32 bits and what rounding left of it; smallest: by which it is -126.4.
struct Factor {
  float value, rest, smallest;
};
// 2^(x factor) to about 1 unit in the last place, for a product that is 0 or below, or hardly above; 0 where it is below
// -126.4. A NaN stays. x factor = n + r, |r| <= 1/2, never rounded as a whole; 2^r by the polynomial of least relative
// error whose constant is 1.
static inline Float power_of_two(Float x, Factor factor) {
  const Float shift = all(0x1.8p23f + 127.0f);  // the low bits are 127 + n: 2^n, moved to where the exponent is
  const Float clamped = greater(all(factor.smallest), x);
  const Float scaled = clamped * factor.value + shift;
  const Float r = clamped * factor.rest + (clamped * factor.value - (scaled - shift));
  Float p = all(1.55946778e-4f);
  p = p * r + 1.34066434e-3f;
  p = p * r + 9.61769279e-3f;
  p = p * r + 5.55031039e-2f;
  p = p * r + 2.40226522e-1f;
  p = p * r + 6.93147242e-1f;
  p = p * r + 1.0f;
  return choose(x < factor.smallest, Float{}, p * floats(bits(scaled) << 23));
}
