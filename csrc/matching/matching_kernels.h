// SPDX-License-Identifier: Apache-2.0
// Finds the best destination of each source. isa_kernels.h includes this file once for each
// instruction set.
//
// Destinations are packed in panels [depth][columns], a few vectors wide; sources are rows. A
// register tile of kTile sources by one panel accumulates scores. For each source and lane it keeps
// the best score and the index of its vector of columns: scores never reach memory, and lanes are
// compared only once, at the end. The index is a floating-point number, so that it blends like a
// score.

#include "../tile_kernels.h"

// ---- packing ----

// 1 / sqrt(x), and 0 for 0: a token of zero length has similarity 0 to everything.
TOKENOPS_INLINE float inverse_root(float x) { return x == 0 ? 0 : 1 / __builtin_sqrtf(x); }
TOKENOPS_INLINE double inverse_root(double x) { return x == 0 ? 0 : 1 / __builtin_sqrt(x); }

template <class V, class T>
TOKENOPS_INLINE V load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == V::W ? V::load(p) : V::load_partial(p, n);
  T lanes[V::W] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i * stride];
  return V::load(lanes);
}

// Write the metric of one token as `words` words, zeros at the end. Returns the factor that its
// scores still need: pairs of bfloat16 are written unscaled and need 1 / length, other rows need 1.
template <class T>
inline acc_t<T> load_row(const Tokens& tokens, int64_t i, bool cosine, int64_t words,
                         acc_t<T>* row) {
  using A = acc_t<T>;
  using V = Vec<A>;
  using P = typename Packed<T>::type;
  const Metric& metric = tokens.metric;
  const T* x = static_cast<const T*>(metric.data) + tokens.list[i] * metric.token_stride;
  P* out = reinterpret_cast<P*>(row);
  constexpr int64_t kPerWord = sizeof(A) / sizeof(P);
  const bool can_copy = sizeof(P) == sizeof(T) && metric.heads == 1 && metric.stride == 1;
  if (can_copy && metric.width == words * kPerWord) {
    for (int64_t k = 0; k < words; k += V::W) {
      V::load(reinterpret_cast<const A*>(x) + k).store(row + k);
    }
  } else {
    const V mean = V::set1(A(1) / static_cast<A>(metric.heads));
    int64_t d = 0;
    // A few vectors at a time, so that heads that are contiguous are read together.
    constexpr int K = 4;
    for (; metric.stride == 1 && d + K * V::W <= metric.width; d += K * V::W) {
      V sum[K];
      for (int k = 0; k < K; ++k) sum[k] = V::load(x + d + k * V::W);
      for (int64_t h = 1; h < metric.heads; ++h) {
        const T* p = x + h * metric.head_stride + d;
        for (int k = 0; k < K; ++k) sum[k] = sum[k] + V::load(p + k * V::W);
      }
      for (int k = 0; k < K; ++k)
        (metric.heads > 1 ? sum[k] * mean : sum[k]).store(out + d + k * V::W);
    }
    for (; d < metric.width; d += V::W) {
      const int n = metric.width - d < V::W ? static_cast<int>(metric.width - d) : V::W;
      const T* p = x + d * metric.stride;
      V sum = load_strided<V>(p, metric.stride, n);
      for (int64_t h = 1; h < metric.heads; ++h) {
        sum = sum + load_strided<V>(p + h * metric.head_stride, metric.stride, n);
      }
      if (metric.heads > 1) sum = sum * mean;
      sum.store(out + d);
    }
    std::memset(static_cast<void*>(out + d), 0, (words * kPerWord - d) * sizeof(P));
  }
  if (!cosine) return 1;

  V squares = V::zero();
  for (int64_t k = 0; k < words; k += V::W) {
    const V v = V::load(row + k);
    squares = multiply<T>(v, v, squares);
  }
  const A inverse = inverse_root(reduce_add(squares));
  if (kPairs<T>) return inverse;
  const V scale = V::set1(inverse);
  for (int64_t k = 0; k < words; k += V::W) (V::load(row + k) * scale).store(row + k);
  return 1;
}

// Pack blocks [begin, end) of kBlock destinations as panels. The columns that fill the last vector
// repeat the last destination: of equal scores the first one counts, so they are never the best.
template <class T>
void pack(const Search<T>& search, int64_t begin, int64_t end, acc_t<T>* work) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int kWidth = kVectors<A> * V::W;  // columns of a full panel, divides kBlock
  const Tokens tokens = search.dst;           // a copy, as vector stores may alias `search`
  const int64_t depth = depth_words<T>(tokens.metric.width);
  const int64_t words = row_words(depth);
  const int64_t columns = (tokens.count + V::W - 1) / V::W * V::W;
  const int64_t stop = end * kBlock < columns ? end * kBlock : columns;
  for (int64_t column = begin * kBlock; column < stop; column += V::W) {
    const int n = tokens.count - column < V::W ? static_cast<int>(tokens.count - column) : V::W;
    for (int i = 0; i < V::W; ++i) {
      search.inverse[column + i] =
          i < n ? load_row<T>(tokens, column + i, search.cosine, words, work + i * words)
                : search.inverse[column + n - 1];
    }
    const int64_t panel = column / kWidth * kWidth;
    const int64_t stride = columns - panel < kWidth ? columns - panel : kWidth;
    A* out = search.panels + panel * depth + (column - panel);  // [depth][stride]
    for (int64_t k = 0; k < depth; k += V::W) {
      V m[V::W];
      for (int i = 0; i < V::W; ++i) m[i] = V::load(work + (i < n ? i : n - 1) * words + k);
      transpose<1>(m);
      for (int i = 0; i < V::W && k + i < depth; ++i) m[i].store(out + (k + i) * stride);
    }
  }
}

