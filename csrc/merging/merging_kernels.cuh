// SPDX-License-Identifier: Apache-2.0
// Kernels of merging on CUDA. A block makes a tile of the result: some rows of one image by some
// packs of channels. What the tile needs of the token map it puts into shared memory; then its
// threads take the tile's packs, every kThreads-th one each, with several on their way at once.
#pragma once

#include "../cuda.cuh"
#include "merging.h"

namespace tokenops::merging {

using cuda::Pack;

constexpr int kThreads = 256;
constexpr int kAhead = 4;      // packs that a thread asks for before it uses the first of them
constexpr int kStaged = 1024;  // members of a tile that shared memory has room for
constexpr int kLong = 32;      // a row of more members is summed by the whole block
constexpr int kTensors = 8;    // most tensors of one launch

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));
// Blocks of a multiprocessor that registers are limited for.
template <class T>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 3 : 4;

// ---- tiles ----

// How rows [B, rows, packs] are cut into tiles, one for each block.
struct Tiling {
  int batch, rows, packs;
  int tile_rows, tile_packs;
  int row_tiles, column_tiles;

  int64_t blocks() const { return int64_t{batch} * row_tiles * column_tiles; }
};

struct Tile {
  int64_t image;
  int row, rows;  // the first one, and how many there are
  int pack, packs;

  // Images one after the other.
  static __device__ __forceinline__ Tile in_order(const Tiling& all, unsigned block) {
    const int by_column = static_cast<int>(block / all.column_tiles);
    return at(all, by_column / all.row_tiles, by_column % all.row_tiles, block % all.column_tiles);
  }
  // The last rows of all images first: there the one token is that takes all pruned ones, and what
  // takes longest should not begin last.
  static __device__ __forceinline__ Tile last_rows_first(const Tiling& all, unsigned block) {
    const int by_column = static_cast<int>(block / all.column_tiles);
    return at(all, by_column % all.batch, all.row_tiles - 1 - by_column / all.batch,
              block % all.column_tiles);
  }

 private:
  static __device__ __forceinline__ Tile at(const Tiling& all, int image, int row_tile,
                                            int column_tile) {
    const int row = row_tile * all.tile_rows, pack = column_tile * all.tile_packs;
    const int rows = all.rows - row, packs = all.packs - pack;
    return {image, row, rows < all.tile_rows ? rows : all.tile_rows, pack,
            packs < all.tile_packs ? packs : all.tile_packs};
  }
};

// The packs of a tile that a thread takes, from row to row, without a division for each.
struct Walk {
  int row, pack, columns, step_rows, step_packs;

  explicit __device__ __forceinline__ Walk(int columns)
      : row(static_cast<int>(threadIdx.x) / columns),
        pack(static_cast<int>(threadIdx.x) % columns),
        columns(columns),
        step_rows(kThreads / columns),
        step_packs(kThreads % columns) {}

  __device__ __forceinline__ void step() {
    row += step_rows, pack += step_packs;
    if (pack >= columns) pack -= columns, ++row;
  }
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* at) {
  return *reinterpret_cast<const Pack<T, V>*>(at);
}
template <class T, int V>
__device__ __forceinline__ void store(T* at, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(at) = pack;
}
// V values at an address aligned as a pack of V shorter ones is.
template <class A, int V>
__device__ __forceinline__ void store_wide(A* at, const A (&values)[V]) {
  constexpr int W = V * sizeof(A) > 16 ? 16 / static_cast<int>(sizeof(A)) : V;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; i += W) {
    Pack<A, W> pack;
    TOKENOPS_UNROLL
    for (int k = 0; k < W; ++k) pack.item[k] = values[i + k];
    store<A, W>(at + i, pack);
  }
}
template <class A, int V>
__device__ __forceinline__ void load_wide(const A* at, A (&values)[V]) {
  constexpr int W = V * sizeof(A) > 16 ? 16 / static_cast<int>(sizeof(A)) : V;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; i += W) {
    const Pack<A, W> pack = load<A, W>(at + i);
    TOKENOPS_UNROLL
    for (int k = 0; k < W; ++k) values[i + k] = pack.item[k];
  }
}
template <class T, int V>
__device__ __forceinline__ Pack<T, V> zero_pack() {
  Pack<T, V> zero;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) zero.item[i] = static_cast<T>(0.f);
  return zero;
}

