// Registers the operators with torch as megagpt2::NAME. Their fake implementations and gradients are registered in
// Python, in megagpt2/kernels/NAME.py.
//
// The Python module itself, megagpt2._C, says only what it was built from, so that a build that is out of date is seen:
//     TORCH     the version of torch whose headers were used
//     SOURCES   a hash of csrc/ (setup.py, megagpt2/kernels/extension.py)
#include <Python.h>

#include <torch/library.h>

#include "dropout/dropout.h"
#include "philox/philox_cpu.h"

#define MEGAGPT2_TEXT(x) #x
#define MEGAGPT2_TEXT_OF(x) MEGAGPT2_TEXT(x)

TORCH_LIBRARY(megagpt2, m) {
  m.def("random_bits(int key0, int key1, Tensor samples, SymInt start, SymInt count) -> Tensor");
  m.def("dropout(Tensor x, Tensor samples, int key0, int key1, float probability, SymInt start) -> Tensor");
}

TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("random_bits", &megagpt2::random_bits_cpu);
  m.impl("dropout", &megagpt2::dropout_cpu);
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "megagpt2._C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "TORCH", MEGAGPT2_TEXT_OF(MEGAGPT2_TORCH)) < 0 ||
      PyModule_AddStringConstant(module, "SOURCES", MEGAGPT2_TEXT_OF(MEGAGPT2_SOURCES)) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
