// SPDX-License-Identifier: Apache-2.0
// Sizes of the register tiles that multiply matrices on the CPU (tile_kernels.h).
#pragma once

#include "common.h"

namespace tokenops {

constexpr int kTile = 6;  // rows of a register tile

// The words of a packed row of `width` words: whole vectors of any instruction set.
inline int64_t row_words(int64_t width) { return (width + 15) / 16 * 16; }

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace tokenops
