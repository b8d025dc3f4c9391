// SPDX-License-Identifier: Apache-2.0
// Kernels of merging. merging_cpu.cpp includes this file once per instruction set, inside that
// level's namespace (no include guard, therefore). Each kernel works on flattened rows
// [begin, end) of its output and writes each of their elements once.

// ---- rows ----

template <bool Full, class V, class T>
TOKENOPS_INLINE V load(const T* p, int lanes) {
  return Full ? V::load(p) : V::load_partial(p, lanes);
}

template <bool Full, class V, class T>
TOKENOPS_INLINE void store(V v, T* p, int lanes) {
  Full ? v.store(p) : v.store_partial(p, lanes);
}

// Store a whole vector, past the caches if so asked and if elements need no conversion.
template <class V, class T>
TOKENOPS_INLINE void put(V v, T* p, [[maybe_unused]] bool stream) {
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

// Ask for the beginning of a row that will be read soon.
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

// A factor on a row of T. Multiplying by a reciprocal replaces division where that is as exact: for
// powers of two, and where the result is rounded to a shorter type anyway.
template <class T>
struct Factor {
  using A = acc_t<T>;
  A value;
  bool divides;

  static TOKENOPS_INLINE Factor count(int64_t count) {
    const bool divides = sizeof(T) == sizeof(A) && (count & (count - 1)) != 0;
    return {divides ? static_cast<A>(count) : 1 / static_cast<A>(count), divides};
  }
  TOKENOPS_INLINE bool is_one() const { return value == 1; }
  TOKENOPS_INLINE Vec<A> on(Vec<A> v) const {
    return divides ? v / Vec<A>::set1(value) : v * Vec<A>::set1(value);
  }
};

// ---- merge ----

template <Fold F, class V>
TOKENOPS_INLINE V fold_start() {
  constexpr float infinity = __builtin_inff();
  switch (F) {
    case Fold::amax: return V::set1(-infinity);
    case Fold::amin: return V::set1(infinity);
    case Fold::prod: return V::set1(1);
    default: return V::zero();
  }
}

template <Fold F, class V>
TOKENOPS_INLINE V fold_step(V acc, V x, V weight) {
  switch (F) {
    case Fold::sum: return acc + x;
    case Fold::weighted_sum: return fma(weight, x, acc);
    case Fold::prod: return acc * x;
    // A NaN in x passes through max and min by itself; one that is there already has to stay.
    case Fold::amax: return blend(is_nan(acc), acc, max(acc, x));
    case Fold::amin: return blend(is_nan(acc), acc, min(acc, x));
  }
  return acc;
}

// K vectors of channels from c on, over all members; they stay in registers meanwhile.
template <Fold F, bool Full, int K, class T>
TOKENOPS_INLINE void fold_block(const MergeArgs<T>& args, int64_t b, Members members, int64_t c,
                                int lanes, Factor<T> factor, T* out) {
  using V = Vec<acc_t<T>>;
  V acc[K];
  for (int k = 0; k < K; ++k) acc[k] = fold_start<F, V>();
  for (int64_t j = 0; j < members.count; ++j) {
    const int64_t n = members.index[j];
    if (!args.map.is_input(n)) continue;
    const T* x = args.x(b, n) + c;
    V weight = V::zero();
    if (F == Fold::weighted_sum) weight = V::set1(args.weight[b * args.map.inputs + n]);
    for (int k = 0; k < K; ++k) {
      acc[k] = fold_step<F>(acc[k], load<Full, V>(x + k * V::W, lanes), weight);
    }
  }
  for (int k = 0; k < K; ++k) {
    const V result = factor.is_one() ? acc[k] : factor.on(acc[k]);
    T* to = out + c + k * V::W;
    Full ? put(result, to, args.stream) : result.store_partial(to, lanes);
  }
}

template <Fold F, class T>
void fold_row(const MergeArgs<T>& args, int64_t b, Members members, Factor<T> factor, T* out) {
  constexpr int W = Vec<acc_t<T>>::W, K = 4;
  const int64_t channels = args.channels;
  int64_t c = 0;
  for (; c + K * W <= channels; c += K * W) {
    fold_block<F, true, K>(args, b, members, c, W, factor, out);
  }
  for (; c + W <= channels; c += W) fold_block<F, true, 1>(args, b, members, c, W, factor, out);
  if (c < channels) {
    fold_block<F, false, 1>(args, b, members, c, static_cast<int>(channels - c), factor, out);
  }
}

// What an average divides by.
template <class T>
TOKENOPS_INLINE acc_t<T> sum_of_weights(const MergeArgs<T>& args, int64_t b, Members members) {
  if (args.weight == nullptr) return static_cast<acc_t<T>>(members.count);
  acc_t<T> total = 0;
  for (int64_t j = 0; j < members.count; ++j) {
    const int64_t n = members.index[j];
    if (args.map.is_input(n)) total += args.weight[b * args.map.inputs + n];
  }
  return total;
}

// out[b, m] = fold of x[b, n] over the members n, scaled or averaged; 0 where there are none.
template <Fold F, class T>
void merge_rows(const MergeArgs<T>& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t channels = args.channels;
  int64_t b = begin / args.map.outputs, m = begin % args.map.outputs;
  for (int64_t row = begin; row < end; ++row, ++m) {
    if (m == args.map.outputs) m = 0, ++b;
    Members members = args.map.members_of(b, m);
    Factor<T> factor = {args.scale != nullptr ? args.scale[row] : A(1), false};
    bool copies = F != Fold::weighted_sum && factor.is_one();  // a lone member stays as it is
    if (args.average) {
      const A total = sum_of_weights(args, b, members);
      if (args.total != nullptr) args.total[row] = total;
      if (total == 0) members.count = 0;
      factor = args.weight != nullptr ? Factor<T>{total, true} : Factor<T>::count(members.count);
      copies = total - total == 0;  // finite
    }
    if (channels == 0) continue;
    T* out = args.out + row * channels;
    if (members.count == 0) {
      zero_row(out, channels);
    } else if (copies && members.count == 1 && args.map.is_input(members.index[0])) {
      copy_row(args.x(b, members.index[0]), out, channels, args.stream);
    } else {
      fold_row<F>(args, b, members, factor, out);
    }
  }
}

// ---- unmerge ----

// out = factor * y + residual, on whole rows.
template <bool Residual, class T>
void scale_row(const T* y, Factor<T> factor, const T* residual, T* out, int64_t channels,
               bool stream) {
  using V = Vec<acc_t<T>>;
  int64_t c = 0;
  for (; c + V::W <= channels; c += V::W) {
    V v = factor.on(V::load(y + c));
    if (Residual) v = v + V::load(residual + c);
    put(v, out + c, stream);
  }
  if (c < channels) {
    const int lanes = static_cast<int>(channels - c);
    V v = factor.on(V::load_partial(y + c, lanes));
    if (Residual) v = v + V::load_partial(residual + c, lanes);
    v.store_partial(out + c, lanes);
  }
}

// out[b, n] = weight[b, n] * scale[b, a] * y[b, a] + residual[b, n] with a = assign[b, n]; where n
// was dropped, the residual or 0. `mean` divides by the number of members of a.
template <class T>
void unmerge_rows(const UnmergeArgs<T>& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const Map& map = args.map;
  int64_t b = begin / map.inputs, n = begin % map.inputs;
  for (int64_t row = begin; row < end; ++row, ++n) {
    if (n == map.inputs) n = 0, ++b;
    T* out = args.out + row * args.channels;
    if (n + 2 < map.inputs) {  // rows come in no order that the hardware could foresee
      const int64_t next = map.output_of(b, n + 2);
      if (next >= 0) prefetch_row(args.y(b, next), args.channels);
    }
    const T* residual = args.has_residual ? args.residual(b, n) : nullptr;
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
      const int64_t count = map.members_of(b, m).count;
      factor = Factor<T>::count(count > 0 ? count : 1);
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

// out[b, n] = sum_c x[b, n, c] * y[b, assign[b, n], c]; 0 where n was dropped.
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

// K vectors of channels from c on: the gradient in equal parts to the members that have the extreme
// value. Only the output token that `assign` names writes a row, so that no two of them write the
// same one, whatever `members` holds.
template <bool Full, int K, class T>
TOKENOPS_INLINE void share_block(const SelectBackwardArgs<T>& args, int64_t b, int64_t m,
                                 Members members, int64_t c, int lanes) {
  using V = Vec<acc_t<T>>;
  V best[K], share[K];
  for (int k = 0; k < K; ++k) {
    best[k] = load<Full, V>(args.best(b, m) + c + k * V::W, lanes);
    share[k] = V::zero();
  }
  for (int64_t j = 0; j < members.count; ++j) {
    const int64_t n = members.index[j];
    if (!args.map.is_input(n)) continue;
    for (int k = 0; k < K; ++k) {
      const V x = load<Full, V>(args.x(b, n) + c + k * V::W, lanes);
      share[k] = share[k] + blend(same(x, best[k]), V::set1(1), V::zero());
    }
  }
  for (int k = 0; k < K; ++k) {
    share[k] = load<Full, V>(args.grad(b, m) + c + k * V::W, lanes) / share[k];
  }
  for (int64_t j = 0; j < members.count; ++j) {
    const int64_t n = members.index[j];
    if (!args.map.is_input(n) || args.map.output_of(b, n) != m) continue;
    T* out = args.out + (b * args.map.inputs + n) * args.channels + c;
    for (int k = 0; k < K; ++k) {
      const V x = load<Full, V>(args.x(b, n) + c + k * V::W, lanes);
      store<Full>(blend(same(x, best[k]), share[k], V::zero()), out + k * V::W, lanes);
    }
  }
}

// One vector of channels: the gradient times the product of all other members, as the product of
// those after (kept in `after`, one vector each) and of those before.
template <bool Full, class T>
TOKENOPS_INLINE void others_block(const SelectBackwardArgs<T>& args, int64_t b, int64_t m,
                                  Members members, int64_t c, int lanes, acc_t<T>* after) {
  using V = Vec<acc_t<T>>;
  V product = V::set1(1);
  for (int64_t j = members.count - 1; j >= 0; --j) {
    const int64_t n = members.index[j];
    product.store(after + j * V::W);
    if (args.map.is_input(n)) product = product * load<Full, V>(args.x(b, n) + c, lanes);
  }
  const V grad = load<Full, V>(args.grad(b, m) + c, lanes);
  product = V::set1(1);
  for (int64_t j = 0; j < members.count; ++j) {
    const int64_t n = members.index[j];
    if (!args.map.is_input(n)) continue;
    if (args.map.output_of(b, n) == m) {
      T* out = args.out + (b * args.map.inputs + n) * args.channels + c;
      store<Full>(grad * (product * V::load(after + j * V::W)), out, lanes);
    }
    product = product * load<Full, V>(args.x(b, n) + c, lanes);
  }
}

// Gradient of the members of output rows [begin, end).
template <bool Prod, class T>
void select_backward_rows(const SelectBackwardArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int W = Vec<acc_t<T>>::W, K = 4;
  const Map& map = args.map;
  const int64_t channels = args.channels;
  Scratch<acc_t<T>> after;
  int64_t b = begin / map.outputs, m = begin % map.outputs;
  for (int64_t row = begin; row < end; ++row, ++m) {
    if (m == map.outputs) m = 0, ++b;
    const Members members = map.members_of(b, m);
    int64_t written = -1;
    for (int64_t j = 0; j < members.count; ++j) {
      const int64_t n = members.index[j];
      if (!map.is_input(n) || map.output_of(b, n) != m) continue;
      written = b * map.inputs + n;
      args.visited[written] = 1;
    }
    if (written < 0) continue;
    if (members.count == 1) {  // it is the extreme, and there are no others
      copy_row(args.grad(b, m), args.out + written * channels, channels, false);
      continue;
    }
    int64_t c = 0;
    if (Prod) {
      after.reserve(members.count * W);
      for (; c + W <= channels; c += W) {
        others_block<true>(args, b, m, members, c, W, after.data());
      }
    } else {
      for (; c + K * W <= channels; c += K * W) {
        share_block<true, K>(args, b, m, members, c, W);
      }
      for (; c + W <= channels; c += W) share_block<true, 1>(args, b, m, members, c, W);
    }
    if (c == channels) continue;
    const int lanes = static_cast<int>(channels - c);
    if (Prod) {
      others_block<false>(args, b, m, members, c, lanes, after.data());
    } else {
      share_block<false, 1>(args, b, m, members, c, lanes);
    }
  }
}
