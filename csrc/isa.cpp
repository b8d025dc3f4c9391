// SPDX-License-Identifier: Apache-2.0
// tokenops_cpu_isa, which Python looks up by name: some operators' kernels step aside at some
// levels.
#include "common.h"

extern "C" __attribute__((visibility("default"))) const char* tokenops_cpu_isa() {
  return tokenops::kIsaNames[static_cast<int>(tokenops::isa())];
}
