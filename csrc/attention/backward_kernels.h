// SPDX-License-Identifier: Apache-2.0
// Attention's backward. Included once per instruction set, in its namespace.
//
// Tiles are transposed: rows are keys, columns are queries. For a tile of keys and a panel of
// queries, k q^T and dp = v dout^T are written from registers to the L1 cache, where one pass turns
// them into p and ds and sums dpolicy and dlog_size. Then, for a block of keys, dv = p dout,
// dk = ds q and dq += ds^T k. With
//
//   e         = exp2(qk - lse2), the probability before the policy
//   w         = policy, but 1 for the own key under self_keep
//   p_eps_key = p_eps / number of keys that the row attends to
//
// the pass computes
//
//   p         = w e + p_eps_key, the factor of v
//   ds        = w e (dp - delta), plus p_eps (mean(dp) - delta) at argmax
//   dpolicy   = sum of e (dp - delta) over queries, except a key's own query under self_keep
//   dlog_size = sum of ds over queries

// The index of a key that pads a tile; it equals no position and no argmax, which are at least -1.
constexpr int kNoKey = -2;

// A tile of kTile keys by the queries of a panel.
template <class A>
struct TileTask {
  const A *log2_size, *policy, *key;  // [kTile]; key: the indices of the keys, or kNoKey
  const A *lse2, *delta, *p_eps_key, *ds_argmax, *position, *argmax;  // of the panel's queries
  A *p, *ds;    // outputs, kTile rows `stride` apart
  A* ds_pairs;  // output, kTile / 2 rows
  int64_t stride;
  A *dpolicy, *dlog_size;  // [kTile][lanes of a vector], sums to add to
};

// Computes p, ds and the sums from a tile of q . k and of dp [kTile][N vectors]; without kAttended,
// for dropped keys that no row attends to, dpolicy only.
template <class T, bool kAttended, int N, class A>
TOKENOPS_INLINE void softmax_backward_tile(const Head<T>& head, const TileTask<A>& task,
                                           const A* dot_tile, const A* dp_tile) {
  using V = Vec<A>;
  using P = typename Packed<T>::type;
  const V scale = V::set1(head.scale_log2()), zero = V::zero(), one = V::set1(1);
  const bool has_own = head.self_keep || head.exclude_self, causal = head.is_causal;
  const bool has_eps = head.eps > 0;
  V even[N];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    // For a kept key, dpolicy sums w e (dp - delta) and is divided by the policy at the end: w e is
    // at most 1, but e has no bound if the policy is small.
    const bool kept = kAttended && task.policy[i] > 0;
    const V max_exponent = V::set1(kept ? kMaxExponent<A> : kMaxExponentDropped<A>);
    const V log2_size = V::set1(task.log2_size[i]), policy = V::set1(task.policy[i]);
    const V key = V::set1(task.key[i]);
    V dpolicy = V::load(task.dpolicy + i * V::W), dlog_size = V::load(task.dlog_size + i * V::W);
    P* const p_out = reinterpret_cast<P*>(task.p + i * task.stride);
    P* const ds_out = reinterpret_cast<P*>(task.ds + i * task.stride);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const int64_t m = j * V::W;
      const V qk = fma(V::load(dot_tile + i * N * V::W + m), scale, log2_size);
      V e = exp2(min(max_exponent, qk - V::load(task.lse2 + m)));
      V p_eps_key = V::load(task.p_eps_key + m);
      const V position = V::load(task.position + m), delta = V::load(task.delta + m);
      if (causal) {
        const auto masked = gt(key, position);
        e = blend(masked, zero, e);
        p_eps_key = blend(masked, zero, p_eps_key);
      }
      V dp = V::load(dp_tile + i * N * V::W + m);
      const auto is_own = eq(key, position);
      if (has_own && head.exclude_self) dp = blend(is_own, zero, dp);
      V p = e * (head.self_keep ? blend(is_own, one, policy) : policy);
      const V product = (kept ? p : e) * (dp - delta);
      dpolicy = dpolicy + (head.self_keep ? blend(is_own, zero, product) : product);
      if (!kAttended) continue;
      V ds = kept ? product : head.self_keep ? blend(is_own, product, zero) : zero;
      p = p + p_eps_key;
      if (has_own && head.exclude_self) p = blend(is_own, zero, p);
      if (has_eps) {
        const auto is_argmax = eq(key, V::load(task.argmax + m));
        ds = ds + blend(is_argmax, V::load(task.ds_argmax + m), zero);
      }
      dlog_size = dlog_size + ds;
      store_words<T>(p, p_out + m);
      store_words<T>(ds, ds_out + m);
#if TOKENOPS_PAIRS
      if constexpr (kPairs<T>) {
        if (i % 2 == 0) {
          even[j] = ds;
        } else {
          pair_up(even[j], ds).store(task.ds_pairs + i / 2 * task.stride + m);
        }
      }
#endif
    }
    dpolicy.store(task.dpolicy + i * V::W);
    dlog_size.store(task.dlog_size + i * V::W);
  }
  (void)even;
}

