// SPDX-License-Identifier: Apache-2.0
// Attention's forward and scores. Included once per instruction set, in its namespace.
//
// All logits of a block of queries are in memory at once, so no online softmax is needed:
// qk = q k^T is written with the maximum of each row, one pass over each row turns qk into p, and
// out = p v / l_i. The buffer of a block stays in the L2 cache.

// Pack the keys that rows attend to, and with `values` their values, as right operands.
template <class T>
void pack_keys(const Head<T>& head, ForwardWork<T>& work, bool values) {
  work.keys.list_keys(head);
  pack_transposed(listed(head.k, work.keys.index, work.keys.count), work.k_t_panels, work.scratch);
  if (values) pack_panels(listed(head.v, work.keys.index, work.keys.count), work.v_panels);
}

TOKENOPS_INLINE float log2_of(float x) { return __builtin_log2f(x); }
TOKENOPS_INLINE double log2_of(double x) { return __builtin_log2(x); }

// ---- softmax of a row ----

// A row of a block: the query m, and its softmax.
template <class A>
struct Row {
  int64_t m;
  int64_t visible;      // the row attends to the first `visible` listed keys
  int64_t argmax;       // slot of the largest logit; -1 without eps
  A m_i;                // subtracted from the logits
  A l_i;                // sum of p, with the row's own key and eps
  A l_stored;           // the same sum of the stored p, which may be rounded to bfloat16
  int64_t dropped_key;  // own key that is not listed, or -1
  A p_dropped;          // p of dropped_key
};

// Replace the first `limit` slots of a row of qk by p = exp2(qk - m_i) * policy + eps_key of type
// P. Slots that are not visible get p 0. The own key has policy 1 under self_keep; under
// exclude_self l_i counts it, but its p is 0. Sets l_i, without eps, and l_stored.
template <class T, class P, class A>
TOKENOPS_INLINE void softmax_row(const Head<T>& head, A* qk, const A* policy, int64_t limit,
                                 A eps_key, int64_t own_slot, Row<A>& row) {
  using V = Vec<A>;
  constexpr bool kRounds = sizeof(P) < sizeof(A);  // to bfloat16
  P* const out = reinterpret_cast<P*>(qk);
  const V m_i = V::set1(row.m_i), lane = lane_indices<V>(qk);
  const bool self_keep = head.self_keep, exclude_self = head.exclude_self;
  const int64_t own_vector = own_slot < 0 ? -1 : own_slot / V::W;
  const int64_t num_visible = row.visible, full = num_visible / V::W,
                vectors = (limit + V::W - 1) / V::W;
  V l_i = V::zero(), l_stored = V::zero();
  for (int64_t v = 0; v < vectors; ++v) {
    V e = exp2(V::load(qk + v * V::W) - m_i), eps = V::set1(eps_key);
    V p = e * V::load(policy + v * V::W);
    if (v >= full) {
      const auto visible = gt(V::set1(static_cast<A>(num_visible - v * V::W)), lane);
      e = blend(visible, e, V::zero());
      p = blend(visible, p, V::zero());
      eps = blend(visible, eps, V::zero());
    }
    const bool has_own = v == own_vector;
    const auto is_own = eq(lane, V::set1(static_cast<A>(has_own ? own_slot - v * V::W : -1)));
    if (has_own && self_keep) p = blend(is_own, e, p);
    l_i = l_i + p;
    p = p + eps;
    if constexpr (kRounds) {
      p = round_words<T>(p);
      l_stored = l_stored + p;
    }
    if (has_own && exclude_self) p = blend(is_own, V::zero(), p);
    if constexpr (kRounds) {
      store_words<T>(p, out + v * V::W);
    } else {
      p.store(out + v * V::W);
    }
  }
  row.l_i = reduce_add(l_i);
  row.l_stored = kRounds ? reduce_add(l_stored) : row.l_i + eps_key * num_visible;
}

// The maximum of the first `visible` logits.
template <class A>
TOKENOPS_INLINE A max_of(const A* qk, int64_t visible) {
  using V = Vec<A>;
  const V lowest = V::set1(-infinity<A>()), lane = lane_indices<V>(qk);
  V most = lowest;
  for (int64_t n = 0; n < visible; n += V::W) {
    const auto valid = gt(V::set1(static_cast<A>(visible - n)), lane);
    most = max(blend(valid, V::load(qk + n), lowest), most);
  }
  return reduce_max(most);
}

// The first slot with this logit among the first `visible` ones; 0 if there is none (NaN logits).
template <class A>
TOKENOPS_INLINE int64_t find(const A* qk, int64_t visible, A value) {
  using V = Vec<A>;
  const V wanted = V::set1(value), none = V::set1(infinity<A>()), lane = lane_indices<V>(qk);
  V slot = none;
  for (int64_t n = 0; n < visible; n += V::W) {
    const V here = blend(eq(V::load(qk + n), wanted), lane + V::set1(static_cast<A>(n)), none);
    slot = min(here, slot);
  }
  const A first = -reduce_max(V::zero() - slot);  // the minimum
  return first < static_cast<A>(visible) ? static_cast<int64_t>(first) : 0;
}

