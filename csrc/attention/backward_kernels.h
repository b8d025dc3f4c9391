// SPDX-License-Identifier: Apache-2.0
// Attention's backward pass: included once per instruction set, in its namespace.
//
// Keys are the rows here and queries the columns. For a tile of keys and a panel of queries
// S = K Q^T and W = V dO^T come out of registers into the first-level cache, where one pass makes
// attention y and dS of them and adds up the gradients of policy and size. Then dV = y dO and
// dK = dS Q for a block of keys, and dQ += dS^T K. With P = exp(s + log z - L), p' the policy (1
// for a row's own key), delta = dO . O - dL, floor the share of eps and n the number of seen keys:
//
//   y = p' P + floor / n,   T = P (W - delta),   dp = sum T (without own keys),
//   dS = p' T, and + floor (mean of W - delta) at a row's maximum,   dlog z = sum dS

// What a tile of keys by queries is turned into, and sums.
template <class A>
struct TileTask {
  const A *bias, *weight;                                // of kTile keys
  const A* key;                                          // their numbers, -2 where there is none
  const A *lse, *delta, *spread, *top, *place, *argmax;  // of the panel's queries
  A *attention, *slope;  // [kTile] rows of `stride` words, at the panel's first query
  A* paired;             // [kTile / 2] rows of as many
  int64_t stride;
  A *dpolicy, *dlog;  // [kTile][W], sums by lane
};

// The number of vectors N is that of the panel; `kKept` is false for keys whose policy is zero,
// of which only dpolicy is wanted.
template <class T, bool kKept, int N, class A>
TOKENOPS_INLINE void differentiate_tile(const Head<T>& head, const TileTask<A>& task, const A* s,
                                        const A* w) {
  using V = Vec<A>;
  using P = typename Packed<T>::type;
  const V slope = V::set1(head.slope()), zero = V::zero(), one = V::set1(1);
  const bool owns = head.self_keep || head.exclude_self, causal = head.is_causal;
  const bool has_floor = head.eps > 0;
  V even[N];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    // Sums of a kept key are of its attention, for its policy to be divided out at the end: that
    // is no larger than 1, where the share of a key with a small policy is beyond all bounds.
    const bool kept = kKept && task.weight[i] > 0;
    const V limit = V::set1(kept ? kLargest<A> : kMaxExponent<A>);
    const V bias = V::set1(task.bias[i]), weight = V::set1(task.weight[i]);
    const V key = V::set1(task.key[i]);
    V dpolicy = V::load(task.dpolicy + i * V::W), dlog = V::load(task.dlog + i * V::W);
    P* const attention = reinterpret_cast<P*>(task.attention + i * task.stride);
    P* const to = reinterpret_cast<P*>(task.slope + i * task.stride);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const int64_t at = j * V::W;
      const V x = fma(V::load(s + i * N * V::W + at), slope, bias);
      V share = exp2(min(limit, x - V::load(task.lse + at)));
      V spread = V::load(task.spread + at);
      const V place = V::load(task.place + at), delta = V::load(task.delta + at);
      if (causal) {
        const auto hidden = gt(key, place);
        share = blend(hidden, zero, share);
        spread = blend(hidden, zero, spread);
      }
      V dot = V::load(w + i * N * V::W + at);
      const auto own = eq(key, place);
      if (owns && head.exclude_self) dot = blend(own, zero, dot);
      const V factor = head.self_keep ? blend(own, one, weight) : weight;
      V y = share * factor;
      const V t = (kept ? y : share) * (dot - delta);
      dpolicy = dpolicy + (head.self_keep ? blend(own, zero, t) : t);
      if (!kKept) continue;
      V ds = kept ? t : head.self_keep ? blend(own, t, zero) : zero;
      y = y + spread;
      if (owns && head.exclude_self) y = blend(own, zero, y);
      if (has_floor) {
        const auto is_top = eq(key, V::load(task.argmax + at));
        ds = ds + blend(is_top, V::load(task.top + at), zero);
      }
      dlog = dlog + ds;
      store_words<T>(y, attention + at);
      store_words<T>(ds, to + at);
#if TOKENOPS_PAIRS
      if constexpr (kPairs<T>) {
        if (i % 2 == 0) {
          even[j] = ds;
        } else {
          pair_up(even[j], ds).store(task.paired + i / 2 * task.stride + at);
        }
      }
#endif
    }
    dpolicy.store(task.dpolicy + i * V::W);
    dlog.store(task.dlog + i * V::W);
  }
  (void)even;
}

// One head's queries [begin, end).
template <class T>
class BackwardPass {
  using A = acc_t<T>;
  using V = Vec<A>;