// ---- what the rows of a tile are made of ----

// What an accumulated row is multiplied with or divided by. A reciprocal replaces a division where
// the result is rounded to a shorter type anyway, unless it could overflow.
template <class T>
struct Factor {
  using A = acc_t<T>;
  A value;
  bool divides;

  static __device__ __forceinline__ Factor over(A total) {
    if (total == 1) return {1, false};
    const A size = total < 0 ? -total : total;
    if (sizeof(T) < sizeof(A) && size > A(1e-30) && size < A(1e30)) return {1 / total, false};
    return {total, true};
  }
  __device__ __forceinline__ A on(A x) const { return divides ? x / value : x * value; }
};

template <class T>
struct alignas(16) MergedRow {
  Factor<T> factor;
  int begin, count;  // of its entries of `members`
};

// The members of a tile's rows, with their weights; in shared memory as far as they fit.
template <class A>
struct Listed {
  const int32_t* members;  // [N], of the image, as are the weights
  const A* weight;         // [N] or null
  int32_t* tokens;         // shared [kStaged]
  A* weights;              // shared [kStaged]
  int inputs, begin, staged;

  // Put those in shared memory that rows [row, row + rows) have.
  __device__ __forceinline__ void stage(const Map& map, int64_t image, int row, int rows) {
    members = map.members + image * map.inputs;
    inputs = static_cast<int>(map.inputs);
    const Members last = map.members_of(image, row + rows - 1);
    begin = static_cast<int>(map.members_of(image, row).index - members);
    staged = static_cast<int>(last.index + last.count - members) - begin;
    staged = staged > kStaged ? kStaged : staged;  // below zero if offsets are no offsets
    for (int i = threadIdx.x; i < staged; i += kThreads) {
      tokens[i] = read(begin + i);
      if (weight != nullptr) weights[i] = weight[tokens[i]];
    }
  }
  // The token at a place of `members`; wild ones are taken for the nearest that is there.
  __device__ __forceinline__ int token(int at) const {
    const int i = at - begin;
    return i >= 0 && i < staged ? tokens[i] : read(at);
  }
  __device__ __forceinline__ A weight_at(int at) const {
    if (weight == nullptr) return 1;
    const int i = at - begin;
    return i >= 0 && i < staged ? weights[i] : weight[read(at)];
  }

 private:
  __device__ __forceinline__ int read(int at) const {
    const int n = members[at];
    return n < 0 ? 0 : n < inputs ? n : inputs - 1;
  }
};

// ---- merge ----

template <class T>
struct MergePart {
  Tiling tiling;
  Rows<const T> x;  // [B, N, C]
  T* out;           // [B, M, C]
  unsigned end;     // block after its last one
};

template <class T>
struct MergeParts {
  Map map;
  const acc_t<T>* weight;  // [B, N] or null
  const acc_t<T>* scale;   // [B, M] or null
  acc_t<T>* total;         // [B, M] or null: receives what the average divides by
  acc_t<T> sign;           // -1 makes a maximum a minimum
  bool average;            // divide by the sum of the weights, without them by the count
  int count;
  MergePart<T> part[kTensors];
};

// Bytes of shared memory for tiles of so many rows.
template <class T, int V>
int64_t merge_shared_bytes(int tile_rows) {
  return static_cast<int64_t>(sizeof(acc_t<T>)) * (kThreads * (V + 1) + kStaged) +
         static_cast<int64_t>(sizeof(MergedRow<T>)) * tile_rows +
         static_cast<int64_t>(sizeof(int32_t)) * kStaged;
}

