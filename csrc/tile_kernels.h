// SPDX-License-Identifier: Apache-2.0
// Matrix products by register tiles. Included once per instruction set, in the namespace of an
// operator's kernels, with TOKENOPS_PAIRS 1 where that set multiplies pairs of bfloat16.
//
// As in BLIS, the left operand is packed as rows and the right operand as panels a few vectors
// wide; a tile of kTile rows by one panel is summed in registers. Both consist of words along the
// dimension summed over: a word is one element of acc_t<T>, or a pair of neighbouring bfloat16.
// `depth` is the number of words of this dimension.

// ---- words ----

template <class T>
struct Packed {
  using type = acc_t<T>;
};
#if TOKENOPS_PAIRS
template <>
struct Packed<c10::BFloat16> {
  using type = c10::BFloat16;
};
#endif

template <class T>
constexpr bool kPairs = sizeof(typename Packed<T>::type) < sizeof(acc_t<T>);

template <class T>
TOKENOPS_INLINE int64_t depth_words(int64_t width) {
  return kPairs<T> ? (width + 1) / 2 : width;
}

// a * b + c in each lane; for pairs, the sum of both products and c.
template <class T, class V>
TOKENOPS_INLINE V multiply(V a, V b, V c) {
#if TOKENOPS_PAIRS
  if constexpr (kPairs<T>) return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  return fma(a, b, c);
}

// Vectors of a full panel, so that a tile fills the registers: 32 in AVX-512, 16 elsewhere.
template <class A>
constexpr int kVectors = Vec<A>::W * sizeof(A) == 64 ? 4 : 2;

// ---- tiles ----

// A number of vectors as a compile-time constant.
template <int N>
struct Count {
  static constexpr int value = N;
};

// Call f(Count<n>()), where 1 <= n <= N.
template <int N, class F>
TOKENOPS_INLINE void with_count(int n, const F& f) {
  if constexpr (N > 1) {
    if (n < N) return with_count<N - 1>(n, f);
  }
  f(Count<N>());
}

// sum[i][j] += sum over k < depth of a[i * row + k * step] * b[k][j], for a panel b [depth][N * W].
template <class T, int N, class V, class A>
TOKENOPS_INLINE void multiply_tile(const A* a, int64_t row, int64_t step, const A* b, int64_t depth,
                                   V (&sum)[kTile][N]) {
  for (int64_t k = 0; k < depth; ++k) {
    V columns[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) columns[j] = V::load(b + (k * N + j) * V::W);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const V element = V::set1(a[i * row + k * step]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] = multiply<T>(element, columns[j], sum[i][j]);
    }
  }
}

// Store a tile as rows `stride` apart.
template <int N, class V, class A>
TOKENOPS_INLINE void store_tile(const V (&sum)[kTile][N], A* out, int64_t stride) {
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sum[i][j].store(out + i * stride + j * V::W);
  }
}

// ---- transposition ----

// One step of a transposition: swap the lanes of a whose index has the bit `Step` with the lanes of
// b whose index does not have it.
template <int Step, class V>
TOKENOPS_INLINE void exchange(V& a, V& b) {
#if TOKENOPS_X86
  decltype(a.v < a.v) low, high;
  for (int l = 0; l < V::W; ++l) {
    low[l] = (l & Step) ? (l ^ Step) + V::W : l;
    high[l] = (l & Step) ? l + V::W : l ^ Step;
  }
  const V c = {__builtin_shuffle(a.v, b.v, low)};
  b = {__builtin_shuffle(a.v, b.v, high)};
  a = c;
#else
  for (int l = 0; l < V::W; ++l) {
    if (l & Step) continue;
    const auto lane = a.v[l | Step];
    a.v[l | Step] = b.v[l];
    b.v[l] = lane;
  }
#endif
}

// Transpose a square of W vectors. Callers pass Step 1; it recurs with Step 2, 4, ...
template <int Step, class V>
TOKENOPS_INLINE void transpose(V (&m)[V::W]) {
  if constexpr (Step < V::W) {
#pragma GCC unroll 16
    for (int i = 0; i < V::W; ++i) {
      if (!(i & Step)) exchange<Step>(m[i], m[i | Step]);
    }
    transpose<2 * Step>(m);
  }
}
