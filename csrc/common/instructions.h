// Which vector instructions the operators use, decided at run time: one build serves every processor of its kind.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MEGAGPT2_X86 1
#define MEGAGPT2_AVX2 __attribute__((target("avx2,f16c")))
#define MEGAGPT2_AVX512 __attribute__((target("avx512f")))
#endif

// The body of a loop that each variant compiles anew, with its own instructions.
#define MEGAGPT2_INLINED __attribute__((always_inline))
#define MEGAGPT2_INLINE inline MEGAGPT2_INLINED

namespace megagpt2 {

enum class Instructions { portable, avx2, avx512 };

// The best that this processor has; the environment variable MEGAGPT2_CPU (portable, avx2, avx512) asks for another.
// Read once. Throws std::runtime_error for a name that isn't known, or that this processor has not.
Instructions instructions();

}  // namespace megagpt2
