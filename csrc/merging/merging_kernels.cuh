// SPDX-License-Identifier: Apache-2.0
// Kernels of merging on CUDA, on the tiles of merging_tiles.cuh.
#pragma once

#include "merging_tiles.cuh"

namespace tokenops::merging {

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
__device__ __forceinline__ A member_factor(const TileMembers<A>& listed, int at, A sign) {
  return F == Fold::sum ? listed.weight_of(at) : F == Fold::amax ? sign : A(1);
}

// How a row ends whose weights sum up to `total`.
template <class T>
__device__ __forceinline__ void end_average(MergedRow<T>& row, acc_t<T> total) {
  row.factor = Factor<T>::average(total);
  if (total == 0) row.count = 0;
}

// A row of many members: the block's threads are as many slices as a row of packs goes into them,
// each of which folds every so-many-th member; slices are then folded in pairs, in a fixed order.
template <Fold F, class T, int V>
__device__ __forceinline__ void merge_long_row(const MergeParts<T>& args, const Tile& tile,
                                               const TileMembers<acc_t<T>>& listed,
                                               MergedRow<T> row, const Walk& start, const T* x,
                                               int64_t row_stride, T* out, acc_t<T>* total,
                                               acc_t<T>* partial, acc_t<T>* partial_weight) {
  using A = acc_t<T>;
  const int slices = start.step_rows, slice = start.row;
  const bool live = start.pack < tile.packs;
  A acc[V], weights = 0;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) acc[i] = fold_start<F, A>();
  TOKENOPS_ROLL
  for (int j = slice; slice < slices && j < row.count; j += kAhead * slices) {
    Raw<T, V> member[kAhead];
    A factor[kAhead];
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (j + k * slices >= row.count) continue;
      const int at = row.begin + j + k * slices;
      if (live) member[k] = Raw<T, V>::at(x + listed.token(at) * row_stride);
      factor[k] = member_factor<F>(listed, at, args.sign);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (j + k * slices >= row.count) continue;
      weights += factor[k];
      if (!live) continue;
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) {
        acc[i] = folded<F>(acc[i], member[k][i] * factor[k]);
      }
    }
  }
  A* const own = partial + static_cast<int>(threadIdx.x) * V;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) own[i] = acc[i];
  partial_weight[threadIdx.x] = weights;
  int half = 1;
  while (2 * half < slices) half *= 2;
  TOKENOPS_ROLL
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
      const A reciprocal = row.factor.reciprocal();
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) {
        acc[i] = row.count > 0 ? row.factor.on(own[i], reciprocal) : A(0);
      }
      Raw<T, V>::of(acc).store(out);
    }
  }
  __syncthreads();  // before others write there again
}