 public:
  BackwardPass(const Head<T>& head, const Gradient<T>& gradient, BackwardWork<T>& work,
               const BackwardResult<T>& result)
      : head(head), gradient(gradient), work(work), result(result) {}

  void run(int64_t begin, int64_t end) {
    list_queries(begin, end);
    if (count_ > 0) pack_keys();
    const int64_t blocks = (count_ + kMostQueries - 1) / kMostQueries;
    for (int64_t b = 0; b < blocks; ++b) {
      take_queries(count_ * b / blocks, count_ * (b + 1) / blocks);
      blocks_of<true>(work.kept, 0);
      if (gradient.need_dropped) blocks_of<false>(work.dropped, round_up(work.kept.count, kTile));
      for (int64_t i = 0; i < queries_; ++i) own_key(i);
      write_queries();
    }
  }

 private:
  // Rows with a gradient; the others get zeros and count no further.
  void list_queries(int64_t begin, int64_t end) {
    count_ = 0;
    for (int64_t i = begin; i < end; ++i) {
      const A grad_lse = gradient.grad_lse == nullptr ? 0 : gradient.grad_lse[i];
      const bool live = gradient.lse[i] != -infinity<A>() &&
                        (grad_lse != 0 || any(gradient.g.row(i), gradient.g.width));
      if (live) {
        work.rows[count_++] = static_cast<int32_t>(i);
      } else if (head.q.width > 0) {  // else there may be no memory
        std::memset(static_cast<void*>(result.dq + i * result.stride), 0, head.q.width * sizeof(T));
      }
    }
  }
  static bool any(const T* x, int64_t width) {
    V most = V::zero();  // the number of elements that are not zero; NaN is not
    for (int64_t d = 0; d < width; d += V::W) {
      const V v = load_some<V>(x + d, width - d);
      most = most + blend(eq(v, V::zero()), V::zero(), V::set1(1));
    }
    return reduce_add(most) > 0;
  }

  Tokens<T> listed(Tokens<T> x, const KeyList<A>& keys) const {
    x.list = keys.list;
    x.count = keys.count;
    return x;
  }

  void pack_keys() {
    work.kept.fill(head, true, head.eps > 0);
    const int64_t start = round_up(work.kept.count, kTile);
    pack_rows(listed(head.k, work.kept), work.key_rows);
    pack_rows(listed(head.v, work.kept), work.value_rows);
    pack_panels(listed(head.k, work.kept), work.key_panels);
    if (gradient.need_dropped) {
      work.dropped.fill(head, false, false);
      pack_rows(listed(head.k, work.dropped), work.key_rows + start * depth_words<T>(head.k.width));
      pack_rows(listed(head.v, work.dropped),
                work.value_rows + start * depth_words<T>(head.v.width));
    }
    if (head.eps > 0) sum_values();
  }

  // Sums of the values of kept keys: of all, or for causal rows of the first 0, 1, 2...
  void sum_values() {
    const int64_t width = head.v.width, row = row_words(width);
    std::memset(work.mean, 0, row * sizeof(A));
    for (int64_t i = 0; i < work.kept.count; ++i) {
      A* sum = work.mean;
      if (head.is_causal) {
        sum += (i + 1) * row;
        std::memcpy(sum, sum - row, row * sizeof(A));
      }
      add_scaled(head.v.row(work.kept.list[i]), A(1), width, sum);
    }
  }

  // Pack the listed queries [begin, end) and gather what belongs to each one.
  void take_queries(int64_t begin, int64_t end) {
    queries_ = end - begin;
    first_ = begin;
    lanes_ = round_up(queries_, V::W);
    const auto some = [&](Tokens<T> x) {
      x.list = work.rows + begin;
      x.count = queries_;
      return x;
    };
    pack_columns(some(head.q), work.query_columns, work.work);
    pack_columns(some(gradient.g), work.grad_columns, work.work);
    pack_panels(some(head.q), work.query_panels);
    if (gradient.need_v) pack_panels(some(gradient.g), work.grad_panels);
    std::memset(work.dq, 0, round_up(queries_, kTile) * round_up(head.q.width, V::W) * sizeof(A));
    for (int64_t i = 0; i < lanes_; ++i) {
      if (i >= queries_) {  // a share of 2^-inf
        work.lse[i] = infinity<A>();
        work.delta[i] = work.spread[i] = work.top[i] = 0;
        work.place[i] = work.argmax[i] = -1;
        continue;
      }
      const int64_t query = work.rows[begin + i], place = head.place_of(query);
      const T* const g = gradient.g.row(query);
      A delta = dot(g, gradient.out.row(query), gradient.g.width);
      if (gradient.grad_lse != nullptr) delta -= gradient.grad_lse[query];
      work.lse[i] = gradient.lse[query] * static_cast<A>(kLog2E);
      work.delta[i] = delta;
      work.place[i] = static_cast<A>(place < -1 ? -1 : place < kMaxTokens ? place : kMaxTokens);
      work.spread[i] = work.top[i] = 0;
      work.argmax[i] = -1;
      if (head.eps > 0) {
        const int64_t seen = work.kept.seen(head, place);  // a row that is not empty sees some key
        const A count = static_cast<A>(seen > 0 ? seen : 1), floor = gradient.floor[query];
        A mean = dot_sum(g, work.mean + (head.is_causal ? seen * row_words(head.v.width) : 0));
        if (head.exclude_self && place >= 0 && place < head.k.count && head.takes_part(place)) {
          mean -= dot(g, head.v.row(place), gradient.g.width);
        }
        work.spread[i] = floor / count;
        work.top[i] = floor * (mean / count - delta);
        work.argmax[i] = static_cast<A>(gradient.argmax[query]);
      }
    }
  }
  A dot_sum(const T* g, const A* sum) const {
    V total = V::zero();
    for (int64_t d = 0; d < gradient.g.width; d += V::W) {
      const int64_t left = gradient.g.width - d;
      total = fma(load_some<V>(g + d, left), load_some<V>(sum + d, left), total);
    }
    return reduce_add(total);
  }

