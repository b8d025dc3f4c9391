// SPDX-License-Identifier: Apache-2.0
// Python module with information on the build, the CPU and the CUDA kernels. pybind11 ties it to
// one version of Python, so it is apart from the operators' library, which works with any version.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <string>

#include "attributes.h"
#include "simd.h"

namespace py = pybind11;

namespace {

std::string dotted(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["flags"] = TOKENOPS_FLAGS;
  info["torch"] = dotted(TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR);
  info["torch_target"] = dotted(static_cast<int>(TORCH_TARGET_VERSION >> 56),
                                static_cast<int>(TORCH_TARGET_VERSION >> 48 & 0xff));
  info["python"] = dotted(PY_MAJOR_VERSION, PY_MINOR_VERSION);
  info["pybind11"] = dotted(PYBIND11_VERSION_MAJOR, PYBIND11_VERSION_MINOR);
  return info;
}

py::dict cpu_features() {
  py::dict features;
#if TOKENOPS_X86
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["f16c"] = __builtin_cpu_supports("f16c") != 0;
  features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  features["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  features["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  features["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  features["avx512_bf16"] = __builtin_cpu_supports("avx512bf16") != 0;
  features["amx_tile"] = __builtin_cpu_supports("amx-tile") != 0;
  features["amx_bf16"] = __builtin_cpu_supports("amx-bf16") != 0;
#endif
  return features;
}

py::list cuda_kernels(const std::string& library) {
  py::list kernels;
  void* const loaded = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  void* const symbol = loaded != nullptr ? dlsym(loaded, "tokenops_list_kernels") : nullptr;
  const auto list_kernels = reinterpret_cast<TokenopsListKernels>(symbol);
  if (list_kernels == nullptr) return kernels;  // compiled without CUDA
  const auto report = [](void* context, const TokenopsKernel* kernel) {
    py::dict entry;
    entry["name"] = kernel->name;
    entry["threads"] = kernel->threads;
    entry["shared_bytes"] = kernel->shared_bytes;
    entry["registers"] = kernel->registers;
    entry["local_bytes"] = kernel->local_bytes;
    entry["blocks"] = kernel->blocks;
    static_cast<py::list*>(context)->append(entry);
  };
  const char* const error = list_kernels(report, &kernels);
  if (error != nullptr) throw std::runtime_error(error);
  return kernels;
}

}  // namespace

PYBIND11_MODULE(_inspect, module) {
  module.doc() = "How tokenops was compiled, and the vector extensions of this CPU.";
  module.def("build_info", &build_info, "Compiler, flags and versions of this build.");
  module.def("cpu_features", &cpu_features,
             "Whether this CPU and its system have each vector extension.");
  module.def(
      "cuda_kernels", &cuda_kernels, py::arg("library"),
      "Registers, shared memory and blocks per multiprocessor, on the current device, of each "
      "CUDA kernel in the library at this path, which must be loaded.");
}
