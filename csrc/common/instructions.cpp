#include "common/instructions.h"

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

#ifdef MEGAGPT2_X86
#include <cpuid.h>
#endif

namespace megagpt2 {
namespace {

#ifdef MEGAGPT2_X86
// Conversion of fp16: every processor with AVX2 is known to have it, a virtual machine may hide it. Asked of the
// processor itself, since GCC 10 has no name for it.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Instructions best() {
#ifdef MEGAGPT2_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");  // as common/variants.h compiles for
  if (avx2 && avx512) return Instructions::avx512;
  if (avx2) return Instructions::avx2;
#endif
  return Instructions::portable;
}

Instructions choose() {
  const char* asked = std::getenv("MEGAGPT2_CPU");
  const std::string name = asked ? asked : "";
  const Instructions have = best();
  if (name.empty()) return have;
  Instructions wanted = Instructions::portable;
  if (name == "avx2") {
    wanted = Instructions::avx2;
  } else if (name == "avx512") {
    wanted = Instructions::avx512;
  } else {
    STD_TORCH_CHECK(name == "portable", "MEGAGPT2_CPU is ", name, ": set it to portable, avx2 or avx512, or leave it out");
  }
  STD_TORCH_CHECK(wanted <= have, "MEGAGPT2_CPU is ", name, ", which this processor has not: leave it out");
  return wanted;
}

}  // namespace

Instructions instructions() {
  static const Instructions chosen = choose();
  return chosen;
}

}  // namespace megagpt2