// One member more; NaN stays NaN. Minima are maxima of negated values.
template <Fold F, class A>
__device__ __forceinline__ A folded(A acc, A value) {
  if (F == Fold::prod) return acc * value;
  if (F == Fold::amax) return value > acc || value != value ? value : acc;
  return acc + value;
}

template <Fold F, class A>
__device__ __forceinline__ A fold_start() {
  return F == Fold::prod ? A(1) : F == Fold::amax ? -A(__builtin_inff()) : A(0);
}

// The factor on a member.
template <Fold F, class A>
__device__ __forceinline__ A member_factor(const Listed<A>& listed, int at, A sign) {
  return F == Fold::sum ? listed.weight_at(at) : F == Fold::amax ? sign : A(1);
}

// How a row ends whose weights sum up to `total`.
template <class T>
__device__ __forceinline__ void end_average(MergedRow<T>& row, acc_t<T> total) {
  row.factor = Factor<T>::over(total);
  if (total == 0) row.count = 0;
}

// A row of many members: each of as many slices as there are threads for sums up every so-many-th
// of them, then the slices are summed up in pairs.
template <Fold F, class T, int V>
__device__ __forceinline__ void merge_long_row(const MergeParts<T>& args, const Tile& tile,
                                               const Listed<acc_t<T>>& listed, MergedRow<T> row,
                                               const Walk& start, const T* x, int64_t row_stride,
                                               T* out, acc_t<T>* total, acc_t<T>* partial,
                                               acc_t<T>* partial_weight) {
  using A = acc_t<T>;
  const int slices = start.step_rows, slice = start.row;
  const bool live = start.pack < tile.packs;
  A acc[V], weights = 0;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) acc[i] = fold_start<F, A>();
  for (int j = slice; slice < slices && j < row.count; j += kAhead * slices) {
    Pack<T, V> member[kAhead];
    A factor[kAhead];
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (j + k * slices >= row.count) continue;
      const int at = row.begin + j + k * slices;
      if (live) member[k] = load<T, V>(x + listed.token(at) * row_stride);
      factor[k] = member_factor<F>(listed, at, args.sign);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (j + k * slices >= row.count) continue;
      weights += factor[k];
      if (!live) continue;
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) {
        acc[i] = folded<F>(acc[i], static_cast<A>(member[k].item[i]) * factor[k]);
      }
    }
  }
  A* const own = partial + static_cast<int>(threadIdx.x) * V;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) own[i] = acc[i];
  partial_weight[threadIdx.x] = weights;
  int half = 1;
  while (2 * half < slices) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (slice >= half || slice + half >= slices) continue;
    const int other = half * start.columns;
    TOKENOPS_UNROLL
    for (int i = 0; i < V; ++i) own[i] = folded<F>(own[i], own[other * V + i]);
    partial_weight[threadIdx.x] += partial_weight[threadIdx.x + other];
  }
  if (slice == 0) {
    if (args.average && args.weight != nullptr) {
      end_average(row, partial_weight[threadIdx.x]);
      if (total != nullptr && start.pack == 0) *total = partial_weight[threadIdx.x];
    }
    if (live) {
      Pack<T, V> result = zero_pack<T, V>();
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) {
        if (row.count > 0) result.item[i] = static_cast<T>(row.factor.on(own[i]));
      }
      store<T, V>(out, result);
    }
  }
  __syncthreads();  // before others write there again
}

