// SPDX-License-Identifier: Apache-2.0
// q . k of a few queries and all keys. Included once per instruction set, in its namespace.
//
// Reading the keys takes most of the time, so they are read once, unpacked, for all queries.
// Vectors run along D. A tile has W dot products, one for each lane of a vector: sum_lanes sums the
// W accumulators at once. The order of these sums does not depend on a product's place in the tile.

// Elements of a word.
template <class T>
constexpr int64_t kPerWord = kPairs<T> ? 2 : 1;

// Load a vector of words from a row that is not packed.
template <class T>
TOKENOPS_INLINE Vec<acc_t<T>> load_words(const T* p) {
  if constexpr (kPairs<T>) {
    return Vec<acc_t<T>>::load(reinterpret_cast<const acc_t<T>*>(p));
  } else {
    return Vec<acc_t<T>>::load(p);
  }
}

// Load the last `left` elements of such a row, with zeros behind them.
template <class T>
TOKENOPS_INLINE Vec<acc_t<T>> load_last_words(const T* p, int left) {
  using V = Vec<acc_t<T>>;
  if constexpr (kPairs<T>) {
    acc_t<T> words[V::W] = {};
    std::memcpy(static_cast<void*>(words), p, left * sizeof(T));
    return V::load(words);
  } else {
    return V::load_partial(p, left);
  }
}

// A vector whose lane l is the sum of the lanes of m[l].
template <int Step, class V>
TOKENOPS_INLINE V sum_lanes(V (&m)[V::W]) {
  if constexpr (Step == V::W) {
    return m[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < V::W; i += 2 * Step) {
      exchange<Step>(m[i], m[i + Step]);
      m[i] = m[i] + m[i + Step];
    }
    return sum_lanes<2 * Step>(m);
  }
}

// One tile: out[i * stride + n] = row i . key n, for W / Rows keys from start_n on and Rows packed
// rows, which are `pitch` words apart and padded with zeros.
template <int Rows, class T, class A>
TOKENOPS_INLINE void multiply_few_tile(const A* rows, int64_t pitch, const Tokens<T>& keys,
                                       int64_t start_n, A* out, int64_t stride) {
  using V = Vec<A>;
  constexpr int kKeys = V::W / Rows;
  const int64_t count = keys.count - start_n < kKeys ? keys.count - start_n : kKeys;
  const T* key[kKeys];  // behind the last key, the last one again
  for (int j = 0; j < kKeys; ++j) key[j] = keys.row(start_n + (j < count ? j : count - 1));
  // Prefetch the same words of the next W keys: the hardware follows fewer streams than W.
  const int64_t ahead = V::W * keys.stride;
  V sum[V::W] = {};
  const auto step = [&](int64_t word, const auto& load) {
    V row[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) row[i] = V::load(rows + i * pitch + word);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      __builtin_prefetch(key[j] + ahead + word * kPerWord<T>);
      const V x = load(key[j] + word * kPerWord<T>);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        sum[i * kKeys + j] = multiply<T>(x, row[i], sum[i * kKeys + j]);
      }
    }
  };
  int64_t word = 0;
  for (; (word + V::W) * kPerWord<T> <= keys.dim; word += V::W) {
    step(word, [](const T* p) { return load_words(p); });
  }
  if (const int left = static_cast<int>(keys.dim - word * kPerWord<T>); left > 0) {
    step(word, [left](const T* p) { return load_last_words(p, left); });
  }
  A lanes[V::W];
  sum_lanes<1>(sum).store(lanes);
  for (int i = 0; i < Rows; ++i) {
    std::memcpy(out + i * stride + start_n, lanes + i * kKeys, count * sizeof(A));
  }
}

// out[i * stride + n] = rows[i] . key n for `count` rows and all keys; `packed` holds the rows as
// words [count][row_words].
template <class T>
void multiply_few(const T* const* rows, int64_t count, const Tokens<T>& keys, acc_t<T>* packed,
                  acc_t<T>* out, int64_t stride) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t pitch = row_words(depth_words<T>(keys.dim));
  for (int64_t i = 0; i < count; ++i) pack_row(rows[i], keys.dim, pitch, packed + i * pitch);
  // W keys at a time, which stay in the L1 cache for all rows.
  for (int64_t start_n = 0; start_n < keys.count; start_n += V::W) {
    const int64_t end = start_n + V::W < keys.count ? start_n + V::W : keys.count;
    const auto multiply_rows = [&](int64_t i, auto rows_at_once) {
      constexpr int kRows = decltype(rows_at_once)::value;
      for (int64_t j = start_n; j < end; j += V::W / kRows) {
        multiply_few_tile<kRows>(packed + i * pitch, pitch, keys, j, out + i * stride, stride);
      }
    };
    int64_t i = 0;
    if constexpr (V::W >= 4) {
      for (; i + 4 <= count; i += 4) multiply_rows(i, Count<4>());
    }
    for (; i + 2 <= count; i += 2) multiply_rows(i, Count<2>());
    if (i < count) multiply_rows(i, Count<1>());
  }
}
