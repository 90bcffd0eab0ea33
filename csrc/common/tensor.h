// What the operators need of torch, through its stable C++ interface: one build serves every torch from 2.11 on.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/numbers.h"

namespace megagpt2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor without values, on x's device: of its type, of fp32, of its type and sizes. Made by torch's C interface: the
// operator new_empty is found by its name and takes its arguments from a stack, which costs microseconds, and tens of them
// where other work has emptied the caches.
inline Tensor empty(const Tensor& x, const int64_t* sizes, int64_t dimensions, int32_t type) {
  std::vector<int64_t> strides(dimensions);
  int64_t elements = 1;
  for (int64_t i = dimensions - 1; i >= 0; --i) {
    strides[i] = elements;
    elements *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dimensions, sizes, strides.data(), type, device, index, &made));
  return Tensor(made);
}
inline int32_t type_of(const Tensor& x) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  return type;
}
inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return empty(x, sizes.begin(), sizes.size(), type_of(x));
}
inline Tensor empty_floats(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return empty(x, sizes.begin(), sizes.size(), aoti_torch_dtype_float32());
}
inline Tensor empty_contiguous_like(const Tensor& x) { return empty(x, x.sizes().data(), x.dim(), type_of(x)); }

inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls function(T{}) with the element type of `type`: float, BFloat16 or Half. The dispatch in kernels/ sends no other
// here.
template <typename Function>
void with_type(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float: return function(float{});
    case ScalarType::BFloat16: return function(BFloat16{});
    case ScalarType::Half: return function(Half{});
    default: STD_TORCH_CHECK(false, "megagpt2's operators take float32, bfloat16 and float16, not this type");
  }
}

// The values as contiguous floats.
inline Tensor as_floats(const Tensor& x) {
  return packed(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
}

inline bool same_shape(const Tensor& x, const Tensor& y) {
  bool same = x.dim() == y.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == y.size(i);
  return same;
}

inline void check_same(const Tensor& x, const Tensor& y, const char* names) {
  STD_TORCH_CHECK(
      same_shape(x, y) && x.scalar_type() == y.scalar_type(), names, " must have the same shape and type");
}

inline void check_vector(const Tensor& x, int64_t width, ScalarType type, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == width && x.scalar_type() == type, name, " must be a vector of ", width,
      " elements, of the type of x");
}

// An optional bias [width] as floats: zeros where there is none.
inline Tensor bias_floats(const Tensor& x, const std::optional<Tensor>& bias, int64_t width) {
  if (bias) {
    check_vector(*bias, width, x.scalar_type(), "bias");
    return as_floats(*bias);
  }
  Tensor zeros = empty_floats(x, {width});
  torch::stable::zero_(zeros);
  return zeros;
}

// Rows of a tensor [..., width].
struct Rows {
  int64_t rows, width;
};
inline Rows rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must have at least one dimension");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return {rows, x.size(x.dim() - 1)};
}

// Rows worth waking a thread for: 32,768 elements.
inline int64_t rows_per_task(int64_t width) { return width >= 32768 ? 1 : 32768 / (width < 1 ? 1 : width); }

}  // namespace megagpt2
