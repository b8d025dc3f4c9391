// SPDX-License-Identifier: Apache-2.0
// CPU kernels of merging. isa_kernels.h includes this file once for each instruction set, within a
// namespace of that set: no include guard. A kernel writes each element of its rows once.

// ---- rows ----

template <bool Full, class V, class T>
TOKENOPS_INLINE V load(const T* p, int lanes) {
  return Full ? V::load(p) : V::load_partial(p, lanes);
}

template <bool Full, class V, class T>
TOKENOPS_INLINE void store(V v, T* p, int lanes) {
  Full ? v.store(p) : v.store_partial(p, lanes);
}

// Store a whole vector; a non-temporal store if `stream`, unless the elements need a conversion.
template <class V, class T>
TOKENOPS_INLINE void store_or_stream(V v, T* p, [[maybe_unused]] bool stream) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    if (stream) return v.stream(p);
  }
  v.store(p);
}

template <class T>
TOKENOPS_INLINE void copy_row(const T* from, T* to, int64_t channels, bool stream) {
  using V = Vec<float>;
  constexpr int64_t kFloats = 4 * V::W;
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
  if (!stream) {
    std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(bytes));
    return;
  }
  const float* a = reinterpret_cast<const float*>(from);
  float* b = reinterpret_cast<float*>(to);
  const int64_t floats = bytes / static_cast<int64_t>(sizeof(float));  // whole cache lines
  int64_t i = 0;
  for (; i + kFloats <= floats; i += kFloats) {
    V v[4];
    for (int k = 0; k < 4; ++k) v[k] = V::load(a + i + k * V::W);
    for (int k = 0; k < 4; ++k) v[k].stream(b + i + k * V::W);
  }
  for (; i < floats; i += V::W) V::load(a + i).stream(b + i);
}

// Prefetch the beginning of a row, 2 KiB at most.
template <class T>
TOKENOPS_INLINE void prefetch_row(const T* row, int64_t channels) {
  const char* p = reinterpret_cast<const char*>(row);
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes && i < 2048; i += 64) __builtin_prefetch(p + i);
}

template <class T>
TOKENOPS_INLINE void zero_row(T* to, int64_t channels) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(channels) * sizeof(T));
}

// Multiplies or divides a row by `value`. A division becomes a product with the reciprocal where
// that is as exact: by powers of two, and where the result is rounded to half precision.
template <class T>
struct Factor {
  using A = acc_t<T>;
  A value;
  bool divides;

  static TOKENOPS_INLINE Factor reciprocal(int64_t count) {
    const bool divides = sizeof(T) == sizeof(A) && (count & (count - 1)) != 0;
    return {divides ? static_cast<A>(count) : 1 / static_cast<A>(count), divides};
  }
  TOKENOPS_INLINE bool is_one() const { return value == 1; }
  TOKENOPS_INLINE Vec<A> times(Vec<A> v) const {
    return divides ? v / Vec<A>::set1(value) : v * Vec<A>::set1(value);
  }
};

// ---- merge ----

template <Reduce R, class V>
TOKENOPS_INLINE V identity() {
  constexpr float infinity = __builtin_inff();
  switch (R) {
    case Reduce::amax: return V::set1(-infinity);
    case Reduce::amin: return V::set1(infinity);
    case Reduce::prod: return V::set1(1);
    default: return V::zero();
  }
}

template <Reduce R, class V>
TOKENOPS_INLINE V combine(V acc, V x, V weight) {
  switch (R) {
    case Reduce::sum: return acc + x;
    case Reduce::weighted_sum: return fma(weight, x, acc);
    case Reduce::prod: return acc * x;
    // max and min return x where either is NaN, so a NaN of acc has to be kept.
    case Reduce::amax: return blend(is_nan(acc), acc, max(acc, x));
    case Reduce::amin: return blend(is_nan(acc), acc, min(acc, x));
  }
  return acc;
}

