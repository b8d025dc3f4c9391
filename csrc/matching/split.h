// SPDX-License-Identifier: Apache-2.0
// Lists the sources and destinations of a grid, for kernels that take lists.
#pragma once

#include "arguments.h"
#include "team.h"

namespace tokenops::matching {

// The tokens after the prefix are rows of `width`. Each whole cell has one destination, all other
// tokens are sources. Both lists are ascending.
struct Grid {
  int32_t tokens, prefix;
  int32_t width, cell_height, cell_width;
  int32_t rows, columns;  // of whole cells
  View cell;              // offset of each destination in its cell; without data, 0
  int32_t *src, *dst;     // [num_src], [num_dst] of each image

  TOKENOPS_HOST_DEVICE int32_t num_dst() const { return rows * columns; }
  TOKENOPS_HOST_DEVICE int32_t num_src() const { return tokens - prefix - num_dst(); }
  // A band is a row of cells; the last band is the tokens below all cells.
  TOKENOPS_HOST_DEVICE int32_t bands() const { return rows + 1; }

  // List the tokens of one band of an image.
  template <class Team>
  TOKENOPS_TEAM void list(const Team& team, int64_t image, int32_t band) const {
    const int32_t begin = band * cell_height * width, dst_before = band * columns;
    const int32_t columns_here = band < rows ? columns : 0;
    const int32_t count = band < rows ? cell_height * width : tokens - prefix - begin;
    const View offsets = cell.image(image);
    int32_t* const to_src = src + image * num_src() + begin - dst_before;
    int32_t* const to_dst = dst + image * num_dst() + dst_before;
    team.scan(
        count,
        [&](int i) {
          const int32_t y = i / width, x = i % width, column = x / cell_width;
          if (column >= columns_here) return 0;
          const int32_t offset = cell.data == nullptr
                                     ? 0
                                     : offsets.index(dst_before + column, cell_height * cell_width);
          return static_cast<int>(y * cell_width + x % cell_width == offset);
        },
        [&](int i, int is_dst, int before) {
          (is_dst ? to_dst[before] : to_src[i - before]) = prefix + begin + i;
        });
  }
};

// Check a split, and replace a grid by lists on the device of `like`. list(grid, images) has to
// call grid.list for all bands of all images.
template <class List>
void make_lists(const char* op, const Tensor& like, int64_t batch, int64_t tokens, SplitArgs& split,
                const List& list) {
  check_count(op, "tokens", tokens);
  STD_TORCH_CHECK(split.src_index || !split.dst_index, op,
                  ": src_index must be given where dst_index is, got None");
  STD_TORCH_CHECK(split.dst_index || !split.src_index, op,
                  ": dst_index must be given where src_index is, got None");
  STD_TORCH_CHECK(split.stride >= 1 && split.cell_height >= 1 && split.grid_width >= 0, op,
                  ": stride and cell_height must be >= 1 and grid_width >= 0, got ", split.stride,
                  ", ", split.cell_height, " and ", split.grid_width);
  if (split.src_index || split.grid_width == 0) return;
  constexpr int64_t kMost = int64_t{1} << 30;  // no image has more tokens
  Grid grid = {};
  grid.tokens = static_cast<int32_t>(tokens);
  grid.prefix = clamp(split.num_prefix, 0, tokens);
  grid.width = clamp(split.grid_width, 1, kMost);
  grid.cell_height = clamp(split.cell_height, 1, kMost);
  grid.cell_width = clamp(split.stride, 1, kMost);
  grid.rows = (grid.tokens - grid.prefix) / grid.width / grid.cell_height;
  grid.columns = grid.rows > 0 ? grid.width / grid.cell_width : 0;
  grid.cell = make_list(op, "cell", split.cell, batch, grid.num_dst());
  const int64_t images = grid.cell.batch_bytes != 0 ? batch : 1;  // 1: all images share the lists
  split.src_index = empty({images, grid.num_src()}, ScalarType::Int, like);
  split.dst_index = empty({images, grid.num_dst()}, ScalarType::Int, like);
  grid.src = static_cast<int32_t*>(split.src_index->mutable_data_ptr());
  grid.dst = static_cast<int32_t*>(split.dst_index->mutable_data_ptr());
  list(grid, images);
}

}  // namespace tokenops::matching