// out[b, m] = fold of x[b, n] over the members n, scaled or averaged; 0 where there are none.
template <Fold F, class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) merge_tiles(const MergeParts<T> args) {
  using A = acc_t<T>;
  int which = 0;
  while (which + 1 < args.count && blockIdx.x >= args.part[which].end) ++which;
  const Tiling tiling = args.part[which].tiling;
  const Rows<const T> input = args.part[which].x;
  const Tile tile =
      Tile::last_rows_first(tiling, blockIdx.x - (which > 0 ? args.part[which - 1].end : 0));

  A* const partial = reinterpret_cast<A*>(cuda::shared_memory());  // [kThreads, V]
  A* const partial_weight = partial + kThreads * V;                // [kThreads]
  A* const weights = partial_weight + kThreads;                    // [kStaged]
  MergedRow<T>* const rows = reinterpret_cast<MergedRow<T>*>(weights + kStaged);
  Listed<A> listed;
  listed.weight = args.weight != nullptr ? args.weight + tile.image * args.map.inputs : nullptr;
  listed.tokens = reinterpret_cast<int32_t*>(rows + tiling.tile_rows);
  listed.weights = weights;
  listed.stage(args.map, tile.image, tile.row, tile.rows);

  const bool weighs = F == Fold::sum && args.average && args.weight != nullptr;
  const int64_t first_row = tile.image * args.map.outputs + tile.row;
  A* const total = args.total != nullptr && tile.pack == 0 ? args.total + first_row : nullptr;
  bool is_long = false;
  for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
    const Members members = args.map.members_of(tile.image, tile.row + r);
    MergedRow<T> row = {{F == Fold::amax ? args.sign : A(1), false},
                        static_cast<int>(members.index - listed.members),
                        static_cast<int>(members.count)};
    if (F == Fold::sum && args.scale != nullptr) row.factor.value = args.scale[first_row + r];
    if (F == Fold::sum && args.average && !weighs) {
      if (total != nullptr) total[r] = static_cast<A>(row.count);
      end_average(row, static_cast<A>(row.count));
    }
    rows[r] = row;
    is_long = is_long || row.count > kLong;
  }
  const bool any_long = __syncthreads_or(is_long);
  if (weighs) {
    for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
      MergedRow<T> row = rows[r];
      if (row.count > kLong) continue;
      A sum = 0;
      for (int j = 0; j < row.count; ++j) sum += listed.weight_at(row.begin + j);
      if (total != nullptr) total[r] = sum;
      // A lone member stays as it is: less than no members stands for one without its weight.
      const bool lone = row.count == 1 && sum - sum == 0;
      end_average(row, sum);
      if (lone && row.count == 1) row.factor = {1, false}, row.count = -1;
      rows[r] = row;
    }
    __syncthreads();
  }

  const Walk start(tiling.tile_packs);
  const int64_t row_stride = input.row_stride;
  const T* const x = input(tile.image, 0) + int64_t{tile.pack} * V;
  const int64_t channels = int64_t{tiling.packs} * V;
  T* const out = args.part[which].out + first_row * channels + int64_t{tile.pack} * V;
  for (Walk walk = start; walk.row < tile.rows;) {
    Pack<T, V> first[kAhead];
    Walk ahead = walk;
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, ahead.step()) {
      if (ahead.row >= tile.rows || ahead.pack >= tile.packs) continue;
      const MergedRow<T> row = rows[ahead.row];
      if (row.count == 0 || row.count > kLong) continue;
      first[k] = load<T, V>(x + listed.token(row.begin) * row_stride + ahead.pack * V);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, walk.step()) {
      if (walk.row >= tile.rows || walk.pack >= tile.packs) continue;
      const MergedRow<T> row = rows[walk.row];
      if (row.count > kLong) continue;
      Pack<T, V> result = zero_pack<T, V>();
      if (row.count != 0) {
        const A factor = row.count < 0 ? A(1) : member_factor<F>(listed, row.begin, args.sign);
        A acc[V];
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) acc[i] = static_cast<A>(first[k].item[i]) * factor;
        const T* const here = x + walk.pack * V;
        for (int j = 1; j < row.count; j += 2) {
          const bool two = j + 1 < row.count;
          const int at = row.begin + j, next = two ? at + 1 : at;
          const Pack<T, V> a = load<T, V>(here + listed.token(at) * row_stride);
          const Pack<T, V> b = load<T, V>(here + listed.token(next) * row_stride);
          const A a_factor = member_factor<F>(listed, at, args.sign);
          const A b_factor = member_factor<F>(listed, next, args.sign);
          TOKENOPS_UNROLL
          for (int i = 0; i < V; ++i) {
            acc[i] = folded<F>(acc[i], static_cast<A>(a.item[i]) * a_factor);
            if (two) acc[i] = folded<F>(acc[i], static_cast<A>(b.item[i]) * b_factor);
          }
        }
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) result.item[i] = static_cast<T>(row.factor.on(acc[i]));
      }
      store<T, V>(out + walk.row * channels + walk.pack * V, result);
    }
  }
  for (int r = 0; any_long && r < tile.rows; ++r) {
    if (rows[r].count <= kLong) continue;
    const int64_t at = int64_t{start.pack} * V;
    merge_long_row<F, T, V>(args, tile, listed, rows[r], start, x + at, row_stride,
                            out + r * channels + at, total != nullptr ? total + r : nullptr,
                            partial, partial_weight);
  }
}

