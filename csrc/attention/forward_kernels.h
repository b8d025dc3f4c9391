// SPDX-License-Identifier: Apache-2.0
// Attention's forward pass and the attention that keys receive: included once per instruction set,
// in its namespace.
//
// A group of rows holds all its logits at once: Q K^T writes them, with the largest one of each row
// on the side; one pass over each row makes weights of them; weights times V are the output. Whole
// rows need no rescaling, and a buffer of them stays in the second-level cache.

// Keys and values as the right operands.
template <class T>
void pack(const Head<T>& head, ForwardWork<T>& work, bool values) {
  work.keys.fill(head, true, head.eps > 0);
  const auto listed = [&](Tokens<T> x) {
    x.list = work.keys.list;
    x.count = work.keys.count;
    return x;
  };
  pack_columns(listed(head.k), work.key_panels, work.work);
  if (values) pack_panels(listed(head.v), work.value_panels);
}

// How one row's logits become weights.
template <class A>
struct RowPlan {
  A top;         // subtracted from each logit
  A spread;      // added to each weight
  int64_t seen;  // the first keys of the list
  int64_t own;   // place of the row's own key in the list, or -1
  bool keep_own, drop_own;
};

TOKENOPS_INLINE float log2_of(float x) { return __builtin_log2f(x); }
TOKENOPS_INLINE double log2_of(double x) { return __builtin_log2(x); }

template <class A>
struct Sums {
  A exact;    // of exp2(x - top) * weight
  A applied;  // of the weights as they are stored, with what was added to them
};

// Replace logits by weights exp2(x - top) * weight + spread, up to `limit` keys.
template <class T, class P, class A>
TOKENOPS_INLINE Sums<A> weigh_row(A* logits, const A* weight, int64_t limit,
                                  const RowPlan<A>& row) {
  using V = Vec<A>;
  P* const out = reinterpret_cast<P*>(logits);
  const V top = V::set1(row.top), spread = V::set1(row.spread), lane = lane_numbers<V>(logits);
  const int64_t own = row.own < 0 ? -1 : row.own / V::W;
  const int64_t full = row.seen / V::W, vectors = (limit + V::W - 1) / V::W;
  V exact = V::zero(), applied = V::zero();
  for (int64_t v = 0; v < vectors; ++v) {
    V e = exp2(V::load(logits + v * V::W) - top), all = spread;
    V w = e * V::load(weight + v * V::W);
    if (v >= full) {
      const auto seen = gt(V::set1(static_cast<A>(row.seen - v * V::W)), lane);
      e = blend(seen, e, V::zero());
      w = blend(seen, w, V::zero());
      all = blend(seen, all, V::zero());
    }
    const bool has_own = v == own;
    const auto is_own = eq(lane, V::set1(static_cast<A>(has_own ? row.own - v * V::W : -1)));
    if (has_own && row.keep_own) w = blend(is_own, e, w);
    exact = exact + w;
    w = w + all;
    if constexpr (sizeof(P) < sizeof(A)) {
      w = round_words<T>(w);
      applied = applied + w;
    }
    if (has_own && row.drop_own) w = blend(is_own, V::zero(), w);
    if constexpr (sizeof(P) < sizeof(A)) {
      store_words<T>(w, out + v * V::W);
    } else {
      w.store(out + v * V::W);
    }
  }
  const A sum = reduce_add(exact);
  return {sum, sizeof(P) < sizeof(A) ? reduce_add(applied) : sum + row.spread * row.seen};
}

// Largest of the first `seen` logits.
template <class A>
TOKENOPS_INLINE A largest(const A* logits, int64_t seen) {
  using V = Vec<A>;
  const V lowest = V::set1(-infinity<A>()), lane = lane_numbers<V>(logits);
  V top = lowest;
  for (int64_t k = 0; k < seen; k += V::W) {
    const auto valid = gt(V::set1(static_cast<A>(seen - k)), lane);
    top = max(blend(valid, V::load(logits + k), lowest), top);
  }
  return reduce_max(top);
}

// First place of a value among the first `seen` logits; 0 if it is not there.
template <class A>
TOKENOPS_INLINE int64_t find(const A* logits, int64_t seen, A value) {
  using V = Vec<A>;
  const V wanted = V::set1(value), none = V::set1(infinity<A>()), lane = lane_numbers<V>(logits);
  V place = none;
  for (int64_t k = 0; k < seen; k += V::W) {
    const V here = blend(eq(V::load(logits + k), wanted), lane + V::set1(static_cast<A>(k)), none);
    place = min(here, place);
  }
  const A first = -reduce_max(V::zero() - place);
  return first < static_cast<A>(seen) ? static_cast<int64_t>(first) : 0;
}

