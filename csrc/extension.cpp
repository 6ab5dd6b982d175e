// The module unicode_fast._C: importing it registers the operators that are
// compiled beside it, and it reports how it was built.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#define UNICODE_FAST_STRING_(x) #x
#define UNICODE_FAST_STRING(x) UNICODE_FAST_STRING_(x)

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " UNICODE_FAST_STRING(_MSC_VER);
#else
  return "unknown";
#endif
}

pybind11::dict build() {
  pybind11::dict facts;
  facts["torch"] = TORCH_VERSION;
  facts["compiler"] = compiler();
#ifdef UNICODE_FAST_CUDA_VERSION
  facts["cuda"] = UNICODE_FAST_STRING(UNICODE_FAST_CUDA_VERSION);
#else
  facts["cuda"] = pybind11::none();
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of unicode_fast.";
  module.def("build", &build, "torch, compiler and CUDA versions of this build.");
}