// ---- unmerge ----

template <class T>
struct UnmergePart {
  Tiling tiling;
  Rows<const T> y;         // [B, M, C]
  Rows<const T> residual;  // [B, N, C], or null
  T* out;                  // [B, N, C]
  unsigned end;            // block after its last one
};

template <class T>
struct UnmergeParts {
  Map map;
  const acc_t<T>* weight;  // [B, N] or null
  const acc_t<T>* scale;   // [B, M] or null
  bool mean;               // divide by the number of members
  int count;
  UnmergePart<T> part[kTensors];
};

template <class T>
struct alignas(16) CopiedRow {
  Factor<T> factor;
  int source;  // -1 for dropped tokens
};

// out[b, n] = weight[b, n] * scale[b, a] * y[b, a] + residual[b, n] with a = assign[b, n]; where n
// was dropped, the residual or 0. `mean` divides by the number of members of a.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) unmerge_tiles(const UnmergeParts<T> args) {
  using A = acc_t<T>;
  int which = 0;
  while (which + 1 < args.count && blockIdx.x >= args.part[which].end) ++which;
  const Tiling tiling = args.part[which].tiling;
  const Tile tile = Tile::in_order(tiling, blockIdx.x - (which > 0 ? args.part[which - 1].end : 0));
  const int64_t first_row = tile.image * args.map.inputs + tile.row;
  CopiedRow<T>* const rows = reinterpret_cast<CopiedRow<T>*>(cuda::shared_memory());
  for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
    const int64_t m = args.map.output_of(tile.image, tile.row + r);
    CopiedRow<T> row = {{1, false}, static_cast<int>(m)};
    if (m >= 0) {
      A factor = 1;
      if (args.weight != nullptr) factor = args.weight[first_row + r];
      if (args.scale != nullptr) factor *= args.scale[tile.image * args.map.outputs + m];
      if (args.mean) {
        const int64_t count = args.map.members_of(tile.image, m).count;
        row.factor = Factor<T>::over(static_cast<A>(count > 0 ? count : 1));
      }
      if (factor != 1) row.factor = {row.factor.on(factor), false};
    }
    rows[r] = row;
  }
  __syncthreads();

  const Rows<const T> input = args.part[which].y, added = args.part[which].residual;
  const int64_t first = int64_t{tile.pack} * V, channels = int64_t{tiling.packs} * V;
  const T* const y = input(tile.image, 0) + first;
  const T* const residual = added.data != nullptr ? added(tile.image, tile.row) + first : nullptr;
  T* const out = args.part[which].out + first_row * channels + first;
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows;) {
    Pack<T, V> value[kAhead], more[kAhead];
    Walk ahead = walk;
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, ahead.step()) {
      if (ahead.row >= tile.rows || ahead.pack >= tile.packs) continue;
      const int source = rows[ahead.row].source, at = ahead.pack * V;
      if (source >= 0) value[k] = load<T, V>(y + source * input.row_stride + at);
      if (residual != nullptr) {
        more[k] = load<T, V>(residual + ahead.row * added.row_stride + at);
      }
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, walk.step()) {
      if (walk.row >= tile.rows || walk.pack >= tile.packs) continue;
      const CopiedRow<T> row = rows[walk.row];
      Pack<T, V> result = residual != nullptr ? more[k] : zero_pack<T, V>();
      if (row.source >= 0) {
        if (residual != nullptr) {
          TOKENOPS_UNROLL
          for (int i = 0; i < V; ++i) {
            result.item[i] = static_cast<T>(row.factor.on(static_cast<A>(value[k].item[i])) +
                                            static_cast<A>(more[k].item[i]));
          }
        } else if (row.factor.divides || row.factor.value != 1) {
          TOKENOPS_UNROLL
          for (int i = 0; i < V; ++i) {
            result.item[i] = static_cast<T>(row.factor.on(static_cast<A>(value[k].item[i])));
          }
        } else {
          result = value[k];
        }
      }
      store<T, V>(out + walk.row * channels + walk.pack * V, result);
    }
  }
}