// A row after its logits have become weights.
template <class A>
struct Row {
  int64_t query;
  int64_t seen;     // keys of the list
  A top;            // what its logits were compared with
  A total;          // sum of its weights, with eps
  A applied;        // the same of weights that were rounded to be stored
  A own;            // weight of its own key, where the list does not hold that
  int64_t own_key;  // that key, or -1
  int64_t argmax;   // place of the largest logit, with eps
};

// Largest logit of each row and lane, or without `tops` the logits alone.
template <class T>
TOKENOPS_INLINE void multiply_keys(const Head<T>& head, const ForwardWork<T>& work, int64_t tiles,
                                   int64_t limit, bool tops) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t depth = depth_words<T>(head.k.width);
  const V slope = V::set1(head.slope());
  for_each_panel(
      work.key_panels, depth, work.keys.count, limit, [&](int64_t column, auto n, const A* panel) {
        constexpr int N = decltype(n)::value;
        for (int64_t t = 0; t < tiles; ++t) {
          V sum[kTile][N] = {};
          multiply_tile<T, N>(work.rows + t * kTile * depth, depth, 1, panel, depth, sum);
#pragma GCC unroll 8
          for (int i = 0; i < kTile; ++i) {
            const int64_t row = t * kTile + i;
            A* const best = work.best + row * V::W;
            V top = column == 0 ? V::set1(-infinity<A>()) : V::load(best);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) {
              const V bias = V::load(work.keys.bias + column + j * V::W);
              const V x = fma(sum[i][j], slope, bias);
              x.store(work.scores + row * work.stride + column + j * V::W);
              top = max(x, top);
            }
            if (tops) top.store(best);
          }
        }
      });
}

// Logits of a row from its products with all keys.
template <class T, class A>
TOKENOPS_INLINE void take_products(const Head<T>& head, const KeyList<A>& keys, const A* products,
                                   int64_t limit, A* logits) {
  using V = Vec<A>;
  const A slope = head.slope();
  if (keys.count < head.k.count) {
    const int64_t columns = round_up(limit, V::W);
    for (int64_t k = 0; k < columns; ++k) {
      logits[k] = k < limit ? products[keys.list[k]] * slope + keys.bias[k] : -infinity<A>();
    }
    return;
  }
  for (int64_t k = 0; k < limit; k += V::W) {
    const V x = load_some<V>(products + k, keys.count - k);
    fma(x, V::set1(slope), V::load(keys.bias + k)).store(logits + k);
  }
}

// Turn the queries x, a group at most, into weights in work.scores, of the type P: query i is
// `first` + i or x.list[i]. With `lse` the weights are shares of their row at once, with
// `products` [Nq][Nk] nothing is multiplied. Returns up to which key of the list rows see.
template <class T, class P>
int64_t weigh_group(const Head<T>& head, const ForwardWork<T>& work, const Tokens<T>& x,
                    int64_t first, const acc_t<T>* lse, const acc_t<T>* products,
                    Row<acc_t<T>>* rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const KeyList<A>& keys = work.keys;
  int64_t limit = 0;
  for (int64_t i = 0; i < x.count; ++i) {
    rows[i].query = x.list == nullptr ? first + i : x.list[i];
    const bool empty = lse != nullptr && lse[rows[i].query] == -infinity<A>();
    rows[i].seen = empty ? 0 : keys.seen(head, head.place_of(rows[i].query));
    rows[i].own_key = empty ? -1 : head.own_dropped(rows[i].query);
    limit = rows[i].seen > limit ? rows[i].seen : limit;
  }
  const bool tops = !head.is_causal && lse == nullptr && products == nullptr;
  if (products == nullptr) {
    pack_rows(x, work.rows);
    multiply_keys(head, work, (x.count + kTile - 1) / kTile, limit, tops);
  }

  for (int64_t i = 0; i < x.count; ++i) {
    Row<A>& row = rows[i];
    A* const logits = work.scores + i * work.stride;
    if (products != nullptr) {
      take_products(head, keys, products + row.query * head.k.count, limit, logits);
    }
    const int64_t place = head.place_of(row.query);
    const bool is_key = place >= 0 && place < head.k.count;
    A own = -infinity<A>();
    if (row.own_key >= 0) {
      own = dot(x.row(i), head.k.row(row.own_key), x.width) * head.slope() +
            head.log_size[row.own_key];
    }
    A top = own;
    if (lse != nullptr) {
      top = lse[row.query] * static_cast<A>(kLog2E);
    } else if (row.seen > 0) {
      const A listed = tops ? reduce_max(V::load(work.best + i * V::W)) : largest(logits, row.seen);
      top = listed > own || row.own_key < 0 ? listed : own;
    }
    const bool nothing = row.seen == 0 && row.own_key < 0;
    row.top = nothing || top == -infinity<A>() ? 0 : top;
    row.argmax = head.eps > 0 && row.seen > 0 ? find(logits, row.seen, row.top) : -1;
    const A spread = row.seen > 0 ? head.eps / static_cast<A>(row.seen) : 0;
    const RowPlan<A> plan = {row.top,        spread,
                             row.seen,       is_key ? keys.slot[place] : -1,
                             head.self_keep, head.exclude_self};
    const Sums<A> sums = weigh_row<T, P>(logits, keys.weight, limit, plan);
    row.own = 0;
    if (row.own_key >= 0) {
      A lanes[V::W];
      exp2(V::set1(own - row.top)).store(lanes);
      row.own = lanes[0];
    }
    row.total = sums.exact + row.own + (row.seen > 0 ? head.eps : 0);
    row.applied = sums.applied + row.own;
  }
  return limit;
}

