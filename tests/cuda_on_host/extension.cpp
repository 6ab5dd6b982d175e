// The module unicode_fast._C of a package whose CUDA kernels run on the host; see build.py.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = UNICODE_FAST_TORCH;
    info["compiler"] = __VERSION__;
    info["cpu"] = "emulated";
    info["cuda"] = pybind11::none();
    info["architectures"] = pybind11::none();
    return info;
  });
}
