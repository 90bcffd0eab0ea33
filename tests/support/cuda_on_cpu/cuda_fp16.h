// fp16 of the CUDA Math API, on a CPU.
#pragma once

#include <torch/headeronly/util/Half.h>

struct __half_raw {
  unsigned short x;
};
struct __half {
  unsigned short bits;
  explicit __half(__half_raw raw) : bits(raw.x) {}
};
inline float __half2float(__half x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
inline __half __float2half_rn(float x) { return __half(__half_raw{c10::detail::fp16_ieee_from_fp32_value(x)}); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
