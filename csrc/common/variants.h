// Compiles a kernel's loops once for each set of vector instructions, to be chosen at run time: one build serves every
// processor of its kind.
//
//     #define MEGAGPT2_LOOPS "layer_norm/layer_norm_loops.h"
//     #include "common/variants.h"
//     ...
//     const auto rows = MEGAGPT2_VARIANT(forward_rows<T>);     // of megagpt2::avx512, ::avx2 or ::portable
//
// The loops are written once, with the vectors of common/vector.h, which is compiled anew with them: every variant has
// a namespace of its own. They may use nothing else that is inline (std::max, say): the linker keeps one copy of such a
// function, and it could be the one with instructions that a processor lacks. Whatever takes or gives vectors is
// MEGAGPT2_INLINE, or a lambda [](...) MEGAGPT2_INLINED {...}: called, it would get them through memory, and with so many
// variants in a file the compiler soon leaves it at that.

#ifndef MEGAGPT2_LOOPS
#error "define MEGAGPT2_LOOPS as the file with the loops"
#endif

#include "common/instructions.h"
#include "common/numbers.h"

#ifdef MEGAGPT2_X86
#include <immintrin.h>
#endif

#define MEGAGPT2_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define MEGAGPT2_BEGIN_TARGET(names) \
  MEGAGPT2_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define MEGAGPT2_END_TARGET _Pragma("clang attribute pop")
#else
#define MEGAGPT2_BEGIN_TARGET(names) _Pragma("GCC push_options") MEGAGPT2_PRAGMA(GCC target(names))
#define MEGAGPT2_END_TARGET _Pragma("GCC pop_options")
#endif

#define MEGAGPT2_WIDTH 4
namespace megagpt2::portable {
#include "common/vector.h"
#include MEGAGPT2_LOOPS
}  // namespace megagpt2::portable
#undef MEGAGPT2_WIDTH

#ifdef MEGAGPT2_X86
#define MEGAGPT2_WIDTH 8
MEGAGPT2_BEGIN_TARGET("avx2,fma,f16c")
namespace megagpt2::avx2 {
#include "common/vector.h"
#include MEGAGPT2_LOOPS
}  // namespace megagpt2::avx2
MEGAGPT2_END_TARGET
#undef MEGAGPT2_WIDTH

#define MEGAGPT2_WIDTH 16
MEGAGPT2_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace megagpt2::avx512 {
#include "common/vector.h"
#include MEGAGPT2_LOOPS
}  // namespace megagpt2::avx512
MEGAGPT2_END_TARGET
#undef MEGAGPT2_WIDTH

#define MEGAGPT2_VARIANT(...)                                                        \
  (::megagpt2::instructions() == ::megagpt2::Instructions::avx512 ? &::megagpt2::avx512::__VA_ARGS__ \
   : ::megagpt2::instructions() == ::megagpt2::Instructions::avx2 ? &::megagpt2::avx2::__VA_ARGS__   \
                                                                  : &::megagpt2::portable::__VA_ARGS__)
#else
#define MEGAGPT2_VARIANT(...) (&::megagpt2::portable::__VA_ARGS__)
#endif