// Reduce a segment for K vectors of channels from channel c on, in registers.
template <Reduce R, bool Full, int K, class T>
TOKENOPS_INLINE void reduce_block(const MergeArgs<T>& args, int64_t b, Segment segment, int64_t c,
                                  int lanes, Factor<T> factor, T* out) {
  using V = Vec<acc_t<T>>;
  V acc[K];
  for (int k = 0; k < K; ++k) acc[k] = identity<R, V>();
  for (int64_t j = 0; j < segment.count; ++j) {
    const int64_t n = segment.members[j];
    if (!args.map.is_input(n)) continue;
    const T* x = args.x(b, n) + c;
    V weight = V::zero();
    if (R == Reduce::weighted_sum) weight = V::set1(args.weight[b * args.map.inputs + n]);
    for (int k = 0; k < K; ++k) {
      acc[k] = combine<R>(acc[k], load<Full, V>(x + k * V::W, lanes), weight);
    }
  }
  for (int k = 0; k < K; ++k) {
    const V result = factor.is_one() ? acc[k] : factor.times(acc[k]);
    T* to = out + c + k * V::W;
    Full ? store_or_stream(result, to, args.stream) : result.store_partial(to, lanes);
  }
}

template <Reduce R, class T>
void reduce_row(const MergeArgs<T>& args, int64_t b, Segment segment, Factor<T> factor, T* out) {
  constexpr int W = Vec<acc_t<T>>::W, K = 4;
  const int64_t channels = args.channels;
  int64_t c = 0;
  for (; c + K * W <= channels; c += K * W) {
    reduce_block<R, true, K>(args, b, segment, c, W, factor, out);
  }
  for (; c + W <= channels; c += W) reduce_block<R, true, 1>(args, b, segment, c, W, factor, out);
  if (c < channels) {
    reduce_block<R, false, 1>(args, b, segment, c, static_cast<int>(channels - c), factor, out);
  }
}

// The divisor of a mean.
template <class T>
TOKENOPS_INLINE acc_t<T> sum_of_weights(const MergeArgs<T>& args, int64_t b, Segment segment) {
  if (args.weight == nullptr) return static_cast<acc_t<T>>(segment.count);
  acc_t<T> total = 0;
  for (int64_t j = 0; j < segment.count; ++j) {
    const int64_t n = segment.members[j];
    if (args.map.is_input(n)) total += args.weight[b * args.map.inputs + n];
  }
  return total;
}

// out[b, m] = reduction of x[b, n] over the members n of m, times scale[b, m]; 0 without members.
template <Reduce R, class T>
void merge_rows(const MergeArgs<T>& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t channels = args.channels;
  int64_t b = begin / args.map.outputs, m = begin % args.map.outputs;
  for (int64_t row = begin; row < end; ++row, ++m) {
    if (m == args.map.outputs) m = 0, ++b;
    Segment segment = args.map.segment(b, m);
    Factor<T> factor = {args.scale != nullptr ? args.scale[row] : A(1), false};
    bool copies = R != Reduce::weighted_sum && factor.is_one();  // whether one member is the result
    if (args.mean) {
      const A total = sum_of_weights(args, b, segment);
      if (args.total != nullptr) args.total[row] = total;
      if (total == 0) segment.count = 0;
      factor =
          args.weight != nullptr ? Factor<T>{total, true} : Factor<T>::reciprocal(segment.count);
      copies = total - total == 0;  // total is finite: w * x / w is x
    }
    if (channels == 0) continue;
    T* out = args.out + row * channels;
    if (segment.count == 0) {
      zero_row(out, channels);
    } else if (copies && segment.count == 1 && args.map.is_input(segment.members[0])) {
      copy_row(args.x(b, segment.members[0]), out, channels, args.stream);
    } else {
      reduce_row<R>(args, b, segment, factor, out);
    }
  }
}

// ---- unmerge ----

// out = factor * y + residual
template <bool Residual, class T>
void scale_row(const T* y, Factor<T> factor, const T* residual, T* out, int64_t channels,
               bool stream) {
  using V = Vec<acc_t<T>>;
  int64_t c = 0;
  for (; c + V::W <= channels; c += V::W) {
    V v = factor.times(V::load(y + c));
    if (Residual) v = v + V::load(residual + c);
    store_or_stream(v, out + c, stream);
  }
  if (c < channels) {
    const int lanes = static_cast<int>(channels - c);
    V v = factor.times(V::load_partial(y + c, lanes));
    if (Residual) v = v + V::load_partial(residual + c, lanes);
    v.store_partial(out + c, lanes);
  }
}

