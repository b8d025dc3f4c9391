// SPDX-License-Identifier: Apache-2.0
// Sizes of the register tiles that multiply matrices.
#pragma once

#include "common.h"

namespace tokenops {

constexpr int kTile = 6;  // rows in a register tile

// Words between packed rows that are read as vectors: whole ones of any instruction set.
inline int64_t row_words(int64_t width) { return (width + 15) / 16 * 16; }

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace tokenops
