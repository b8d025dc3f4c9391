// SPDX-License-Identifier: Apache-2.0
// What the matching operators of every device make of their arguments.
#pragma once

#include <optional>

#include "../tensors.h"

namespace tokenops::matching {

inline void check_metric(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 || t.dim() == 4, op, ": expected [B, N, D] or [B, H, N, D]");
  STD_TORCH_CHECK(t.dim() == 3 || t.size(1) > 0, op, ": expected at least one head");
  // Places of columns count in float32: 2^24 vectors of at least four.
  STD_TORCH_CHECK(t.size(t.dim() - 2) <= int64_t{1} << 26, op, ": expected at most 2^26 tokens");
}

inline bool is_cosine(const char* op, const Text& similarity) {
  STD_TORCH_CHECK(similarity == "cosine" || similarity == "dot", op,
                  ": expected similarity cosine or dot, got ", similarity);
  return similarity == "cosine";
}

// A split must be two lists or none, and its numbers in their range.
inline void check_split(const char* op, const std::optional<Tensor>& source_index,
                        const std::optional<Tensor>& destination_index, int64_t stride,
                        int64_t grid_width, int64_t cell_height) {
  STD_TORCH_CHECK(source_index.has_value() || !destination_index.has_value(), op,
                  ": source_index must be given where destination_index is, got None");
  STD_TORCH_CHECK(destination_index.has_value() || !source_index.has_value(), op,
                  ": destination_index must be given where source_index is, got None");
  STD_TORCH_CHECK(stride >= 1 && cell_height >= 1 && grid_width >= 0, op,
                  ": stride and cell_height must be >= 1 and grid_width >= 0, got ", stride, ", ",
                  cell_height, " and ", grid_width);
}

// How similar pairs have to be, a number for each image, if there is such a tensor.
inline void check_thresholds(const char* op, const std::optional<Tensor>& t, int64_t batch) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == batch, op, ": expected thresholds [", batch, "]");
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double,
                  op, ": expected thresholds of dtype float32 or float64, got ", t->scalar_type());
}

// Tokens that are to merge away: one is left, whatever was asked for.
inline int64_t mergeable(int64_t tokens, int64_t r) {
  const int64_t most = tokens > 0 ? tokens - 1 : 0;
  return r < 0 ? 0 : r > most ? most : r;
}

// The tokens behind a prefix as rows, and the cells that have a destination each. A width of 0
// stands for a split that is no grid.
struct Grid {
  int64_t width, cell_height, cell_width;
  int64_t rows, columns;  // of whole cells; none where a cell exceeds the image

  Grid() = default;
  Grid(const char* op, int64_t tokens, int64_t width, int64_t cell_height, int64_t cell_width,
       const std::optional<Tensor>& cell)
      : width(width), cell_height(cell_height), cell_width(cell_width), rows(0), columns(0) {
    if (width == 0) return;
    rows = tokens / width / cell_height;
    columns = width / cell_width;
    STD_TORCH_CHECK(!cell.has_value() || cell->size(cell->dim() - 1) == rows * columns, op,
                    ": cell must have an entry for each of ", rows * columns, " cells");
  }
  TOKENOPS_HOST_DEVICE int64_t cells() const { return rows * columns; }
  // Token of a cell's destination, whose place in the cell is clamped.
  int64_t destination(int64_t row, int64_t column, int64_t place) const {
    const int64_t most = cell_height * cell_width - 1;
    place = place < 0 ? 0 : place > most ? most : place;
    return (row * cell_height + place / cell_width) * width + column * cell_width +
           place % cell_width;
  }
};

}  // namespace tokenops::matching
