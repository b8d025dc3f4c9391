// SPDX-License-Identifier: Apache-2.0
// tokenops_list_kernels reports the resources of the library's CUDA kernels. inspect.cpp, which is
// another library, looks it up by name.
#pragma once

#include <cstdint>

extern "C" {

struct TokenopsKernel {
  const char* name;
  int threads;           // per block
  int64_t shared_bytes;  // per block; for a usual shape, if it depends on shapes
  int registers;         // per thread
  int64_t local_bytes;   // per thread: stack and spilled registers
  int blocks;            // per multiprocessor at a time
};

// Call `report` for each Reported kernel (cuda.cuh), as compiled for the current device. Returns
// null or an error message.
typedef const char* (*TokenopsListKernels)(void (*report)(void* context, const TokenopsKernel*),
                                           void* context);
}
