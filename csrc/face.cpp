// The Python face of the library: how it was compiled. Facts only, never tensors; the package works without it.
// No dates and no paths, so that one source gives one file.
#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

namespace py = pybind11;

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build() {
  py::dict facts;
  facts["compiler"] = compiler();
  facts["flags"] = DIN_FAST_FLAGS;
  facts["torch_headers"] = TORCH_VERSION;
  facts["torch_target_version"] = static_cast<unsigned long long>(TORCH_TARGET_VERSION);
  facts["cuda"] = "none";
  return facts;
}

}  // namespace

PYBIND11_MODULE(_face, m) {
  m.doc() = "How the kernel library was compiled.";
  m.def("build", &build, "Facts about the build: compiler, flags, torch_headers, torch_target_version, cuda.");
}