// out[b, m] = fold of x[b, n] over the members n, scaled or averaged; 0 where there are none.
template <Fold F, class T, int V>
__global__ void __launch_bounds__(kThreads, kMergeBlocks<T>) merge_tiles(const MergeParts<T> args) {
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
  const TileMembers<A> listed(args.map, args.weight, tile,
                              reinterpret_cast<int32_t*>(rows + tiling.tile_rows), weights);

  const bool weighs = F == Fold::sum && args.average && args.weight != nullptr;
  const int64_t first_row = tile.image * args.map.outputs + tile.row;
  A* const total = args.total != nullptr && tile.pack == 0 ? args.total + first_row : nullptr;
  bool is_long = false;
  TOKENOPS_ROLL
  for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
    const Members members = args.map.members_of(tile.image, tile.row + r);
    const int64_t before = members.index - (args.map.members + tile.image * args.map.inputs);
    const int begin = static_cast<int>(before) - listed.begin, rest = listed.count - begin;
    MergedRow<T> row = {{F == Fold::amax ? args.sign : A(1), 1}, begin, 0};
    if (begin >= 0 && rest > 0) {  // always, if offsets ascend
      row.count = static_cast<int>(members.count < rest ? members.count : rest);
    }
    if (F == Fold::sum && args.scale != nullptr) row.factor.times = args.scale[first_row + r];
    if (F == Fold::sum && args.average && !weighs) {
      if (total != nullptr) total[r] = static_cast<A>(row.count);
      end_average(row, static_cast<A>(row.count));
    }
    rows[r] = row;
    is_long = is_long || row.count > kLong;
  }
  const bool any_long = __syncthreads_or(is_long);
  if (weighs) {
    TOKENOPS_ROLL
    for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
      MergedRow<T> row = rows[r];
      if (row.count > kLong) continue;
      A sum = 0;
      TOKENOPS_ROLL
      for (int j = 0; j < row.count; ++j) sum += listed.weight_of(row.begin + j);
      if (total != nullptr) total[r] = sum;
      // A lone member stays as it is: a count below zero stands for one without its weight.
      const bool lone = row.count == 1 && sum - sum == 0;
      end_average(row, sum);
      if (lone && row.count == 1) row.factor = {1, 1}, row.count = -1;
      rows[r] = row;
    }
    __syncthreads();
  }

  const Walk start(tiling.tile_packs);
  const int64_t row_stride = input.row_stride;
  const T* const x = input(tile.image, 0) + tile.pack * V;
  const int channels = tiling.packs * V;
  T* const out = args.part[which].out + first_row * channels + tile.pack * V;
  TOKENOPS_ROLL
  for (Walk walk = start; walk.row < tile.rows;) {
    Raw<T, V> first[kAhead];
    Walk ahead = walk;
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, ahead.step()) {
      if (ahead.row >= tile.rows || ahead.pack >= tile.packs) continue;
      const MergedRow<T> row = rows[ahead.row];
      if (row.count == 0 || row.count > kLong) continue;
      first[k] = Raw<T, V>::at(x + listed.token(row.begin) * row_stride + ahead.pack * V);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, walk.step()) {
      if (walk.row >= tile.rows || walk.pack >= tile.packs) continue;
      const MergedRow<T> row = rows[walk.row];
      if (row.count > kLong) continue;
      A acc[V] = {};
      if (row.count != 0) {
        const A factor = row.count < 0 ? A(1) : member_factor<F>(listed, row.begin, args.sign);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) acc[i] = first[k][i] * factor;
        const T* const here = x + walk.pack * V;
        TOKENOPS_ROLL
        for (int j = 1; j < row.count; j += 2) {
          const bool two = j + 1 < row.count;
          const int at = row.begin + j, next = two ? at + 1 : at;
          const Raw<T, V> a = Raw<T, V>::at(here + listed.token(at) * row_stride);
          const Raw<T, V> b = Raw<T, V>::at(here + listed.token(next) * row_stride);
          const A a_factor = member_factor<F>(listed, at, args.sign);
          const A b_factor = member_factor<F>(listed, next, args.sign);
          TOKENOPS_UNROLL
          for (int i = 0; i < V; ++i) {
            acc[i] = folded<F>(acc[i], a[i] * a_factor);
            if (two) acc[i] = folded<F>(acc[i], b[i] * b_factor);
          }
        }
        const A reciprocal = row.factor.reciprocal();
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) acc[i] = row.factor.on(acc[i], reciprocal);
      }
      Raw<T, V>::of(acc).store(out + int64_t{walk.row} * channels + walk.pack * V);
    }
  }
  TOKENOPS_ROLL
  for (int r = 0; any_long && r < tile.rows; ++r) {
    if (rows[r].count <= kLong) continue;
    const int64_t at = int64_t{start.pack} * V;
    merge_long_row<F, T, V>(args, tile, listed, rows[r], start, x + at, row_stride,
                            out + int64_t{r} * channels + at,
                            total != nullptr ? total + r : nullptr, partial, partial_weight);
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
  TOKENOPS_ROLL
  for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
    const int64_t m = args.map.output_of(tile.image, tile.row + r);
    CopiedRow<T> row = {{1, 1}, static_cast<int>(m)};
    if (m >= 0) {
      A factor = 1;
      if (args.weight != nullptr) factor = args.weight[first_row + r];
      if (args.scale != nullptr) factor *= args.scale[tile.image * args.map.outputs + m];
      if (args.mean) {
        const int64_t count = args.map.members_of(tile.image, m).count;
        row.factor = Factor<T>::average(static_cast<A>(count > 0 ? count : 1));
      }
      row.factor.times *= factor;
    }
    rows[r] = row;
  }
  __syncthreads();

  const Rows<const T> input = args.part[which].y, added = args.part[which].residual;
  const int first = tile.pack * V, channels = tiling.packs * V;
  const T* const y = input(tile.image, 0) + first;
  const T* const residual = added.data != nullptr ? added(tile.image, tile.row) + first : nullptr;
  T* const out = args.part[which].out + first_row * channels + first;
  TOKENOPS_ROLL
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows;) {
    Raw<T, V> value[kAhead], more[kAhead];
    Walk ahead = walk;
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, ahead.step()) {
      value[k] = more[k] = Raw<T, V>::zero();
      if (ahead.row >= tile.rows || ahead.pack >= tile.packs) continue;
      const int source = rows[ahead.row].source, at = ahead.pack * V;
      if (source >= 0) value[k] = Raw<T, V>::at(y + source * input.row_stride + at);
      if (residual == nullptr) continue;
      more[k] = Raw<T, V>::at(residual + ahead.row * added.row_stride + at);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAhead; ++k, walk.step()) {
      if (walk.row >= tile.rows || walk.pack >= tile.packs) continue;
      const CopiedRow<T> row = rows[walk.row];
      if (row.source < 0) {
        value[k] = more[k];
      } else if (residual != nullptr || row.factor.times != 1 || row.factor.over != 1) {
        const A reciprocal = row.factor.reciprocal();
        A result[V];
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) {
          result[i] = row.factor.on(value[k][i], reciprocal) + more[k][i];
        }
        value[k] = Raw<T, V>::of(result);
      }
      value[k].store(out + int64_t{walk.row} * channels + walk.pack * V);
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
    TOKENOPS_ROLL
    for (int64_t p = lane; p < packs; p += kAhead * width) {
      Raw<T, V> a[kAhead], b[kAhead];
      TOKENOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        a[k] = b[k] = Raw<T, V>::zero();
        const int64_t at = p + k * width;
        if (at < packs) a[k] = Raw<T, V>::at(x + at * V), b[k] = Raw<T, V>::at(y + at * V);
      }
      TOKENOPS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) acc[i] += a[k][i] * b[k][i];
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
  uint8_t* written;             // [B, N], zeros: set where a row of `out` was written
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
  constexpr int W = V < kPack<A> ? V : kPack<A>;  // of A in a store
  const Tile tile = Tile::last_rows_first(tiling, blockIdx.x);
  const int64_t inputs = args.map.inputs, channels = int64_t{tiling.packs} * V;
  const int64_t first_input = tile.image * inputs;
  TOKENOPS_ROLL
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows; walk.step()) {
    if (walk.pack >= tile.packs) continue;
    const int64_t m = tile.row + walk.row, at = int64_t{tile.pack + walk.pack} * V;
    const Members members = args.map.members_of(tile.image, m);
    if (members.count == 0) continue;
    const bool notes = tile.pack + walk.pack == 0;
    const T* const x = args.x(tile.image, 0) + at;
    T* const out = args.out + first_input * channels + at;
    A* const after = args.after + (Prod ? first_input * channels + at : 0);
    const auto is_own = [&](int64_t n) { return args.map.output_of(tile.image, n) == m; };

    const Raw<T, V> slope = Raw<T, V>::at(args.grad(tile.image, m) + at);
    const bool alone = members.count == 1;  // it is the extreme, and there are no others
    A share[V], other[V];                   // `other`: the extreme, or a product of members
    TOKENOPS_UNROLL
    for (int i = 0; i < V; ++i) share[i] = slope[i], other[i] = 1;
    if (Prod) {
      TOKENOPS_ROLL
      for (int64_t j = members.count - 1; !alone && j >= 0; --j) {
        const int64_t n = members.index[j];
        if (!args.map.is_input(n)) continue;
        if (is_own(n)) {
          TOKENOPS_UNROLL
          for (int i = 0; i < V; i += W) Raw<A, W>::of(other, i).store(after + n * channels + i);
        }
        const Raw<T, V> member = Raw<T, V>::at(x + n * args.x.row_stride);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) other[i] *= member[i];
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) other[i] = 1;
    } else if (!alone) {
      const Raw<T, V> extreme = Raw<T, V>::at(args.best(tile.image, m) + at);
      A ties[V];
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) other[i] = extreme[i], ties[i] = 0;
      TOKENOPS_ROLL
      for (int64_t j = 0; j < members.count; ++j) {
        const int64_t n = members.index[j];
        if (!args.map.is_input(n)) continue;
        const Raw<T, V> member = Raw<T, V>::at(x + n * args.x.row_stride);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) ties[i] += same(member[i], other[i]) ? A(1) : A(0);
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) share[i] /= ties[i] > 0 ? ties[i] : A(1);
    }
    TOKENOPS_ROLL
    for (int64_t j = 0; j < members.count; ++j) {
      const int64_t n = members.index[j];
      if (!args.map.is_input(n)) continue;
      const bool own = is_own(n);
      Raw<T, V> result = slope;
      if (!alone) {
        const Raw<T, V> member = Raw<T, V>::at(x + n * args.x.row_stride);
        A part[V] = {};
        TOKENOPS_UNROLL
        for (int i = 0; Prod && own && i < V; i += W) {
          const Raw<A, W> later = Raw<A, W>::at(after + n * channels + i);
          TOKENOPS_UNROLL
          for (int k = 0; k < W; ++k) part[i + k] = later[k];
        }
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) {
          if (Prod) {
            part[i] = share[i] * (other[i] * part[i]);
            other[i] *= member[i];
          } else {
            part[i] = same(member[i], other[i]) ? share[i] : A(0);
          }
        }
        result = Raw<T, V>::of(part);
      }
      if (!own) continue;
      result.store(out + n * channels);
      if (notes) args.written[first_input + n] = 1;
    }
  }
}

// Zeros for the tokens that no output token wrote.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) zero_others(const SelectArgs<T> args, Tiling tiling) {
  const Tile tile = Tile::in_order(tiling, blockIdx.x);
  const int64_t channels = int64_t{tiling.packs} * V;
  const int64_t first = tile.image * args.map.inputs + tile.row;
  TOKENOPS_ROLL
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows; walk.step()) {
    if (walk.pack >= tile.packs || args.written[first + walk.row]) continue;
    const int64_t at = int64_t{tile.pack + walk.pack} * V;
    Raw<T, V>::zero().store(args.out + (first + walk.row) * channels + at);
  }
}

}  // namespace tokenops::merging