// ---- softmax of a block ----

// work.qk = scale * log2(e) * q k^T + log2(size), for a number of tiles of packed queries and the
// first `limit` slots; work.row_max = the maximum of all these slots, by row and lane.
template <class T>
TOKENOPS_INLINE void multiply_qk(const Head<T>& head, const ForwardWork<T>& work, int64_t tiles,
                                 int64_t limit) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t depth = depth_words<T>(head.k.dim);
  const V scale = V::set1(head.scale_log2());
  for_each_panel(
      work.k_t_panels, depth, work.keys.count, limit, [&](int64_t column, auto n, const A* panel) {
        constexpr int N = decltype(n)::value;
        for (int64_t t = 0; t < tiles; ++t) {
          V sum[kTile][N] = {};
          multiply_tile<T, N>(work.q_rows + t * kTile * depth, depth, 1, panel, depth, sum);
#pragma GCC unroll 8
          for (int i = 0; i < kTile; ++i) {
            const int64_t row = t * kTile + i;
            A* const row_max = work.row_max + row * V::W;
            V m_i = column == 0 ? V::set1(-infinity<A>()) : V::load(row_max);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) {
              const V log2_size = V::load(work.keys.log2_size + column + j * V::W);
              const V qk = fma(sum[i][j], scale, log2_size);
              qk.store(work.qk + row * work.stride + column + j * V::W);
              m_i = max(qk, m_i);
            }
            m_i.store(row_max);
          }
        }
      });
}

// One row of work.qk, from its dot products with all keys, listed or not.
template <class T, class A>
TOKENOPS_INLINE void scale_dots(const Head<T>& head, const KeyList<A>& keys, const A* dots,
                                int64_t limit, A* qk) {
  using V = Vec<A>;
  const A scale = head.scale_log2();
  if (keys.count < head.k.count) {
    const int64_t columns = round_up(limit, V::W);
    for (int64_t n = 0; n < columns; ++n) {
      qk[n] = n < limit ? dots[keys.index[n]] * scale + keys.log2_size[n] : -infinity<A>();
    }
    return;
  }
  for (int64_t n = 0; n < limit; n += V::W) {
    const V x = load_some<V>(dots + n, keys.count - n);
    fma(x, V::set1(scale), V::load(keys.log2_size + n)).store(qk + n);
  }
}

// Softmax of at most block_m queries q: writes p, of type P, to work.qk, and fills `rows`. Row i is
// query q.index[i], or start_m + i. If `lse` is not null, m_i is lse, which normalises p. `dots` is
// null or q . k [Nq][Nk]. Returns the number of slots that some row attends to.
template <class T, class P>
int64_t softmax_block(const Head<T>& head, const ForwardWork<T>& work, const Tokens<T>& q,
                      int64_t start_m, const acc_t<T>* lse, const acc_t<T>* dots,
                      Row<acc_t<T>>* rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const KeyList<A>& keys = work.keys;
  int64_t limit = 0;
  for (int64_t i = 0; i < q.count; ++i) {
    rows[i].m = q.index == nullptr ? start_m + i : q.index[i];
    const bool empty = lse != nullptr && lse[rows[i].m] == -infinity<A>();
    rows[i].visible = empty ? 0 : keys.visible(head, head.position(rows[i].m));
    rows[i].dropped_key = empty ? -1 : head.dropped_own_key(rows[i].m);
    limit = rows[i].visible > limit ? rows[i].visible : limit;
  }
  // row_max is over `limit` slots, of which a causal row may see fewer.
  const bool has_row_max = !head.is_causal && dots == nullptr;
  if (dots == nullptr) {
    pack_rows(q, work.q_rows);
    multiply_qk(head, work, (q.count + kTile - 1) / kTile, limit);
  }

  for (int64_t i = 0; i < q.count; ++i) {
    Row<A>& row = rows[i];
    A* const qk = work.qk + i * work.stride;
    if (dots != nullptr) scale_dots(head, keys, dots + row.m * head.k.count, limit, qk);
    const int64_t position = head.position(row.m);
    const bool has_own_key = position >= 0 && position < head.k.count;
    const bool has_dropped = row.dropped_key >= 0;
    A qk_dropped = -infinity<A>();
    if (has_dropped) {
      qk_dropped = dot(q.row(i), head.k.row(row.dropped_key), q.dim) * head.scale_log2() +
                   head.log2_size[row.dropped_key];
    }
    A m_i = qk_dropped;
    if (lse != nullptr) {
      m_i = lse[row.m] * static_cast<A>(kLog2E);
    } else if (row.visible > 0) {
      const A max_listed =
          has_row_max ? reduce_max(V::load(work.row_max + i * V::W)) : max_of(qk, row.visible);
      m_i = max_listed > qk_dropped || !has_dropped ? max_listed : qk_dropped;  // keeps NaN
    }
    const bool empty = row.visible == 0 && !has_dropped;
    row.m_i = empty || m_i == -infinity<A>() ? 0 : m_i;
    row.argmax = head.eps > 0 && row.visible > 0 ? find(qk, row.visible, row.m_i) : -1;
    const A eps_key = row.visible > 0 ? head.eps / static_cast<A>(row.visible) : 0;
    softmax_row<T, P>(head, qk, keys.policy, limit, eps_key, has_own_key ? keys.slot[position] : -1,
                      row);
    row.p_dropped = has_dropped ? exp2_of(qk_dropped - row.m_i) : 0;
    row.l_i = row.l_i + row.p_dropped + (row.visible > 0 ? head.eps : 0);
    row.l_stored = row.l_stored + row.p_dropped;
  }
  return limit;
}

