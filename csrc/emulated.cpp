// SPDX-License-Identifier: Apache-2.0
// The CUDA operators as CPU operators, for tests: see emulate.h.
#define TOKENOPS_EMULATE 1

#include "merging/map_cuda.cu"
#include "sort.cu"
