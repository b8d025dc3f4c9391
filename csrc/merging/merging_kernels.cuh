// SPDX-License-Identifier: Apache-2.0
// Kernels of merging on CUDA, on the tiles of merging_tiles.cuh.
#pragma once

#include "merging_tiles.cuh"

namespace tokenops::merging {

// One tensor of a launch of several.
template <class T>
struct Part {
  Tiling tiling;
  Rows<const T> input;     // x or y
  Rows<const T> residual;  // of unmerge, [B, N, C], its data null if there is none
  T* out;
  unsigned end;  // number of blocks of this tensor and the ones before it
};

// The arguments of merge_tiles and unmerge_tiles.
template <class T>
struct Parts {
  TokenMap map;
  const acc_t<T>* weight;  // [B, N] or null
  const acc_t<T>* scale;   // [B, M] or null
  acc_t<T>* total;         // of merge_wavg, [B, M] or null: receives the divisor of the mean
  acc_t<T> sign;           // of merge: -1 makes amin of amax
  bool mean;               // divide by the sum of the weights, by the count if there are none
  int count;
  Part<T> part[kTensors];
};

// Find the part that this block works on, and the first block of the part.
template <class T>
__device__ __forceinline__ int part_of_block(const Parts<T>& args, unsigned* first_block) {
  int which = 0;
  while (which + 1 < args.count && blockIdx.x >= args.part[which].end) ++which;
  *first_block = which > 0 ? args.part[which - 1].end : 0;
  return which;
}

// ---- merge ----

// Bytes of shared memory of merge_tiles.
template <class T, int V>
int64_t merge_shared_bytes(int tile_rows) {
  return static_cast<int64_t>(sizeof(acc_t<T>)) * (kThreads * (V + 1) + kStaged) +
         static_cast<int64_t>(sizeof(MergedRow<T>)) * tile_rows +
         static_cast<int64_t>(sizeof(int32_t)) * kStaged;
}

// A NaN stays. Kernels compute amin as amax of negated values.
template <Reduce R, class A>
__device__ __forceinline__ A combine(A acc, A value) {
  if (R == Reduce::prod) return acc * value;
  if (R == Reduce::amax) return value > acc || value != value ? value : acc;
  return acc + value;
}

template <Reduce R, class A>
__device__ __forceinline__ A identity() {
  return R == Reduce::prod ? A(1) : R == Reduce::amax ? -A(__builtin_inff()) : A(0);
}

// The factor of the member at an index of `listed`.
template <Reduce R, class A>
__device__ __forceinline__ A member_factor(const TileMembers<A>& listed, int at, A sign) {
  return R == Reduce::sum ? listed.weight_of(at) : R == Reduce::amax ? sign : A(1);
}

// Make the result of a row a mean whose weights sum to `total`.
template <class T>
__device__ __forceinline__ void set_mean(MergedRow<T>& row, acc_t<T> total) {
  row.factor = Factor<T>::mean(total);
  if (total == 0) row.count = 0;
}

// Reduce a long segment by the whole block. A slice is as many threads as the tile has packs in a
// row; slice s reduces the members s, s + slices, ...; then a tree in shared memory reduces the
// slices, in a fixed order.
template <Reduce R, class T, int V>
__device__ __forceinline__ void merge_long_row(const Parts<T>& args, const Tile& tile,
                                               const TileMembers<acc_t<T>>& listed,
                                               MergedRow<T> row, const Walk& start, const T* x,
                                               int64_t row_stride, T* out, acc_t<T>* total,
                                               acc_t<T>* partial, acc_t<T>* partial_weight) {
  using A = acc_t<T>;
  const int slices = start.step_rows, slice = start.row;
  const bool has_pack = start.pack < tile.packs;
  A acc[V], weights = 0;
  TOKENOPS_UNROLL
  for (int i = 0; i < V; ++i) acc[i] = identity<R, A>();
  TOKENOPS_ROLL
  for (int j = slice; slice < slices && j < row.count; j += kInFlight * slices) {
    Pack<T, V> member[kInFlight];
    A factor[kInFlight];
    TOKENOPS_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (j + k * slices >= row.count) continue;
      const int at = row.begin + j + k * slices;
      if (has_pack) member[k] = Pack<T, V>::at(x + listed.token(at) * row_stride);
      factor[k] = member_factor<R>(listed, at, args.sign);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (j + k * slices >= row.count) continue;
      weights += factor[k];
      if (!has_pack) continue;
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) {
        acc[i] = combine<R>(acc[i], member[k][i] * factor[k]);
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
    for (int i = 0; i < V; ++i) own[i] = combine<R>(own[i], own[other * V + i]);
    partial_weight[threadIdx.x] += partial_weight[threadIdx.x + other];
  }
  if (slice == 0) {
    if (args.mean && args.weight != nullptr) {
      set_mean(row, partial_weight[threadIdx.x]);
      if (total != nullptr && start.pack == 0) *total = partial_weight[threadIdx.x];
    }
    if (has_pack) {
      const A reciprocal = row.factor.reciprocal();
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) {
        acc[i] = row.count > 0 ? row.factor.apply(own[i], reciprocal) : A(0);
      }
      Pack<T, V>::of(acc).store(out);
    }
  }
  __syncthreads();  // before the next long segment writes to `partial`
}