// ---- pair_dot ----

// out[b, n] = sum_c x[b, n, c] * y[b, assign[b, n], c], 0 where n was dropped. `width` lanes of a
// warp, a power of two, take a row; `blocks` blocks take an image.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    pair_dot_rows(PairDotArgs<T> args, int width, int packs, int blocks) {
  using A = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int64_t image = blockIdx.x / blocks;
  const int64_t n = int64_t{blockIdx.x % blocks} * (kThreads / width) + threadIdx.x / width;
  const int64_t m = n < args.map.inputs ? args.map.output_of(image, n) : -1;
  A acc[V];
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) acc[i] = 0;
  if (m >= 0) {
    const T* const x = args.x(image, n);
    const T* const y = args.y(image, m);
    for (int64_t p = lane; p < packs; p += kAhead * width) {
      Pack<T, V> a[kAhead], b[kAhead];
      TOKENOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        a[k] = b[k] = zero_pack<T, V>();
        const int64_t at = p + k * width;
        if (at < packs) a[k] = load<T, V>(x + at * V), b[k] = load<T, V>(y + at * V);
      }
      TOKENOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) {
          acc[i] += static_cast<A>(a[k].item[i]) * static_cast<A>(b[k].item[i]);
        }
      }
    }
  }
  A sum = 0;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) sum += acc[i];
  for (int by = width / 2; by > 0; by /= 2) sum += __shfl_xor_sync(cuda::kAllLanes, sum, by);
  if (lane == 0 && n < args.map.inputs) args.out[image * args.map.inputs + n] = sum;
}

// ---- backward of amax, amin and prod ----

template <class T>
struct SelectArgs {
  Map map;
  Rows<const T> grad, x, best;  // [B, M, C], [B, N, C], and the result of the forward pass
  T* out;                       // [B, N, C]
  acc_t<T>* after;              // [B, N, C] of prod: products of the members after each one
  int32_t* place;               // [B, N]: where in `members` the token was when it was written
};

// Equal, or both NaN.
template <class A>
__device__ __forceinline__ bool same(A a, A b) {
  return a == b || (a != a && b != b);
}

