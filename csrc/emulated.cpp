// SPDX-License-Identifier: Apache-2.0
// The CUDA operators as CPU operators, for tests (emulate.h).
#define TOKENOPS_EMULATE 1

#include "matching/match_cuda.cu"
#include "matching/select_cuda.cu"
#include "merging/invert_cuda.cu"
#include "merging/merging_cuda.cu"
#include "sort.cu"

extern "C" __attribute__((visibility("default"))) int64_t tokenops_emulated_launches() {
  return tokenops::emulate::launches();
}