// out[b, m] = reduction of x[b, n] over the members n of m, times scale[b, m]; 0 without members.
template <Reduce R, class T, int V>
__global__ void __launch_bounds__(kThreads, kMergeBlocks<T>) merge_tiles(const Parts<T> args) {
  using A = acc_t<T>;
  unsigned first_block;
  const int which = part_of_block(args, &first_block);
  const Tiling tiling = args.part[which].tiling;
  const Rows<const T> input = args.part[which].input;
  const Tile tile = Tile::last_rows_first(tiling, blockIdx.x - first_block);

  A* const partial = reinterpret_cast<A*>(cuda::shared_memory());  // [kThreads, V]
  A* const partial_weight = partial + kThreads * V;                // [kThreads]
  A* const weights = partial_weight + kThreads;                    // [kStaged]
  MergedRow<T>* const rows = reinterpret_cast<MergedRow<T>*>(weights + kStaged);
  const TileMembers<A> listed(args.map, args.weight, tile,
                              reinterpret_cast<int32_t*>(rows + tiling.tile_rows), weights);

  const bool weighted_mean = R == Reduce::sum && args.mean && args.weight != nullptr;
  const int64_t first_row = tile.image * args.map.outputs + tile.row;
  A* const total = args.total != nullptr && tile.pack == 0 ? args.total + first_row : nullptr;
  bool is_long = false;
  TOKENOPS_ROLL
  for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
    const Segment segment = args.map.segment(tile.image, tile.row + r);
    const int64_t before = segment.members - (args.map.members + tile.image * args.map.inputs);
    const int begin = static_cast<int>(before) - listed.begin, rest = listed.count - begin;
    MergedRow<T> row = {{R == Reduce::amax ? args.sign : A(1), 1}, begin, 0};
    if (begin >= 0 && rest > 0) {  // false if a user's offsets descend
      row.count = static_cast<int>(segment.count < rest ? segment.count : rest);
    }
    if (R == Reduce::sum && args.scale != nullptr) row.factor.times = args.scale[first_row + r];
    if (R == Reduce::sum && args.mean && !weighted_mean) {
      if (total != nullptr) total[r] = static_cast<A>(row.count);
      set_mean(row, static_cast<A>(row.count));
    }
    rows[r] = row;
    is_long = is_long || row.count > kLong;
  }
  const bool any_long = __syncthreads_or(is_long);
  if (weighted_mean) {
    TOKENOPS_ROLL
    for (int r = threadIdx.x; r < tile.rows; r += kThreads) {
      MergedRow<T> row = rows[r];
      if (row.count > kLong) continue;
      A sum = 0;
      TOKENOPS_ROLL
      for (int j = 0; j < row.count; ++j) sum += listed.weight_of(row.begin + j);
      if (total != nullptr) total[r] = sum;
      // The mean of a single member of finite weight is the member: count -1 means so.
      const bool single = row.count == 1 && sum - sum == 0;
      set_mean(row, sum);
      if (single && row.count == 1) row.factor = {1, 1}, row.count = -1;
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
    Pack<T, V> first[kInFlight];
    Walk ahead = walk;
    TOKENOPS_UNROLL
    for (int k = 0; k < kInFlight; ++k, ahead.step()) {
      if (ahead.row >= tile.rows || ahead.pack >= tile.packs) continue;
      const MergedRow<T> row = rows[ahead.row];
      if (row.count == 0 || row.count > kLong) continue;
      first[k] = Pack<T, V>::at(x + listed.token(row.begin) * row_stride + ahead.pack * V);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kInFlight; ++k, walk.step()) {
      if (walk.row >= tile.rows || walk.pack >= tile.packs) continue;
      const MergedRow<T> row = rows[walk.row];
      if (row.count > kLong) continue;
      A acc[V] = {};
      if (row.count != 0) {
        const A factor = row.count < 0 ? A(1) : member_factor<R>(listed, row.begin, args.sign);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) acc[i] = first[k][i] * factor;
        const T* const here = x + walk.pack * V;
        TOKENOPS_ROLL
        for (int j = 1; j < row.count; j += 2) {
          const bool two = j + 1 < row.count;
          const int at = row.begin + j, next = two ? at + 1 : at;
          const Pack<T, V> a = Pack<T, V>::at(here + listed.token(at) * row_stride);
          const Pack<T, V> b = Pack<T, V>::at(here + listed.token(next) * row_stride);
          const A a_factor = member_factor<R>(listed, at, args.sign);
          const A b_factor = member_factor<R>(listed, next, args.sign);
          TOKENOPS_UNROLL
          for (int i = 0; i < V; ++i) {
            acc[i] = combine<R>(acc[i], a[i] * a_factor);
            if (two) acc[i] = combine<R>(acc[i], b[i] * b_factor);
          }
        }
        const A reciprocal = row.factor.reciprocal();
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) acc[i] = row.factor.apply(acc[i], reciprocal);
      }
      Pack<T, V>::of(acc).store(out + int64_t{walk.row} * channels + walk.pack * V);
    }
  }
  TOKENOPS_ROLL
  for (int r = 0; any_long && r < tile.rows; ++r) {
    if (rows[r].count <= kLong) continue;
    const int64_t at = int64_t{start.pack} * V;
    merge_long_row<R, T, V>(args, tile, listed, rows[r], start, x + at, row_stride,
                            out + int64_t{r} * channels + at,
                            total != nullptr ? total + r : nullptr, partial, partial_weight);
  }
}