// The backward of one head for the queries [begin, end).
template <class T>
class BackwardPass {
  using A = acc_t<T>;
  using V = Vec<A>;

 public:
  BackwardPass(const Head<T>& head, const BackwardInputs<T>& inputs, BackwardWork<T>& work,
               const BackwardResult<T>& result)
      : head(head), in(inputs), work(work), result(result) {}

  void run(int64_t begin, int64_t end) {
    list_queries(begin, end);
    if (num_queries_ > 0) pack_keys();
    const int64_t blocks = (num_queries_ + kMaxQueries - 1) / kMaxQueries;
    for (int64_t b = 0; b < blocks; ++b) {
      pack_queries(num_queries_ * b / blocks, num_queries_ * (b + 1) / blocks);
      run_list<true>(work.keys, 0);
      if (in.need_dropped) run_list<false>(work.dropped, round_up(work.keys.count, kTile));
      for (int64_t i = 0; i < block_m_; ++i) add_dropped_own_key(i);
      write_dq();
    }
  }

 private:
  // List the queries that have a gradient in query_index; dq of the others is zero.
  void list_queries(int64_t begin, int64_t end) {
    num_queries_ = 0;
    for (int64_t m = begin; m < end; ++m) {
      const A grad_lse = in.grad_lse == nullptr ? 0 : in.grad_lse[m];
      if (in.lse[m] != -infinity<A>() &&
          (grad_lse != 0 || any_nonzero(in.dout.row(m), in.dout.dim))) {
        work.query_index[num_queries_++] = static_cast<int32_t>(m);
      } else if (head.q.dim > 0) {  // else dq may be null
        std::memset(static_cast<void*>(result.dq + m * result.dq_stride), 0,
                    head.q.dim * sizeof(T));
      }
    }
  }
  static bool any_nonzero(const T* x, int64_t dim) {
    V count = V::zero();  // of nonzero elements; NaN is one
    for (int64_t d = 0; d < dim; d += V::W) {
      const V v = load_some<V>(x + d, dim - d);
      count = count + blend(eq(v, V::zero()), V::zero(), V::set1(1));
    }
    return reduce_add(count) > 0;
  }

  // Pack k and v of the listed keys and, if needed, of the dropped ones.
  void pack_keys() {
    const KeyList<A>&keys = work.keys, &dropped = work.dropped;
    work.keys.list_keys(head);
    pack_rows(listed(head.k, keys.index, keys.count), work.k_rows);
    pack_rows(listed(head.v, keys.index, keys.count), work.v_rows);
    pack_panels(listed(head.k, keys.index, keys.count), work.k_panels);
    if (in.need_dropped) {
      const int64_t start = round_up(keys.count, kTile);
      work.dropped.list_dropped(head);
      pack_rows(listed(head.k, dropped.index, dropped.count),
                work.k_rows + start * depth_words<T>(head.k.dim));
      pack_rows(listed(head.v, dropped.index, dropped.count),
                work.v_rows + start * depth_words<T>(head.v.dim));
    }
    if (head.eps > 0) sum_values();
  }

