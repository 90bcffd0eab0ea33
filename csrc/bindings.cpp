// The Python module megagpt2._C. Importing it registers the operators with torch, as megagpt2::NAME: each does so at the
// end of its own file. Their fake implementations and gradients are registered in Python, in megagpt2/kernels/NAME.py.
//
// The module itself says only what it was built from, so that a build that is out of date is seen:
//     SOURCES   a hash of csrc/ (setup.py, megagpt2/kernels/extension.py)
//     CUDA      the architectures of the operators for CUDA devices, "sm_80-sm_90-compute_90", or nothing
//
// Only stable interfaces are used, Python's limited one (from 3.11) and torch's (from 2.11): a build serves later ones.
#include <Python.h>

#define MEGAGPT2_TEXT(x) #x
#define MEGAGPT2_TEXT_OF(x) MEGAGPT2_TEXT(x)

#ifndef MEGAGPT2_CUDA
#define MEGAGPT2_CUDA
#endif

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "megagpt2._C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "SOURCES", MEGAGPT2_TEXT_OF(MEGAGPT2_SOURCES)) < 0 ||
      PyModule_AddStringConstant(module, "CUDA", MEGAGPT2_TEXT_OF(MEGAGPT2_CUDA)) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