// ---- unmerge ----

template <class T>
struct alignas(16) CopiedRow {
  Factor<T> factor;
  int source;  // -1 for dropped tokens
};

// out[b, n] = weight[b, n] * scale[b, m] * y[b, m] + residual[b, n] with m = assign[b, n], over the
// number of members of m if `mean`; the residual or 0 where n is dropped.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) unmerge_tiles(const Parts<T> args) {
  using A = acc_t<T>;
  unsigned first_block;
  const int which = part_of_block(args, &first_block);
  const Tiling tiling = args.part[which].tiling;
  const Tile tile = Tile::in_order(tiling, blockIdx.x - first_block);
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
        const int64_t count = args.map.segment(tile.image, m).count;
        row.factor = Factor<T>::mean(static_cast<A>(count > 0 ? count : 1));
      }
      row.factor.times *= factor;
    }
    rows[r] = row;
  }
  __syncthreads();

  const Rows<const T> input = args.part[which].input, added = args.part[which].residual;
  const int first = tile.pack * V, channels = tiling.packs * V;
  const T* const y = input(tile.image, 0) + first;
  const T* const residual = added.data != nullptr ? added(tile.image, tile.row) + first : nullptr;
  T* const out = args.part[which].out + first_row * channels + first;
  TOKENOPS_ROLL
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows;) {
    Pack<T, V> value[kInFlight], more[kInFlight];
    Walk ahead = walk;
    TOKENOPS_UNROLL
    for (int k = 0; k < kInFlight; ++k, ahead.step()) {
      value[k] = more[k] = Pack<T, V>::zero();
      if (ahead.row >= tile.rows || ahead.pack >= tile.packs) continue;
      const int source = rows[ahead.row].source, at = ahead.pack * V;
      if (source >= 0) value[k] = Pack<T, V>::at(y + source * input.row_stride + at);
      if (residual == nullptr) continue;
      more[k] = Pack<T, V>::at(residual + ahead.row * added.row_stride + at);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kInFlight; ++k, walk.step()) {
      if (walk.row >= tile.rows || walk.pack >= tile.packs) continue;
      const CopiedRow<T> row = rows[walk.row];
      if (row.source < 0) {
        value[k] = more[k];
      } else if (residual != nullptr || row.factor.times != 1 || row.factor.over != 1) {
        const A reciprocal = row.factor.reciprocal();
        A result[V];
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) {
          result[i] = row.factor.apply(value[k][i], reciprocal) + more[k][i];
        }
        value[k] = Pack<T, V>::of(result);
      }
      value[k].store(out + int64_t{walk.row} * channels + walk.pack * V);
    }
  }
}

// ---- pair_dot ----

// out[b, n] = sum_c x[b, n, c] * y[b, assign[b, n], c]; 0 where n is dropped. `width` lanes of a
// warp, a power of two, compute a row; `blocks` blocks compute an image.
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
    for (int64_t p = lane; p < packs; p += kInFlight * width) {
      Pack<T, V> a[kInFlight], b[kInFlight];
      TOKENOPS_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        a[k] = b[k] = Pack<T, V>::zero();
        const int64_t at = p + k * width;
        if (at < packs) a[k] = Pack<T, V>::at(x + at * V), b[k] = Pack<T, V>::at(y + at * V);
      }
      TOKENOPS_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
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
struct ReduceGradArgs {
  TokenMap map;
  Rows<const T> grad, x, out;  // [B, M, C], [B, N, C], [B, M, C]: out is the result of the forward
  T* grad_x;                   // [B, N, C]
  acc_t<T>* suffix;            // of prod, [B, N, C]: product of the members after each member
  uint8_t* written;            // [B, N], zeros at first; 1 where a row of grad_x was written
};

