// SPDX-License-Identifier: Apache-2.0
// tokenops_cpu_isa returns the name of the instruction set that the CPU kernels use. Python looks
// it up by name: with some sets, some operators are faster in plain PyTorch.
#include "common.h"

extern "C" __attribute__((visibility("default"))) const char* tokenops_cpu_isa() {
  return tokenops::kIsaNames[static_cast<int>(tokenops::isa())];
}
