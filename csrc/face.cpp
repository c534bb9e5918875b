// The Python face of the library: how it was compiled and what this processor has. Facts only, never tensors;
// the package works without it. No dates and no paths, so that one source gives one file.
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

// The extensions that the kernels' builds need; empty on another architecture than x86.
py::dict processor() {
  py::dict has;
#if defined(__x86_64__)
  __builtin_cpu_init();
  has["avx2"] = __builtin_cpu_supports("avx2") != 0;
  has["fma"] = __builtin_cpu_supports("fma") != 0;
  has["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  has["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  has["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  has["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
#endif
  return has;
}

}  // namespace

PYBIND11_MODULE(_face, m) {
  m.doc() = "How the kernel library was compiled, and what this processor has.";
  m.def("build", &build, "Facts about the build: compiler, flags, torch_headers, torch_target_version, cuda.");
  m.def("processor", &processor, "Which x86 extensions this processor has; empty elsewhere.");
}