// Equal, or both NaN.
template <class A>
__device__ __forceinline__ bool same(A a, A b) {
  return a == b || (a != a && b != b);
}

// Compute the gradient of the members of each output token. Only output token assign[b, n] writes
// row n, even if `members` lists a token twice.
template <bool Prod, class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    reduce_backward_tiles(const ReduceGradArgs<T> args, Tiling tiling) {
  using A = acc_t<T>;
  constexpr int W = V < kPack<A> ? V : kPack<A>;  // elements of A in a store
  const Tile tile = Tile::last_rows_first(tiling, blockIdx.x);
  const int64_t inputs = args.map.inputs, channels = int64_t{tiling.packs} * V;
  const int64_t first_input = tile.image * inputs;
  TOKENOPS_ROLL
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows; walk.step()) {
    if (walk.pack >= tile.packs) continue;
    const int64_t m = tile.row + walk.row, at = int64_t{tile.pack + walk.pack} * V;
    const Segment segment = args.map.segment(tile.image, m);
    if (segment.count == 0) continue;
    const bool first_pack = tile.pack + walk.pack == 0;
    const T* const x = args.x(tile.image, 0) + at;
    T* const grad_x = args.grad_x + first_input * channels + at;
    A* const suffix = args.suffix + (Prod ? first_input * channels + at : 0);
    const auto is_own = [&](int64_t n) { return args.map.output_of(tile.image, n) == m; };

    const Pack<T, V> grad = Pack<T, V>::at(args.grad(tile.image, m) + at);
    const bool single = segment.count == 1;  // the result is the member itself
    A share[V], other[V];  // `other`: the result of amax or amin, or a product of members
    TOKENOPS_UNROLL
    for (int i = 0; i < V; ++i) share[i] = grad[i], other[i] = 1;
    if (Prod) {
      TOKENOPS_ROLL
      for (int64_t j = segment.count - 1; !single && j >= 0; --j) {
        const int64_t n = segment.members[j];
        if (!args.map.is_input(n)) continue;
        if (is_own(n)) {
          TOKENOPS_UNROLL
          for (int i = 0; i < V; i += W) Pack<A, W>::of(other, i).store(suffix + n * channels + i);
        }
        const Pack<T, V> member = Pack<T, V>::at(x + n * args.x.row_stride);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) other[i] *= member[i];
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) other[i] = 1;
    } else if (!single) {
      const Pack<T, V> extremum = Pack<T, V>::at(args.out(tile.image, m) + at);
      A ties[V];
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) other[i] = extremum[i], ties[i] = 0;
      TOKENOPS_ROLL
      for (int64_t j = 0; j < segment.count; ++j) {
        const int64_t n = segment.members[j];
        if (!args.map.is_input(n)) continue;
        const Pack<T, V> member = Pack<T, V>::at(x + n * args.x.row_stride);
        TOKENOPS_UNROLL
        for (int i = 0; i < V; ++i) ties[i] += same(member[i], other[i]) ? A(1) : A(0);
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < V; ++i) share[i] /= ties[i] > 0 ? ties[i] : A(1);
    }
    TOKENOPS_ROLL
    for (int64_t j = 0; j < segment.count; ++j) {
      const int64_t n = segment.members[j];
      if (!args.map.is_input(n)) continue;
      const bool own = is_own(n);
      Pack<T, V> result = grad;
      if (!single) {
        const Pack<T, V> member = Pack<T, V>::at(x + n * args.x.row_stride);
        A part[V] = {};
        TOKENOPS_UNROLL
        for (int i = 0; Prod && own && i < V; i += W) {
          const Pack<A, W> later = Pack<A, W>::at(suffix + n * channels + i);
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
        result = Pack<T, V>::of(part);
      }
      if (!own) continue;
      result.store(grad_x + n * channels);
      if (first_pack) args.written[first_input + n] = 1;
    }
  }
}

// Write zeros for the tokens that no output token wrote.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    zero_dropped(const ReduceGradArgs<T> args, Tiling tiling) {
  const Tile tile = Tile::in_order(tiling, blockIdx.x);
  const int64_t channels = int64_t{tiling.packs} * V;
  const int64_t first = tile.image * args.map.inputs + tile.row;
  TOKENOPS_ROLL
  for (Walk walk(tiling.tile_packs); walk.row < tile.rows; walk.step()) {
    if (walk.pack >= tile.packs || args.written[first + walk.row]) continue;
    const int64_t at = int64_t{tile.pack + walk.pack} * V;
    Pack<T, V>::zero().store(args.grad_x + (first + walk.row) * channels + at);
  }
}

}  // namespace tokenops::merging
