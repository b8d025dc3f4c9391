// SPDX-License-Identifier: Apache-2.0
// exp2, loops over rows, and the packing of tokens as operands of register tiles (words, rows and
// panels: see tile_kernels.h). Included once per instruction set, in its namespace.

// 2^x: 0 for x < kMin (2^kMin is the smallest normal number), exactly 1 for 0, NaN for NaN. c: the
// coefficients of a polynomial for (2^f - 1) / f, |f| <= 1/2, interpolated at Chebyshev nodes.
template <int kMin, int N, class V, class A>
TOKENOPS_INLINE V exp2(V x, const A (&c)[N]) {
  const V least = V::set1(kMin), bounded = max(least, x), n = round(bounded), f = bounded - n;
  V p = V::set1(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = fma(p, f, V::set1(c[i]));
  return blend(gt(least, x), V::zero(), ldexp(fma(p, f, V::set1(1)), n));
}
TOKENOPS_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr float c[] = {0.693147188026228781f,   0.240226507605681269f,
                         0.0555035711421907782f,  0.00961808255727785149f,
                         0.00133908633646712344f, 0.000154531629451206902f};  // error 5e-9
  return exp2<-126>(x, c);
}
TOKENOPS_INLINE Vec<double> exp2(Vec<double> x) {
  constexpr double c[] = {
      0.693147180559945309,     0.240226506959100712,    0.055504108664821627,
      0.00961812910762847949,   0.00133335581464064707,  0.000154035303933707334,
      0.0000152527338415567726, 1.32154868087055628e-6,  1.01780570877339411e-7,
      7.05489730415549928e-9,   4.45581790833606449e-10, 2.57293241773623042e-11};  // error 1e-19
  return exp2<-1022>(x, c);
}

// 2^x of one number, rounded as the vectors are.
template <class A>
TOKENOPS_INLINE A exp2_of(A x) {
  A lanes[Vec<A>::W];
  exp2(Vec<A>::set1(x)).store(lanes);
  return lanes[0];
}

// 0, 1, 2... in the lanes of V.
template <class V, class A>
TOKENOPS_INLINE V lane_indices(const A*) {
  A lanes[V::W];
  for (int i = 0; i < V::W; ++i) lanes[i] = static_cast<A>(i);
  return V::load(lanes);
}

// Load or store a vector, or only the `left` elements that a row still has if these are fewer.
template <class V, class T>
TOKENOPS_INLINE V load_some(const T* p, int64_t left) {
  return left >= V::W ? V::load(p) : V::load_partial(p, static_cast<int>(left));
}
template <class V, class T>
TOKENOPS_INLINE void store_some(V v, T* p, int64_t left) {
  left >= V::W ? v.store(p) : v.store_partial(p, static_cast<int>(left));
}

// a . b of two rows.
template <class T, class U>
TOKENOPS_INLINE acc_t<T> dot(const T* a, const U* b, int64_t dim) {
  using V = Vec<acc_t<T>>;
  V sum = V::zero();
  for (int64_t d = 0; d < dim; d += V::W) {
    sum = fma(load_some<V>(a + d, dim - d), load_some<V>(b + d, dim - d), sum);
  }
  return reduce_add(sum);
}

// out += factor * x, for one row.
template <class T>
TOKENOPS_INLINE void add_scaled(const T* x, acc_t<T> factor, int64_t dim, acc_t<T>* out) {
  using V = Vec<acc_t<T>>;
  const V f = V::set1(factor);
  for (int64_t d = 0; d < dim; d += V::W) {
    const int64_t left = dim - d;
    store_some(fma(f, load_some<V>(x + d, left), load_some<V>(out + d, left)), out + d, left);
  }
}

// out = factor * x, for one row.
template <class T>
TOKENOPS_INLINE void write_row(const acc_t<T>* x, acc_t<T> factor, int64_t dim, T* out) {
  using V = Vec<acc_t<T>>;
  const V f = V::set1(factor);
  for (int64_t d = 0; d < dim; d += V::W) {
    store_some(load_some<V>(x + d, dim - d) * f, out + d, dim - d);
  }
}

// The rows of x that `index`, of `count` elements, lists.
template <class T>
Tokens<T> listed(Tokens<T> x, const int32_t* index, int64_t count) {
  x.index = index;
  x.count = count;
  return x;
}

// Write a row as `words` words, with zeros behind its elements. x may be null if dim is 0.
template <class T>
TOKENOPS_INLINE void pack_row(const T* x, int64_t dim, int64_t words, acc_t<T>* row) {
  using V = Vec<acc_t<T>>;
  using P = typename Packed<T>::type;
  P* const out = reinterpret_cast<P*>(row);
  if (sizeof(P) == sizeof(T) && dim > 0) {
    std::memcpy(static_cast<void*>(out), x, dim * sizeof(T));
  } else {
    for (int64_t d = 0; d < dim; d += V::W) {
      store_some(load_some<V>(x + d, dim - d), out + d, dim - d);
    }
  }
  std::memset(static_cast<void*>(out + dim), 0, words * sizeof(acc_t<T>) - dim * sizeof(P));
}