// The gradient of the members of each output token. A row is written by the output token that
// `assign` names alone, whatever `members` holds.
template <bool Prod, class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    select_backward_tiles(const SelectArgs<T> args, Tiling tiling) {
  using A = acc_t<T>;
  const Tile tile = Tile::last_rows_first(tiling, blockIdx.x);
  const int64_t inputs = args.map.inputs, channels = int64_t{tiling.packs} * V;
  const int64_t first_input = tile.image * inputs;
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows; walk.step()) {
    if (walk.pack >= tile.packs) continue;
    const int64_t m = tile.row + walk.row, at = int64_t{tile.pack + walk.pack} * V;
    const Members members = args.map.members_of(tile.image, m);
    if (members.count == 0) continue;
    const bool notes = tile.pack + walk.pack == 0;
    const int first_place = static_cast<int>(members.index - (args.map.members + first_input));
    const T* const x = args.x(tile.image, 0) + at;
    T* const out = args.out + first_input * channels + at;
    A* const after = args.after + (Prod ? first_input * channels + at : 0);
    const auto is_own = [&](int64_t n) { return args.map.output_of(tile.image, n) == m; };

    const Pack<T, V> slope = load<T, V>(args.grad(tile.image, m) + at);
    A share[V], best[V], product[V];
    TOKENOPS_UNROLL
    for (int i = 0; i < V; ++i) share[i] = static_cast<A>(slope.item[i]), product[i] = 1;
    const bool alone = members.count == 1;  // it is the extreme, and there are no others
    if (Prod) {
      for (int64_t j = members.count - 1; !alone && j >= 0; --j) {
        const int64_t n = members.index[j];
        if (!args.map.is_input(n)) continue;
        if (is_own(n)) store_wide<A, V>(after + n * channels, product);
        const Pack<T, V> member = load<T, V>(x + n * args.x.row_stride);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) product[i] *= static_cast<A>(member.item[i]);
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) product[i] = 1;
    } else if (!alone) {
      const Pack<T, V> extreme = load<T, V>(args.best(tile.image, m) + at);
      int ties[V];
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) best[i] = static_cast<A>(extreme.item[i]), ties[i] = 0;
      for (int64_t j = 0; j < members.count; ++j) {
        const int64_t n = members.index[j];
        if (!args.map.is_input(n)) continue;
        const Pack<T, V> member = load<T, V>(x + n * args.x.row_stride);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) ties[i] += same(static_cast<A>(member.item[i]), best[i]);
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) share[i] /= static_cast<A>(ties[i] > 0 ? ties[i] : 1);
    }
    for (int64_t j = 0; j < members.count; ++j) {
      const int64_t n = members.index[j];
      if (!args.map.is_input(n)) continue;
      const bool own = is_own(n);
      Pack<T, V> result = slope;
      if (!alone) {
        const Pack<T, V> member = load<T, V>(x + n * args.x.row_stride);
        A later[V] = {};
        if (Prod && own) load_wide<A, V>(after + n * channels, later);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) {
          const A value = static_cast<A>(member.item[i]);
          if (Prod) {
            result.item[i] = static_cast<T>(share[i] * (product[i] * later[i]));
            product[i] *= value;
          } else {
            result.item[i] = static_cast<T>(same(value, best[i]) ? share[i] : A(0));
          }
        }
      }
      if (!own) continue;
      store<T, V>(out + n * channels, result);
      if (notes) args.place[first_input + n] = first_place + static_cast<int>(j);
    }
  }
}

// Zeros for the tokens that no output token wrote. What is not written in `place` can be anything,
// for it counts only where the map says the same.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) zero_others(const SelectArgs<T> args, Tiling tiling) {
  const Tile tile = Tile::in_order(tiling, blockIdx.x);
  const int64_t inputs = args.map.inputs, channels = int64_t{tiling.packs} * V;
  const int64_t first_input = tile.image * inputs;
  const int32_t* const members = args.map.members + first_input;
  int32_t* const unwritten = reinterpret_cast<int32_t*>(cuda::shared_memory());  // [tile_rows]
  for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
    const int64_t n = tile.row + r, m = args.map.output_of(tile.image, n);
    const int64_t place = args.place[first_input + n];
    bool written = m >= 0 && place >= 0 && place < inputs && members[place] == n;
    if (written) {
      const Members own = args.map.members_of(tile.image, m);
      const int64_t j = members + place - own.index;
      written = j >= 0 && j < own.count;
    }
    unwritten[r] = !written;
  }
  __syncthreads();
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows; walk.step()) {
    if (walk.pack >= tile.packs || !unwritten[walk.row]) continue;
    store<T, V>(args.out + (first_input + tile.row + walk.row) * channels +
                    int64_t{tile.pack + walk.pack} * V,
                zero_pack<T, V>());
  }
}

}  // namespace tokenops::merging