// out[b, n] = weight[b, n] * scale[b, m] * y[b, m] + residual[b, n] with m = assign[b, n], over the
// number of members of m if `mean`; the residual or 0 where n is dropped.
template <class T>
void unmerge_rows(const UnmergeArgs<T>& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const TokenMap& map = args.map;
  int64_t b = begin / map.inputs, n = begin % map.inputs;
  for (int64_t row = begin; row < end; ++row, ++n) {
    if (n == map.inputs) n = 0, ++b;
    T* out = args.out + row * args.channels;
    if (n + 2 < map.inputs) {  // hardware prefetchers cannot follow a gather
      const int64_t next = map.output_of(b, n + 2);
      if (next >= 0) prefetch_row(args.y(b, next), args.channels);
    }
    const T* residual = args.residual.data != nullptr ? args.residual(b, n) : nullptr;
    const int64_t m = map.output_of(b, n);
    if (m < 0) {
      residual != nullptr ? copy_row(residual, out, args.channels, args.stream)
                          : zero_row(out, args.channels);
      continue;
    }
    A weight = args.weight != nullptr ? args.weight[row] : A(1);
    if (args.scale != nullptr) weight *= args.scale[b * map.outputs + m];
    Factor<T> factor = {weight, false};
    if (args.mean) {
      const int64_t count = map.segment(b, m).count;
      factor = Factor<T>::reciprocal(count > 0 ? count : 1);
      if (weight != 1)
        factor = {factor.divides ? weight / factor.value : weight * factor.value, false};
    }
    const T* y = args.y(b, m);
    if (residual != nullptr) {
      scale_row<true>(y, factor, residual, out, args.channels, args.stream);
    } else if (!factor.is_one()) {
      scale_row<false>(y, factor, residual, out, args.channels, args.stream);
    } else {
      copy_row(y, out, args.channels, args.stream);
    }
  }
}

// ---- pair_dot ----

