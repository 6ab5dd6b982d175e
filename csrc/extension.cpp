// The module unicode_fast._C. The library holds the compiled sources of cpu/ and cuda/; their operators register
// themselves with torch on import. The module itself holds no operator and reports how it was built.
//
// setup.py always defines UNICODE_FAST_TORCH. With CUDA it also defines UNICODE_FAST_CUDA and
// UNICODE_FAST_ARCHITECTURES.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"

#ifdef UNICODE_FAST_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::object cuda() {
#ifdef UNICODE_FAST_CUDA
  return py::str(std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10));
#else
  return py::none();
#endif
}

py::object architectures() {
#ifdef UNICODE_FAST_ARCHITECTURES
  return py::str(UNICODE_FAST_ARCHITECTURES);
#else
  return py::none();
#endif
}

py::dict build_info() {
  py::dict info;
  info["torch"] = UNICODE_FAST_TORCH;
  info["compiler"] = compiler();
  info["cpu"] = unicode_fast::cpu::kernels().name;
  info["cuda"] = cuda();
  info["architectures"] = architectures();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled operators of unicode_fast.";
  module.def("build_info", &build_info,
             "How this module was built: torch (version), compiler, cuda (toolkit's version or None), architectures "
             "(TORCH_CUDA_ARCH_LIST or None); and cpu, the instruction set that its CPU operators use here.");
}
