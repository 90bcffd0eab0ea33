#include "common/instructions.h"

#include <cstdlib>
#include <string>

#include <c10/util/Exception.h>

namespace megagpt2 {
namespace {

Instructions best() {
#ifdef MEGAGPT2_X86
  if (__builtin_cpu_supports("avx512f")) return Instructions::avx512;
  if (__builtin_cpu_supports("avx2")) return Instructions::avx2;
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
    TORCH_CHECK(name == "portable", "MEGAGPT2_CPU is ", name, ": set it to portable, avx2 or avx512, or leave it out");
  }
  TORCH_CHECK(wanted <= have, "MEGAGPT2_CPU is ", name, ", which this processor has not: leave it out");
  return wanted;
}

}  // namespace

Instructions instructions() {
  static const Instructions chosen = choose();
  return chosen;
}

}  // namespace megagpt2