  // Sum the values of the listed keys; for causal rows, write all prefix sums.
  void sum_values() {
    const int64_t dim = head.v.dim, row = row_words(dim);
    std::memset(work.v_sums, 0, row * sizeof(A));
    for (int64_t i = 0; i < work.keys.count; ++i) {
      A* sum = work.v_sums;
      if (head.is_causal) {
        sum += (i + 1) * row;
        std::memcpy(sum, sum - row, row * sizeof(A));
      }
      add_scaled(head.v.row(work.keys.index[i]), A(1), dim, sum);
    }
  }

  // Pack the listed queries [begin, end), and compute delta and the other numbers of each one.
  void pack_queries(int64_t begin, int64_t end) {
    block_m_ = end - begin;
    query_ = work.query_index + begin;
    const Tokens<T> q = listed(head.q, query_, block_m_), dout = listed(in.dout, query_, block_m_);
    pack_transposed(q, work.q_t_panels, work.scratch);
    pack_transposed(dout, work.dout_t_panels, work.scratch);
    pack_panels(q, work.q_panels);
    if (in.need_v) pack_panels(dout, work.dout_panels);
    std::memset(work.dq, 0, round_up(block_m_, kTile) * round_up(q.dim, V::W) * sizeof(A));
    for (int64_t i = 0; i < round_up(block_m_, V::W); ++i) {
      work.p_eps_key[i] = work.ds_argmax[i] = 0;
      work.argmax[i] = -1;
      if (i >= block_m_) {  // no query: p = exp2(-inf)
        work.lse2[i] = infinity<A>();
        work.delta[i] = 0;
        work.position[i] = -1;
        continue;
      }
      const int64_t m = query_[i], position = head.position(m);
      A delta = dot(dout.row(i), in.out.row(m), dout.dim);
      if (in.grad_lse != nullptr) delta -= in.grad_lse[m];
      work.lse2[i] = in.lse[m] * static_cast<A>(kLog2E);
      work.delta[i] = delta;
      work.position[i] = static_cast<A>(position < -1           ? -1
                                        : position < kMaxTokens ? position
                                                                : kMaxTokens);
      if (head.eps > 0) {
        // visible is 0 only if lse is not that of these inputs.
        const int64_t visible = work.keys.visible(head, position);
        const A count = static_cast<A>(visible > 0 ? visible : 1), p_eps = in.p_eps[m];
        A dp_sum =
            dot(dout.row(i), work.v_sums + (head.is_causal ? visible * row_words(head.v.dim) : 0),
                dout.dim);
        if (head.exclude_self && position >= 0 && position < head.k.count &&
            head.is_valid(position)) {
          dp_sum -= dot(dout.row(i), head.v.row(position), dout.dim);
        }
        work.p_eps_key[i] = p_eps / count;
        work.ds_argmax[i] = p_eps * (dp_sum / count - delta);
        work.argmax[i] = static_cast<A>(in.argmax[m]);
      }
    }
  }

  // Run all keys of a list, in blocks of about the same size. `first_row`: the first row of the
  // list in k_rows and v_rows.
  template <bool kAttended>
  void run_list(const KeyList<A>& keys, int64_t first_row) {
    const int64_t blocks = (keys.count + work.block_n - 1) / work.block_n;
    const int64_t step = blocks == 0 ? 1 : round_up((keys.count + blocks - 1) / blocks, kTile);
    for (int64_t n = 0; n < keys.count; n += step) {
      run_block<kAttended>(keys, n, n + step < keys.count ? n + step : keys.count, first_row);
    }
  }