// ---- forward ----

// Rows [begin, end) of out, lse, p_eps and argmax.
template <class T>
void forward(const Head<T>& head, const ForwardWork<T>& work, int64_t begin, int64_t end,
             const ForwardResult<T>& result) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t dim = head.v.dim, padded = round_up(dim, V::W);
  const int64_t depth = depth_words<T>(work.keys.count);
  Row<A> rows[kMaxBlockM];
  for (int64_t start_m = begin; start_m < end; start_m += work.block_m) {
    Tokens<T> q = head.q;
    q.data += start_m * q.stride;
    q.count = end - start_m < work.block_m ? end - start_m : work.block_m;
    const int64_t limit =
        softmax_block<T, typename Packed<T>::type>(head, work, q, start_m, nullptr, nullptr, rows);
    for (int64_t t = 0; t < q.count; t += kTile) {
      for_each_panel(work.v_panels, depth, dim, dim, [&](int64_t column, auto n, const A* panel) {
        constexpr int N = decltype(n)::value;
        V acc[kTile][N] = {};
        multiply_tile<T, N>(work.qk + t * work.stride, work.stride, 1, panel, depth_words<T>(limit),
                            acc);
        store_tile(acc, work.acc + column, padded);
      });
      for (int64_t i = t; i < q.count && i < t + kTile; ++i) {
        const Row<A>& row = rows[i];
        A* const acc = work.acc + (i - t) * padded;
        if (row.p_dropped > 0 && !head.exclude_self) {
          add_scaled(head.v.row(row.dropped_key), row.p_dropped, dim, acc);
        }
        const bool empty = row.l_i == 0;
        write_row(acc, empty ? 0 : 1 / row.l_stored, dim, result.out + row.m * result.out_stride);
        result.lse[row.m] =
            empty ? -infinity<A>() : (row.m_i + log2_of(row.l_i)) * static_cast<A>(kLn2);
        if (result.p_eps != nullptr) {
          result.p_eps[row.m] = empty ? 0 : head.eps / row.l_i;
          result.argmax[row.m] = row.argmax < 0 ? -1 : work.keys.index[row.argmax];
        }
      }
    }
  }
}

// ---- scores ----

// score[n] += sum over the queries m of rows.index of query_weight[m] * p[m][n] / l_i[m].
template <class T>
void scores(const Head<T>& head, const ForwardWork<T>& work, const ScoreRows<acc_t<T>>& rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t columns = round_up(work.keys.count, V::W);
  std::memset(work.column_sums, 0, columns * sizeof(A));
  // eps is relative to m_i, which lse does not tell.
  const A* const lse = head.eps > 0 ? nullptr : rows.lse;
  Row<A> block[kMaxBlockM];
  A factor[kMaxBlockM];
  for (int64_t start = 0; start < rows.count; start += work.block_m) {
    Tokens<T> q = head.q;
    q.index = rows.index + start;
    q.count = rows.count - start < work.block_m ? rows.count - start : work.block_m;
    const int64_t limit = softmax_block<T, A>(head, work, q, 0, lse, rows.dots, block);
    for (int64_t i = 0; i < q.count; ++i) {
      const A w = rows.query_weight == nullptr ? 1 : rows.query_weight[block[i].m];
      factor[i] = block[i].l_i == 0 ? 0 : lse == nullptr ? w / block[i].l_i : w;
      if (block[i].p_dropped > 0 && !head.exclude_self) {
        rows.score[block[i].dropped_key] += factor[i] * block[i].p_dropped;
      }
    }
    for (int64_t n = 0; n < limit; n += V::W) {
      V sum = V::load(work.column_sums + n);
      for (int64_t i = 0; i < q.count; ++i) {
        sum = fma(V::set1(factor[i]), V::load(work.qk + i * work.stride + n), sum);
      }
      sum.store(work.column_sums + n);
    }
  }
  if (work.keys.count == head.k.count) {
    for (int64_t n = 0; n < work.keys.count; ++n) rows.score[n] += work.column_sums[n];
    return;
  }
  for (int64_t i = 0; i < work.keys.count; ++i) {
    rows.score[work.keys.index[i]] += work.column_sums[i];
  }
}
