// SPDX-License-Identifier: Apache-2.0
// The sides of a grid as lists, for the kernels that take lists.
#include "select_cuda.cuh"

#include "select_op.cuh"

namespace tokenops::matching {
namespace {

using cuda::Target;

constexpr int kListThreads = 256;
constexpr int64_t kListBytes = (kMostThreads / cuda::kWarpSize + 1) * sizeof(int);

// Both sides in ascending order. A block for a row of cells of an image, and one for the tokens
// below the last row; `cell` has no data where destinations stand at the top left.
__global__ void __launch_bounds__(kListThreads)
    list_grid(Grid grid, IndexList cell, int32_t tokens, int32_t prefix, int32_t* source,
              int32_t* destination) {
  const int bands = static_cast<int>(grid.rows) + 1;
  const int64_t image = blockIdx.x / bands;
  const int band = blockIdx.x % bands;
  const int cells = static_cast<int>(grid.cells()), width = static_cast<int>(grid.width);
  const int height = static_cast<int>(grid.cell_height), step = static_cast<int>(grid.cell_width);
  const int columns = band < grid.rows ? static_cast<int>(grid.columns) : 0;
  const int begin =
      band < grid.rows ? band * height * width : static_cast<int>(grid.rows) * height * width;
  const int count = band < grid.rows ? height * width : tokens - prefix - begin;
  const int before = band * static_cast<int>(grid.columns);  // destinations
  int* const sums = reinterpret_cast<int*>(cuda::shared_memory());
  const IndexList places = cell.row(image);
  const auto is_destination = [&](int i) {
    const int y = i / width, x = i % width, column = x / step;
    if (column >= columns) return false;
    const int32_t place = cell.data == nullptr ? 0 : places.at(before + column, height * step);
    return y * step + x % step == place;
  };
  int32_t* const sources = source + image * (tokens - prefix - cells);
  int32_t* const destinations = destination + image * cells;
  const Share share(count);
  int mine = 0, total;
  for (int i = share.begin; i < share.end; ++i) mine += is_destination(i);
  int at = before + cuda::exclusive_sum(mine, sums, &total);
  for (int i = share.begin; i < share.end; ++i) {
    if (is_destination(i)) {
      destinations[at++] = prefix + begin + i;
    } else {
      sources[begin + i - at] = prefix + begin + i;
    }
  }
}

const cuda::Reported reported_grid("list_grid", list_grid, kListThreads, kListBytes);

}  // namespace

Lists make_lists(const Target& target, const char* op, int64_t batch, int64_t tokens,
                 int64_t num_prefix, const std::optional<Tensor>& source_index,
                 const std::optional<Tensor>& destination_index, int64_t stride, int64_t grid_width,
                 int64_t cell_height, const std::optional<Tensor>& cell) {
  check_split(op, source_index, destination_index, stride, grid_width, cell_height);
  if (source_index || grid_width == 0) return {source_index, destination_index};
  check_tokens(op, tokens);
  const int64_t prefix = num_prefix < 0 ? 0 : num_prefix > tokens ? tokens : num_prefix;
  const Grid grid(op, tokens - prefix, grid_width, cell_height, stride, cell);
  target.expect("cell", cell);
  const IndexList places = cell ? index_list(op, "cell", *cell, batch) : IndexList{};
  const int64_t images = places.batch_stride != 0 ? batch : 1;
  const Tensor source = target.empty({images, tokens - prefix - grid.cells()}, ScalarType::Int);
  const Tensor destination = target.empty({images, grid.cells()}, ScalarType::Int);
  target.launch(list_grid, {images * (grid.rows + 1), kListThreads, kListBytes}, grid, places,
                static_cast<int32_t>(tokens), static_cast<int32_t>(prefix),
                static_cast<int32_t*>(source.mutable_data_ptr()),
                static_cast<int32_t*>(destination.mutable_data_ptr()));
  return {source, destination};
}

}  // namespace tokenops::matching
