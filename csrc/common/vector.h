// Vectors of kWidth floats, in a file of its own for each set of instructions: see variants.h. No include guard, no
// includes, nothing inline from elsewhere.
//
// Loads of any element type give floats, stores round to nearest, ties to even. `load(p, n)` and `store(p, x, n)` are
// for the last n < kWidth elements of a row: what is not there reads as `otherwise`.

constexpr int kWidth = MEGAGPT2_WIDTH;
typedef float Float __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Word __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Short __attribute__((vector_size(2 * kWidth)));
typedef float AnyFloat __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t AnyWord __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t AnyShort __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
typedef uint8_t AnyByte __attribute__((vector_size(kWidth), aligned(1), may_alias));

static inline Float all(float x) { return x - Float{}; }
static inline Word bits(Float x) { return (Word)x; }
static inline Float floats(Word x) { return (Float)x; }
static inline Float choose(Int which, Float x, Float y) { return which ? x : y; }
static inline Float greater(Float x, Float y) { return x > y ? x : y; }  // y where x is NaN
static inline Float lesser(Float x, Float y) { return x < y ? x : y; }

static inline Float load(const float* p) { return *(const AnyFloat*)p; }
static inline void store(float* p, Float x) { *(AnyFloat*)p = x; }

static inline Float load(const BFloat16* p) {
  return floats(__builtin_convertvector(*(const AnyShort*)p, Word) << 16);
}
static inline void store(BFloat16* p, Float x) {
  const Word word = bits(x);
  const Word rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
  const Word nan = (word >> 16) | 0x40u;  // stays one: adding could carry into the sign
  *(AnyShort*)p = __builtin_convertvector((x != x) ? nan : rounded, Short);
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
  const Word half = __builtin_convertvector(*(const AnyShort*)p, Word);
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
  *(AnyShort*)p = __builtin_convertvector(half | (sign >> 16), Short);
}
#endif

template <typename T>
static inline Float load(const T* p, int64_t n, T otherwise = T{}) {
  T part[kWidth];
  for (int i = 0; i < kWidth; ++i) part[i] = i < n ? p[i] : otherwise;
  return load(part);
}
template <typename T>
static inline void store(T* p, Float x, int64_t n) {
  T part[kWidth];
  store(part, x);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

static inline Word load_words(const uint32_t* p) { return *(const AnyWord*)p; }
static inline Word load_words(const uint32_t* p, int64_t n) {
  uint32_t part[kWidth];
  for (int i = 0; i < kWidth; ++i) part[i] = i < n ? p[i] : 0;
  return load_words(part);
}

// Which of kWidth bools are true, as `choose` takes it.
static inline Int load_flags(const uint8_t* p) { return __builtin_convertvector(*(const AnyByte*)p, Int) != 0; }
static inline Int load_flags(const uint8_t* p, int64_t n) {
  uint8_t part[kWidth];
  for (int i = 0; i < kWidth; ++i) part[i] = i < n ? p[i] : 0;
  return load_flags(part);
}
static inline Int first_lanes(int64_t n) {
  Int lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < (int32_t)n;
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

// e^x to 1 unit in the last place: x = n log 2 + r, |r| <= log(2) / 2, and e^r by its Taylor polynomial with
// coefficients for least error (Cephes). Below -87.3 it is 0, above 88.7 infinity; a NaN stays.
static inline Float exponential(Float x) {
  const Float shift = all(0x1.8p23f);  // adding it rounds to an integer, which is in the low bits then
  const Float clamped = greater(lesser(x, all(88.8f)), all(-87.4f));
  const Float scaled = clamped * 1.44269504088896341f + shift;
  const Float n = scaled - shift;
  const Float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Float p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Word whole = bits(scaled) << 23;  // n, where the exponent is
  const Float result = floats(bits(p) + whole);
  const Float limited = choose(x > 88.72283f, all(__builtin_inff()), choose(x < -87.3365f, Float{}, result));
  return choose(x != x, x, limited);
}
