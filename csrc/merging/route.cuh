// SPDX-License-Identifier: Apache-2.0
// The inverse of token maps on CUDA devices; in map_cuda.cu.
#pragma once

#include "../cuda.cuh"
#include "route.h"

namespace tokenops {

// Write offsets [B, M + 1] and members [B, N] of a route, and its outputs [B, N] where `composed`
// is not null.
void invert_route(const cuda::Target& target, int64_t batch, const Route& route, int32_t* composed,
                  int32_t* offsets, int32_t* members);

}  // namespace tokenops