  // Add what the slots [begin, end) of a list and all packed queries contribute to the gradients.
  template <bool kAttended>
  void run_block(const KeyList<A>& keys, int64_t begin, int64_t end, int64_t first_row) {
    const int64_t depth = depth_words<T>(head.k.dim), v_depth = depth_words<T>(head.v.dim);
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
    A* const dpolicy = work.lane_sums;
    A* const dlog_size = work.lane_sums + work.block_n * V::W;
    std::memset(work.lane_sums, 0, 2 * work.block_n * V::W * sizeof(A));
    A key[kMaxBlockN];
    for (int64_t i = 0; i < tiles * kTile; ++i) {
      key[i] = begin + i < end ? static_cast<A>(keys.index[begin + i]) : A(kNoKey);
    }
    for_each_panel(
        work.q_t_panels, depth, block_m_, block_m_, [&](int64_t column, auto n, const A* panel) {
          constexpr int N = decltype(n)::value;
          const A* const dout_panel = work.dout_t_panels + column * v_depth;
          alignas(64) A dots[kTile * N * V::W], dp[kTile * N * V::W];
          for (int64_t t = 0; t < tiles * kTile; t += kTile) {
            multiply<N>(work.k_rows + (first_row + begin + t) * depth, depth, panel, depth, dots);
            multiply<N>(work.v_rows + (first_row + begin + t) * v_depth, v_depth, dout_panel,
                        v_depth, dp);
            const int64_t word = column / kPerWord<T>;  // of rows of p and ds
            const TileTask<A> task = {keys.log2_size + begin + t,
                                      keys.policy + begin + t,
                                      key + t,
                                      work.lse2 + column,
                                      work.delta + column,
                                      work.p_eps_key + column,
                                      work.ds_argmax + column,
                                      work.position + column,
                                      work.argmax + column,
                                      work.p + t * work.stride + word,
                                      work.ds + t * work.stride + word,
                                      work.ds_pairs + t / 2 * work.stride + column,
                                      work.stride,
                                      dpolicy + t * V::W,
                                      dlog_size + t * V::W};
            softmax_backward_tile<T, kAttended, N>(head, task, dots, dp);
          }
        });
    for (int64_t i = 0; i < end - begin; ++i) {
      const int32_t n = keys.index[begin + i];
      if (result.dpolicy != nullptr) {
        const A policy = keys.policy[begin + i];
        result.dpolicy[n] +=
            reduce_add(V::load(dpolicy + i * V::W)) / (kAttended && policy > 0 ? policy : 1);
      }
      if (kAttended && result.dlog_size != nullptr) {
        result.dlog_size[n] += reduce_add(V::load(dlog_size + i * V::W));
      }
    }
    if (!kAttended) return;
    const int64_t query_words = depth_words<T>(block_m_);
    for (int64_t t = 0; t < tiles * kTile; t += kTile) {
      const int32_t* const index = keys.index + begin + t;
      const int64_t left = end - begin - t, count = left < kTile ? left : kTile;
      if (in.need_v) {
        add_rows(work.p + t * work.stride, work.dout_panels, query_words, head.v.dim, index, count,
                 result.dv);
      }
      add_rows(work.ds + t * work.stride, work.q_panels, query_words, head.k.dim, index, count,
               result.dk);
    }
    add_dq(begin, depth_words<T>(end - begin));
  }

  // out[kTile][N * W] = a tile of rows a, `stride` apart, times a panel.
  template <int N>
  static TOKENOPS_INLINE void multiply(const A* a, int64_t stride, const A* panel, int64_t depth,
                                       A* out) {
    V sum[kTile][N] = {};
    multiply_tile<T, N>(a, stride, 1, panel, depth, sum);
    store_tile(sum, out, N * V::W);
  }

  // out[index[i]] += row i of a @ b, for a tile a of p or ds and panels b [depth][dim].
  void add_rows(const A* a, const A* b, int64_t depth, int64_t dim, const int32_t* index,
                int64_t count, A* out) {
    const int64_t padded = round_up(dim, V::W);
    for_each_panel(b, depth, dim, dim, [&](int64_t column, auto n, const A* panel) {
      constexpr int N = decltype(n)::value;
      V acc[kTile][N] = {};
      multiply_tile<T, N>(a, work.stride, 1, panel, depth, acc);
      store_tile(acc, work.acc + column, padded);
    });
    for (int64_t i = 0; i < count; ++i) {
      add_scaled(work.acc + i * padded, A(1), dim, out + index[i] * dim);
    }
  }