// ---- search ----

// A group of sources: its packed rows, and for each row and lane the best score so far and the
// index of the vector that has it.
template <class A>
struct Group {
  const A* rows;  // [tiles * kTile][words]
  int64_t words, tiles;
  A* best;   // [tiles * kTile][W]
  A* index;  // [tiles * kTile][W]
};

template <class A>
struct Panel {
  const A* columns;  // [depth][N * W]
  const A* inverse;  // [N * W], factors of pairs of bfloat16
  int64_t depth;
  int64_t first;  // index of the first vector
};

// Multiply tile t of a group by one panel of N vectors. A strict comparison keeps the first of
// equal scores, and drops NaN.
template <class T, int N, class A>
TOKENOPS_INLINE void tile(const Group<A>& group, const Panel<A>& panel, int64_t t) {
  using V = Vec<A>;
  V sum[kTile][N];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j] = V::zero();
  }
  multiply_tile<T, N>(group.rows + t * kTile * group.words, group.words, 1, panel.columns,
                      panel.depth, sum);
  A* const best = group.best + t * kTile * V::W;
  A* const index = group.index + t * kTile * V::W;
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    V top = V::set1(-infinity<A>()), at = V::zero();
    if (panel.first > 0) top = V::load(best + i * V::W), at = V::load(index + i * V::W);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      V s = sum[i][j];
      if (kPairs<T>) s = s * V::load(panel.inverse + j * V::W);
      at = blend(gt(s, top), V::set1(static_cast<A>(panel.first + j)), at);
      top = max(s, top);
    }
    top.store(best + i * V::W);
    at.store(index + i * V::W);
  }
}

// Multiply a whole group by one panel of n <= N vectors.
template <class T, int N, class A>
void search_panel(const Group<A>& group, const Panel<A>& panel, int n) {
  if constexpr (N > 1) {
    if (n < N) return search_panel<T, N - 1>(group, panel, n);
  }
  for (int64_t t = 0; t < group.tiles; ++t) tile<T, N>(group, panel, t);
}

// For W rows, find the best score over the W lanes, its vector and its lane; of equal scores, those
// of the first destination.
template <class V, class A>
TOKENOPS_INLINE void reduce_lanes(const A* best, const A* index, A* top_out, A* at_out,
                                  A* lane_out) {
  V values[V::W], indices[V::W];
  for (int i = 0; i < V::W; ++i) values[i] = V::load(best + i * V::W);
  transpose<1>(values);
  for (int i = 0; i < V::W; ++i) indices[i] = V::load(index + i * V::W);
  transpose<1>(indices);
  V top = values[0], at = indices[0], lane = V::zero();
  for (int i = 1; i < V::W; ++i) {
    const auto better =
        mask_or(gt(values[i], top), mask_and(eq(values[i], top), gt(at, indices[i])));
    top = blend(better, values[i], top);
    at = blend(better, indices[i], at);
    lane = blend(better, V::set1(static_cast<A>(i)), lane);
  }
  top.store(top_out), at.store(at_out), lane.store(lane_out);
}

// Find the best destinations of the sources in groups [begin, end).
template <class T>
void search(const Search<T>& search, int64_t begin, int64_t end, acc_t<T>* work) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const Tokens src = search.src;  // a copy, as in pack
  const int64_t depth = depth_words<T>(src.metric.width);
  const int64_t words = row_words(depth);
  const int64_t vectors = (search.dst.count + V::W - 1) / V::W;
  alignas(64) A best[kGroup * V::W], index[kGroup * V::W];
  A* const rows = work;
  A inverse[kGroup];

  for (int64_t g = begin; g < end; ++g) {
    const int64_t from = search.tiles() * g / search.groups * kTile;
    const int64_t to = search.tiles() * (g + 1) / search.groups * kTile;
    const int64_t count = to < src.count ? to - from : src.count - from;
    for (int64_t i = 0; i < to - from; ++i) {
      const int64_t row = from + (i < count ? i : count - 1);  // fills the last tile
      inverse[i] = load_row<T>(src, row, search.cosine, words, rows + i * words);
    }
    const Group<A> group = {rows, words, (to - from) / kTile, best, index};
    for (int64_t v = 0; v < vectors; v += kVectors<A>) {
      const Panel<A> panel = {search.panels + v * V::W * depth, search.inverse + v * V::W, depth,
                              v};
      const int n = vectors - v < kVectors<A> ? static_cast<int>(vectors - v) : kVectors<A>;
      search_panel<T, kVectors<A>>(group, panel, n);
    }
    for (int64_t i = 0; i < count; i += V::W) {
      A top[V::W], at[V::W], lane[V::W];
      reduce_lanes<V>(best + i * V::W, index + i * V::W, top, at, lane);
      for (int64_t l = 0; l < V::W && i + l < count; ++l) {
        const A score = top[l] * inverse[i + l];
        const bool found = score > -infinity<A>();  // the first destination if all scores are NaN
        search.node_max[from + i + l] = found ? score : -infinity<A>();
        search.node_idx[from + i + l] =
            found ? static_cast<int32_t>(at[l]) * V::W + static_cast<int32_t>(lane[l]) : 0;
      }
    }
  }
}

template <class T>
Kernels<T> kernels() {
  return {&pack<T>, &search<T>};
}