// Rows [begin, end) of the output.
template <class T>
void attend(const Head<T>& head, const ForwardWork<T>& work, int64_t begin, int64_t end,
            const ForwardResult<T>& result) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = head.v.width, padded = round_up(width, V::W);
  const int64_t depth = depth_words<T>(work.keys.count);
  Row<A> rows[kMostRows];
  for (int64_t g = begin; g < end; g += work.group) {
    Tokens<T> x = head.q;
    x.data += g * x.stride;
    x.count = end - g < work.group ? end - g : work.group;
    const int64_t limit =
        weigh_group<T, typename Packed<T>::type>(head, work, x, g, nullptr, nullptr, rows);
    for (int64_t t = 0; t * kTile < x.count; ++t) {
      for_each_panel(work.value_panels, depth, width, width,
                     [&](int64_t column, auto n, const A* panel) {
                       constexpr int N = decltype(n)::value;
                       V sum[kTile][N] = {};
                       multiply_tile<T, N>(work.scores + t * kTile * work.stride, work.stride, 1,
                                           panel, depth_words<T>(limit), sum);
                       for (int i = 0; i < kTile; ++i) {
                         for (int j = 0; j < N; ++j) {
                           sum[i][j].store(work.tile + i * padded + column + j * V::W);
                         }
                       }
                     });
      for (int64_t i = t * kTile; i < x.count && i < (t + 1) * kTile; ++i) {
        const Row<A>& row = rows[i];
        A* const out = work.tile + (i - t * kTile) * padded;
        if (row.own > 0 && !head.exclude_self) {
          add_scaled(head.v.row(row.own_key), row.own, width, out);
        }
        const bool empty = row.total == 0;
        write_row(out, empty ? 0 : 1 / row.applied, width, result.out + row.query * result.stride);
        result.lse[row.query] =
            empty ? -infinity<A>() : (row.top + log2_of(row.total)) * static_cast<A>(kLn2);
        if (result.floor != nullptr) {
          result.floor[row.query] = empty ? 0 : head.eps / row.total;
          result.argmax[row.query] = row.argmax < 0 ? -1 : work.keys.list[row.argmax];
        }
      }
    }
  }
}

// Sums over the listed rows of their weighted attention, by key.
template <class T>
void score(const Head<T>& head, const ForwardWork<T>& work, const ScoreRows<acc_t<T>>& rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t columns = round_up(work.keys.count, V::W);
  std::memset(work.columns, 0, columns * sizeof(A));
  const A* const lse = head.eps > 0 ? nullptr : rows.lse;  // the share of eps needs the maximum
  Row<A> row[kMostRows];
  A factor[kMostRows];
  for (int64_t g = 0; g < rows.count; g += work.group) {
    Tokens<T> x = head.q;
    x.list = rows.list + g;
    x.count = rows.count - g < work.group ? rows.count - g : work.group;
    const int64_t limit = weigh_group<T, A>(head, work, x, 0, lse, rows.products, row);
    for (int64_t i = 0; i < x.count; ++i) {
      const A weight = rows.weight == nullptr ? 1 : rows.weight[row[i].query];
      factor[i] = row[i].total == 0 ? 0 : lse == nullptr ? weight / row[i].total : weight;
      if (row[i].own > 0 && !head.exclude_self) {
        rows.score[row[i].own_key] += factor[i] * row[i].own;
      }
    }
    for (int64_t k = 0; k < limit; k += V::W) {
      V sum = V::load(work.columns + k);
      for (int64_t i = 0; i < x.count; ++i) {
        sum = fma(V::set1(factor[i]), V::load(work.scores + i * work.stride + k), sum);
      }
      sum.store(work.columns + k);
    }
  }
  if (work.keys.count == head.k.count) {
    for (int64_t k = 0; k < work.keys.count; ++k) rows.score[k] += work.columns[k];
    return;
  }
  for (int64_t k = 0; k < work.keys.count; ++k) rows.score[work.keys.list[k]] += work.columns[k];
}
