// SPDX-License-Identifier: Apache-2.0
// Products of a few queries with all keys: included once per instruction set, in its namespace.
//
// Few rows are bound by reading the keys, so these are read once, as they lie in memory, for all
// rows together. Vectors of words run along the width; a tile has as many products as a vector has
// lanes, and adds up the lanes of all of them at once, in one order, so that a product has the same
// bits in every place of a tile.

template <class T>
constexpr int64_t kPerWord = kPairs<T> ? 2 : 1;

// A vector of words of a row.
template <class T>
TOKENOPS_INLINE Vec<acc_t<T>> load_words(const T* p) {
  if constexpr (kPairs<T>) {
    return Vec<acc_t<T>>::load(reinterpret_cast<const acc_t<T>*>(p));
  } else {
    return Vec<acc_t<T>>::load(p);
  }
}

// The last elements of a row as a vector of words.
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

// Vector whose lane l is the sum of the lanes of m[l].
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

// out[i * stride + j] = row i . key j for so many rows of words, `pitch` apart with zeros up to
// whole vectors, and W / Rows keys from `first` on.
template <int Rows, class T, class A>
TOKENOPS_INLINE void multiply_few_tile(const A* rows, int64_t pitch, const Tokens<T>& keys,
                                       int64_t first, A* out, int64_t stride) {
  using V = Vec<A>;
  constexpr int kKeys = V::W / Rows;
  const int64_t count = keys.count - first < kKeys ? keys.count - first : kKeys;
  const T* key[kKeys];
  for (int j = 0; j < kKeys; ++j) key[j] = keys.row(first + (j < count ? j : count - 1));
  // Prefetch the same words of the next W keys: hardware does not follow so many streams.
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
  for (; (word + V::W) * kPerWord<T> <= keys.width; word += V::W) {
    step(word, [](const T* p) { return load_words(p); });
  }
  if (const int left = static_cast<int>(keys.width - word * kPerWord<T>); left > 0) {
    step(word, [left](const T* p) { return load_last_words(p, left); });
  }
  A lanes[V::W];
  sum_lanes<1>(sum).store(lanes);
  for (int i = 0; i < Rows; ++i) {
    std::memcpy(out + i * stride + first, lanes + i * kKeys, count * sizeof(A));
  }
}

// out[i * stride + j] = row i . key j, of `count` rows; `packed` has room for [count][row_words].
template <class T>
void multiply_few(const T* const* rows, int64_t count, const Tokens<T>& keys, acc_t<T>* packed,
                  acc_t<T>* out, int64_t stride) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t pitch = row_words(depth_words<T>(keys.width));
  for (int64_t i = 0; i < count; ++i) pack_row(rows[i], keys.width, pitch, packed + i * pitch);
  // A vector of keys at a time stays in the first-level cache for all rows.
  for (int64_t first = 0; first < keys.count; first += V::W) {
    const int64_t end = first + V::W < keys.count ? first + V::W : keys.count;
    const auto multiply = [&](int64_t i, auto n) {
      constexpr int kRows = decltype(n)::value;
      for (int64_t j = first; j < end; j += V::W / kRows) {
        multiply_few_tile<kRows>(packed + i * pitch, pitch, keys, j, out + i * stride, stride);
      }
    };
    int64_t i = 0;
    if constexpr (V::W >= 4) {
      for (; i + 4 <= count; i += 4) multiply(i, Count<4>());
    }
    for (; i + 2 <= count; i += 2) multiply(i, Count<2>());
    if (i < count) multiply(i, Count<1>());
  }
}
