// SPDX-License-Identifier: Apache-2.0
#include "attributes.h"

#include "cuda.cuh"

extern "C" __attribute__((visibility("default"))) const char* tokenops_list_kernels(
    void (*report)(void* context, const TokenopsKernel*), void* context) {
  for (const tokenops::cuda::Reported* one = tokenops::cuda::Reported::first(); one != nullptr;
       one = one->next) {
    TokenopsKernel kernel = {one->name, one->threads, one->shared_bytes, 0, 0, 0};
    cudaFuncAttributes attributes;
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, one->function);
    if (error == cudaSuccess && kernel.shared_bytes > 48 << 10) {  // as launches set it
      error =
          cudaFuncSetAttribute(one->function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error == cudaSuccess) {
      kernel.registers = attributes.numRegs;
      kernel.local_bytes = static_cast<int64_t>(attributes.localSizeBytes);
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&kernel.blocks, one->function,
                                                            kernel.threads, kernel.shared_bytes);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();  // clears the error, which the next launch would report again
      return cudaGetErrorString(error);
    }
    report(context, &kernel);
  }
  return nullptr;
}
