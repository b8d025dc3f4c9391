// SPDX-License-Identifier: Apache-2.0
// What the operators' library tells about its CUDA kernels: tokenops_list_kernels, which is looked
// up by name, since the module that asks is another library.
#pragma once

#include <cstdint>

extern "C" {

struct TokenopsKernel {
  const char* name;
  int threads;           // of a block
  int64_t shared_bytes;  // of a block, for a usual shape where that depends on shapes
  int registers;         // of a thread
  int64_t local_bytes;   // of a thread: stack and spilled registers
  int blocks;            // that a multiprocessor runs at a time
};

// Call `report` for the kernels that matter most, as they are compiled for the current device;
// returns null, or what is wrong.
typedef const char* (*TokenopsListKernels)(void (*report)(void* context, const TokenopsKernel*),
                                           void* context);
}