template <class T>
acc_t<T> dot_rows(const T* x, const T* y, int64_t channels) {
  using V = Vec<acc_t<T>>;
  constexpr int K = 4;
  V acc[K];
  for (int k = 0; k < K; ++k) acc[k] = V::zero();
  int64_t c = 0;
  for (; c + K * V::W <= channels; c += K * V::W) {
    for (int k = 0; k < K; ++k) {
      acc[k] = fma(V::load(x + c + k * V::W), V::load(y + c + k * V::W), acc[k]);
    }
  }
  for (; c + V::W <= channels; c += V::W) acc[0] = fma(V::load(x + c), V::load(y + c), acc[0]);
  if (c < channels) {
    const int lanes = static_cast<int>(channels - c);
    acc[1] = fma(V::load_partial(x + c, lanes), V::load_partial(y + c, lanes), acc[1]);
  }
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// out[b, n] = sum_c x[b, n, c] * y[b, assign[b, n], c]; 0 where n is dropped.
template <class T>
void pair_dot_rows(const PairDotArgs<T>& args, int64_t begin, int64_t end) {
  int64_t b = begin / args.map.inputs, n = begin % args.map.inputs;
  for (int64_t row = begin; row < end; ++row, ++n) {
    if (n == args.map.inputs) n = 0, ++b;
    const int64_t m = args.map.output_of(b, n);
    const bool empty = m < 0 || args.channels == 0;
    args.out[row] = empty ? 0 : dot_rows<T>(args.x(b, n), args.y(b, m), args.channels);
  }
}

// ---- backward of amax, amin and prod ----

// Equal, or both NaN.
template <class V>
TOKENOPS_INLINE typename V::Mask same(V a, V b) {
  return mask_or(eq(a, b), mask_and(is_nan(a), is_nan(b)));
}

// Gradient of amax and amin for K vectors of channels from channel c on: all members that equal the
// result get an equal share of it. Only output token assign[b, n] writes row n: even if `members`
// lists a token twice, no two threads write the same row.
template <bool Full, int K, class T>
TOKENOPS_INLINE void ties_block(const ReduceBackwardArgs<T>& args, int64_t b, int64_t m,
                                Segment segment, int64_t c, int lanes) {
  using V = Vec<acc_t<T>>;
  V result[K], share[K];
  for (int k = 0; k < K; ++k) {
    result[k] = load<Full, V>(args.out(b, m) + c + k * V::W, lanes);
    share[k] = V::zero();
  }
  for (int64_t j = 0; j < segment.count; ++j) {
    const int64_t n = segment.members[j];
    if (!args.map.is_input(n)) continue;
    for (int k = 0; k < K; ++k) {
      const V x = load<Full, V>(args.x(b, n) + c + k * V::W, lanes);
      share[k] = share[k] + blend(same(x, result[k]), V::set1(1), V::zero());
    }
  }
  for (int k = 0; k < K; ++k) {
    share[k] = load<Full, V>(args.grad(b, m) + c + k * V::W, lanes) / share[k];
  }
  for (int64_t j = 0; j < segment.count; ++j) {
    const int64_t n = segment.members[j];
    if (!args.map.is_input(n) || args.map.output_of(b, n) != m) continue;
    T* to = args.grad_x + (b * args.map.inputs + n) * args.channels + c;
    for (int k = 0; k < K; ++k) {
      const V x = load<Full, V>(args.x(b, n) + c + k * V::W, lanes);
      store<Full>(blend(same(x, result[k]), share[k], V::zero()), to + k * V::W, lanes);
    }
  }
}

// Gradient of prod for one vector of channels: grad times the product of all other members, which
// is the product of the members before each one times that of the members after it (in `suffix`).
template <bool Full, class T>
TOKENOPS_INLINE void prod_block(const ReduceBackwardArgs<T>& args, int64_t b, int64_t m,
                                Segment segment, int64_t c, int lanes, acc_t<T>* suffix) {
  using V = Vec<acc_t<T>>;
  V product = V::set1(1);
  for (int64_t j = segment.count - 1; j >= 0; --j) {
    const int64_t n = segment.members[j];
    product.store(suffix + j * V::W);
    if (args.map.is_input(n)) product = product * load<Full, V>(args.x(b, n) + c, lanes);
  }
  const V grad = load<Full, V>(args.grad(b, m) + c, lanes);
  product = V::set1(1);
  for (int64_t j = 0; j < segment.count; ++j) {
    const int64_t n = segment.members[j];
    if (!args.map.is_input(n)) continue;
    if (args.map.output_of(b, n) == m) {
      T* to = args.grad_x + (b * args.map.inputs + n) * args.channels + c;
      store<Full>(grad * (product * V::load(suffix + j * V::W)), to, lanes);
    }
    product = product * load<Full, V>(args.x(b, n) + c, lanes);
  }
}

// Gradient of the members of the output tokens [begin, end).
template <bool Prod, class T>
void reduce_backward_rows(const ReduceBackwardArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = Vec<acc_t<T>>::W, K = 4;
  const TokenMap& map = args.map;
  const int64_t channels = args.channels;
  Scratch<acc_t<T>> suffix;
  int64_t b = begin / map.outputs, m = begin % map.outputs;
  for (int64_t row = begin; row < end; ++row, ++m) {
    if (m == map.outputs) m = 0, ++b;
    const Segment segment = map.segment(b, m);
    int64_t last = -1;  // the last row of grad_x that this segment writes
    for (int64_t j = 0; j < segment.count; ++j) {
      const int64_t n = segment.members[j];
      if (!map.is_input(n) || map.output_of(b, n) != m) continue;
      last = b * map.inputs + n;
      args.written[last] = 1;
    }
    if (last < 0) continue;
    if (segment.count == 1) {  // the result is the member itself
      copy_row(args.grad(b, m), args.grad_x + last * channels, channels, false);
      continue;
    }
    int64_t c = 0;
    if (Prod) {
      suffix.reserve(segment.count * W);
      for (; c + W <= channels; c += W) {
        prod_block<true>(args, b, m, segment, c, W, suffix.data());
      }
    } else {
      for (; c + K * W <= channels; c += K * W) {
        ties_block<true, K>(args, b, m, segment, c, W);
      }
      for (; c + W <= channels; c += W) ties_block<true, 1>(args, b, m, segment, c, W);
    }
    if (c == channels) continue;
    const int lanes = static_cast<int>(channels - c);
    if (Prod) {
      prod_block<false>(args, b, m, segment, c, lanes, suffix.data());
    } else {
      ties_block<false, 1>(args, b, m, segment, c, lanes);
    }
  }
}

template <class T>
Kernels<T> kernels() {
  return {{merge_rows<Reduce::sum, T>, merge_rows<Reduce::weighted_sum, T>,
           merge_rows<Reduce::amax, T>, merge_rows<Reduce::amin, T>, merge_rows<Reduce::prod, T>},
          unmerge_rows<T>,
          pair_dot_rows<T>,
          {reduce_backward_rows<false, T>, reduce_backward_rows<true, T>}};
}