  // dq += ds^T k, for a block of keys that starts at slot start_n and has `depth` words.
  void add_dq(int64_t start_n, int64_t depth) {
    const int64_t dim = head.q.dim, padded = round_up(dim, V::W);
    const A* const ds = kPairs<T> ? work.ds_pairs : work.ds;
    const int64_t all_words = depth_words<T>(work.keys.count), first_word = depth_words<T>(start_n);
    for_each_panel(work.k_panels, all_words, dim, dim, [&](int64_t column, auto n, const A* panel) {
      constexpr int N = decltype(n)::value;
      for (int64_t i = 0; i < block_m_; i += kTile) {
        A* const dq = work.dq + i * padded + column;
        V acc[kTile][N];
        for (int r = 0; r < kTile; ++r) {
          for (int j = 0; j < N; ++j) acc[r][j] = V::load(dq + r * padded + j * V::W);
        }
        multiply_tile<T, N>(ds + i, 1, work.stride, panel + first_word * N * V::W, depth, acc);
        store_tile(acc, dq, padded);
      }
    });
  }

  // Add what the own key of query i contributes if it is dropped but self_keep keeps it.
  void add_dropped_own_key(int64_t i) {
    const int64_t m = query_[i], key = head.dropped_own_key(m);
    if (key < 0) return;
    const T *const q = head.q.row(m), *const k = head.k.row(key), *const v = head.v.row(key);
    const T* const dout = in.dout.row(m);
    const int64_t dim = head.q.dim, v_dim = head.v.dim;
    const A log2_p = dot(q, k, dim) * head.scale_log2() + head.log2_size[key] - work.lse2[i];
    const A p = exp2_of(kMaxExponentDropped<A> < log2_p ? kMaxExponentDropped<A> : log2_p);
    const A ds = p * ((head.exclude_self ? 0 : dot(dout, v, v_dim)) - work.delta[i]);
    add_scaled(k, ds, dim, work.dq + i * round_up(dim, V::W));
    add_scaled(q, ds, dim, result.dk + key * dim);
    if (in.need_v && !head.exclude_self) add_scaled(dout, p, v_dim, result.dv + key * v_dim);
    if (result.dlog_size != nullptr) result.dlog_size[key] += ds;
  }

  void write_dq() {
    const int64_t dim = head.q.dim, padded = round_up(dim, V::W);
    for (int64_t i = 0; i < block_m_; ++i) {
      write_row(work.dq + i * padded, head.scale, dim, result.dq + query_[i] * result.dq_stride);
    }
  }

  const Head<T>& head;
  const BackwardInputs<T>& in;
  BackwardWork<T>& work;
  const BackwardResult<T>& result;
  int64_t num_queries_ = 0;         // that have a gradient
  int64_t block_m_ = 0;             // queries that are packed
  const int32_t* query_ = nullptr;  // [block_m_], their indices
};

template <class T>
void backward(const Head<T>& head, const BackwardInputs<T>& inputs, BackwardWork<T>& work,
              int64_t begin, int64_t end, const BackwardResult<T>& result) {
  BackwardPass<T>(head, inputs, work, result).run(begin, end);
}

// out = factor * sums, for rows [count][dim].
template <class T>
void write_rows(const acc_t<T>* sums, acc_t<T> factor, int64_t count, int64_t dim, T* out,
                int64_t stride) {
  for (int64_t i = 0; i < count; ++i) write_row(sums + i * dim, factor, dim, out + i * stride);
}

template <class T>
Kernels<T> kernels() {
  return {&pack_keys<T>, &forward<T>, &multiply_few<T>, &scores<T>, &backward<T>, &write_rows<T>};
}