// Pack a left operand: rows of words [count][dim], with rows of zeros that fill up the last tile.
template <class T>
void pack_rows(const Tokens<T>& x, acc_t<T>* out) {
  const int64_t words = depth_words<T>(x.dim);
  for (int64_t i = 0; i < x.count; ++i) pack_row(x.row(i), x.dim, words, out + i * words);
  const int64_t padding = round_up(x.count, kTile) - x.count;
  std::memset(static_cast<void*>(out + x.count * words), 0, padding * words * sizeof(acc_t<T>));
}

// Pack a right operand, transposed: panels [dim][count], with columns of zeros that fill up the
// last vector. `scratch` has room for W packed rows.
template <class T>
void pack_transposed(const Tokens<T>& x, acc_t<T>* out, acc_t<T>* scratch) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int kWidth = kVectors<A> * V::W;
  const int64_t depth = depth_words<T>(x.dim), words = row_words(depth);
  const int64_t columns = round_up(x.count, V::W);
  for (int64_t column = 0; column < columns; column += V::W) {
    for (int i = 0; i < V::W; ++i) {
      const bool exists = column + i < x.count;
      pack_row(exists ? x.row(column + i) : nullptr, exists ? x.dim : 0, words,
               scratch + i * words);
    }
    const int64_t panel = column / kWidth * kWidth;
    const int64_t stride = columns - panel < kWidth ? columns - panel : kWidth;
    A* const to = out + panel * depth + (column - panel);
    for (int64_t k = 0; k < depth; k += V::W) {
      V m[V::W];
#pragma GCC unroll 16
      for (int i = 0; i < V::W; ++i) m[i] = V::load(scratch + i * words + k);
      transpose<1>(m);
      for (int i = 0; i < V::W && k + i < depth; ++i) m[i].store(to + (k + i) * stride);
    }
  }
}

// Pack a right operand: panels [count][dim], with columns of zeros that fill up the last vector.
template <class T>
void pack_panels(const Tokens<T>& x, acc_t<T>* out) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int kWidth = kVectors<A> * V::W;
  const int64_t depth = depth_words<T>(x.count), columns = round_up(x.dim, V::W);
  for (int64_t panel = 0; panel < columns; panel += kWidth) {
    const int64_t stride = columns - panel < kWidth ? columns - panel : kWidth;
    const int64_t filled = x.dim - panel < stride ? x.dim - panel : stride;
    A* to = out + panel * depth;
    for (int64_t k = 0; k < depth; ++k, to += stride) {
      if constexpr (kPairs<T>) {
        const uint16_t* const a = reinterpret_cast<const uint16_t*>(x.row(2 * k) + panel);
        uint32_t* const words = reinterpret_cast<uint32_t*>(to);
        if (2 * k + 1 < x.count) {
          const uint16_t* const b = reinterpret_cast<const uint16_t*>(x.row(2 * k + 1) + panel);
          for (int64_t d = 0; d < filled; ++d) words[d] = a[d] | static_cast<uint32_t>(b[d]) << 16;
        } else {
          for (int64_t d = 0; d < filled; ++d) words[d] = a[d];
        }
      } else {
        const T* const row = x.row(k) + panel;
        for (int64_t d = 0; d < filled; d += V::W) {
          load_some<V>(row + d, filled - d).store(to + d);
        }
      }
      for (int64_t d = filled; d < stride; ++d) to[d] = 0;
    }
  }
}

// Call f(column, Count<n>(), panel) for the panels of a right operand [depth][columns] that start
// before column `limit`. A panel starts at `column` and is n vectors wide.
template <class A, class F>
TOKENOPS_INLINE void for_each_panel(const A* panels, int64_t depth, int64_t columns, int64_t limit,
                                    const F& f) {
  using V = Vec<A>;
  for (int64_t column = 0; column < limit; column += kVectors<A> * V::W) {
    const int64_t left = (columns - column + V::W - 1) / V::W;
    with_count<kVectors<A>>(left < kVectors<A> ? static_cast<int>(left) : kVectors<A>,
                            [&](auto n) { f(column, n, panels + column * depth); });
  }
}

// Store a vector as Packed<T>::type: unchanged, or rounded to bfloat16 (subnormals to zero).
template <class T, class V>
TOKENOPS_INLINE void store_words(V v, typename Packed<T>::type* p) {
#if TOKENOPS_PAIRS
  if constexpr (kPairs<T>) {
    const __m256bh bits = _mm512_cvtneps_pbh(v.v);
    std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
    return;
  }
#endif
  v.store(p);
}

// A vector rounded as store_words rounds it.
template <class T, class V>
TOKENOPS_INLINE V round_words(V v) {
#if TOKENOPS_PAIRS
  if constexpr (kPairs<T>) return {_mm512_cvtpbh_ps(_mm512_cvtneps_pbh(v.v))};
#endif
  return v;
}

#if TOKENOPS_PAIRS
// Interleave as bfloat16: each word is a pair of a lane of `low` and the same lane of `high`.
TOKENOPS_INLINE Vec<float> pair_up(Vec<float> low, Vec<float> high) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);  // low's, then high's
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))};
}
#endif
