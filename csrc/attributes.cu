// SPDX-License-Identifier: Apache-2.0
#include "attributes.h"

#include "cuda.cuh"

extern "C" __attribute__((visibility("default"))) const char* tokenops_list_kernels(
    void (*report)(void* context, const TokenopsKernel*), void* context) {
  for (const tokenops::cuda::Listed* listed = tokenops::cuda::Listed::first(); listed != nullptr;
       listed = listed->next) {
    TokenopsKernel kernel = {listed->name, listed->threads, listed->shared_bytes, 0, 0, 0};
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, listed->function);
    if (error == cudaSuccess && kernel.shared_bytes > 48 << 10) {
      error = cudaFuncSetAttribute(listed->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kernel.shared_bytes));
    }
    if (error == cudaSuccess) {
      kernel.registers = attributes.numRegs;
      kernel.local_bytes = static_cast<int64_t>(attributes.localSizeBytes);
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&kernel.blocks, listed->function,
                                                            kernel.threads, kernel.shared_bytes);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is told here, and must not meet the next launch
      return cudaGetErrorString(error);
    }
    report(context, &kernel);
  }
  return nullptr;
}