  // All keys of a list in blocks of about one size.
  template <bool kKept>
  void blocks_of(const KeyList<A>& keys, int64_t start) {
    const int64_t blocks = (keys.count + work.block - 1) / work.block;
    const int64_t step = blocks == 0 ? 1 : round_up((keys.count + blocks - 1) / blocks, kTile);
    for (int64_t k = 0; k < keys.count; k += step) {
      block<kKept>(keys, k, k + step < keys.count ? k + step : keys.count, start);
    }
  }

  // Keys [begin, end) of a list, which starts at a row of the packed ones, by all queries.
  template <bool kKept>
  void block(const KeyList<A>& keys, int64_t begin, int64_t end, int64_t start) {
    const int64_t depth = depth_words<T>(head.k.width), value_depth = depth_words<T>(head.v.width);
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
    A* const dpolicy = work.sums;
    A* const dlog = work.sums + work.block * V::W;
    std::memset(work.sums, 0, 2 * work.block * V::W * sizeof(A));
    A number[kMostRows];
    for (int64_t i = 0; i < tiles * kTile; ++i) {
      number[i] = begin + i < end ? static_cast<A>(keys.list[begin + i]) : A(-2);
    }
    for_each_panel(
        work.query_columns, depth, queries_, queries_, [&](int64_t column, auto n, const A* panel) {
          constexpr int N = decltype(n)::value;
          const A* const grad_panel = work.grad_columns + column * value_depth;
          alignas(64) A s[kTile * N * V::W], w[kTile * N * V::W];
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t key = begin + t * kTile;
            tile<N>(work.key_rows + (start + key) * depth, panel, depth, s);
            tile<N>(work.value_rows + (start + key) * value_depth, grad_panel, value_depth, w);
            const int64_t lane = t * kTile * V::W, words = column / (kPairs<T> ? 2 : 1);
            const TileTask<A> task = {keys.bias + key,
                                      keys.weight + key,
                                      number + t * kTile,
                                      work.lse + column,
                                      work.delta + column,
                                      work.spread + column,
                                      work.top + column,
                                      work.place + column,
                                      work.argmax + column,
                                      work.attention + t * kTile * work.stride + words,
                                      work.slope + t * kTile * work.stride + words,
                                      work.paired + t * kTile / 2 * work.stride + column,
                                      work.stride,
                                      dpolicy + lane,
                                      dlog + lane};
            differentiate_tile<T, kKept, N>(head, task, s, w);
          }
        });
    for (int64_t i = 0; i < end - begin; ++i) {
      const int32_t key = keys.list[begin + i];
      if (result.dpolicy != nullptr) {
        const A weight = keys.weight[begin + i];
        result.dpolicy[key] +=
            reduce_add(V::load(dpolicy + i * V::W)) / (kKept && weight > 0 ? weight : 1);
      }
      if (kKept && result.dlog != nullptr) {
        result.dlog[key] += reduce_add(V::load(dlog + i * V::W));
      }
    }
    if (!kKept) return;
    const int64_t queries = depth_words<T>(queries_);
    for (int64_t t = 0; t < tiles; ++t) {
      const int32_t* const list = keys.list + begin + t * kTile;
      const int64_t left = end - begin - t * kTile, count = left < kTile ? left : kTile;
      if (gradient.need_v) {
        add_rows(work.attention + t * kTile * work.stride, work.grad_panels, queries, head.v.width,
                 list, count, result.dv);
      }
      add_rows(work.slope + t * kTile * work.stride, work.query_panels, queries, head.k.width, list,
               count, result.dk);
    }
    add_queries(begin, depth_words<T>(end - begin));
  }

  // Products of a tile with a panel, [kTile][N * W].
  template <int N>
  static TOKENOPS_INLINE void tile(const A* a, const A* panel, int64_t depth, A* out) {
    V sum[kTile][N] = {};
    multiply_tile<T, N>(a, depth, 1, panel, depth, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j].store(out + (i * N + j) * V::W);
    }
  }

  // out[list[i]] += a[i] b for a tile of rows a by panels b [depth][width].
  void add_rows(const A* a, const A* b, int64_t depth, int64_t width, const int32_t* list,
                int64_t count, A* out) {
    const int64_t padded = round_up(width, V::W);
    for_each_panel(b, depth, width, width, [&](int64_t column, auto n, const A* panel) {
      constexpr int N = decltype(n)::value;
      V sum[kTile][N] = {};
      multiply_tile<T, N>(a, work.stride, 1, panel, depth, sum);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j].store(work.tile + i * padded + column + j * V::W);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      add_scaled(work.tile + i * padded, A(1), width, out + list[i] * width);
    }
  }

  // dQ += dS^T K over a block of keys that starts at `key`, of `depth` words.
  void add_queries(int64_t key, int64_t depth) {
    const int64_t padded = round_up(head.q.width, V::W);
    const A* const a = kPairs<T> ? work.paired : work.slope;
    const int64_t words = depth_words<T>(work.kept.count), before = depth_words<T>(key);
    for_each_panel(work.key_panels, words, head.q.width, head.q.width,
                   [&](int64_t column, auto n, const A* panel) {
                     constexpr int N = decltype(n)::value;
                     for (int64_t i = 0; i < queries_; i += kTile) {
                       A* const out = work.dq + i * padded + column;
                       V sum[kTile][N];
                       for (int r = 0; r < kTile; ++r) {
                         for (int j = 0; j < N; ++j)
                           sum[r][j] = V::load(out + r * padded + j * V::W);
                       }
                       multiply_tile<T, N>(a + i, 1, work.stride, panel + before * N * V::W, depth,
                                           sum);
                       for (int r = 0; r < kTile; ++r) {
                         for (int j = 0; j < N; ++j) sum[r][j].store(out + r * padded + j * V::W);
                       }
                     }
                   });
  }

  // A row's own key that no list of kept keys holds.
  void own_key(int64_t i) {
    const int64_t query = work.rows[first_ + i], key = head.own_dropped(query);
    if (key < 0) return;
    const T *const q = head.q.row(query), *const k = head.k.row(key), *const v = head.v.row(key);
    const T* const g = gradient.g.row(query);
    const int64_t width = head.q.width, value_width = head.v.width;
    const A x = dot(q, k, width) * head.slope() + head.log_size[key] - work.lse[i];
    A lanes[V::W];
    exp2(min(V::set1(kMaxExponent<A>), V::set1(x))).store(lanes);
    const A share = lanes[0];
    const A t = share * ((head.exclude_self ? 0 : dot(g, v, value_width)) - work.delta[i]);
    add_scaled(k, t, width, work.dq + i * round_up(width, V::W));
    add_scaled(q, t, width, result.dk + key * width);
    if (gradient.need_v && !head.exclude_self) {
      add_scaled(g, share, value_width, result.dv + key * value_width);
    }
    if (result.dlog != nullptr) result.dlog[key] += t;
  }

  void write_queries() {
    const int64_t width = head.q.width, padded = round_up(width, V::W);
    for (int64_t i = 0; i < queries_; ++i) {
      write_row(work.dq + i * padded, head.scale, width,
                result.dq + work.rows[first_ + i] * result.stride);
    }
  }

  const Head<T>& head;
  const Gradient<T>& gradient;
  BackwardWork<T>& work;
  const BackwardResult<T>& result;
  int64_t count_ = 0, queries_ = 0, first_ = 0, lanes_ = 0;
};

// Rows [count][width] of sums times a factor.
template <class T>
void write(const acc_t<T>* sums, acc_t<T> factor, int64_t count, int64_t width, T* out,
           int64_t stride) {
  for (int64_t i = 0; i < count; ++i) write_row(sums + i * width, factor, width, out + i * stride);
}

template <class T>
void backward(const Head<T>& head, const Gradient<T>& gradient, BackwardWork<T>& work,
              int64_t begin, int64_t end, const BackwardResult<T>& result) {
  BackwardPass<T>(head, gradient, work, result).run(begin, end);
}

template <class T>
Kernels<T> kernels() {
  return {&pack<T>, &attend<T>, &multiply_few<T>, &score<T>, &backward<T>, &write<T>};
}
