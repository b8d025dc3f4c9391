// SPDX-License-Identifier: Apache-2.0
// Vectors of float and double for each instruction set that the library is compiled for.
//
// Each set has the same names in a namespace of its own (portable, avx2, avx512). Kernels are
// written once and included once per set, between TOKENOPS_TARGET_* and TOKENOPS_TARGET_END. They
// must not instantiate templates of the standard library: the linker merges the copies of all sets
// and may keep one that this CPU cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TOKENOPS_X86 1
// GCC's header leaves registers undefined on purpose, which GCC 12 warns about.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define TOKENOPS_PRAGMA(text) _Pragma(#text)
#define TOKENOPS_TARGET(features) \
  TOKENOPS_PRAGMA(GCC push_options) TOKENOPS_PRAGMA(GCC target(features))
#define TOKENOPS_TARGET_AVX2 TOKENOPS_TARGET("avx2,fma,f16c")
#define TOKENOPS_TARGET_AVX512 TOKENOPS_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define TOKENOPS_TARGET_AVX512_BF16 \
  TOKENOPS_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define TOKENOPS_TARGET_END TOKENOPS_PRAGMA(GCC pop_options)
#else
#define TOKENOPS_X86 0
#endif

// Each set has V = Vec<float> and Vec<double>. T is the type in memory (float, BFloat16 or Half for
// Vec<float>, double for Vec<double>); stores round to nearest even.
// - V::W: the number of lanes
// - V::zero(), V::set1(value)
// - V::load(const T*), V::load_partial(const T*, n): the first n lanes, the others zero; 1 <= n < W
// - v.store(T*), v.store_partial(T*, n): the first n lanes
// - v.stream(A*): a non-temporal store, 64-byte aligned; stream_fence() has to follow
// - a + b, a - b, a * b, a / b, fma(a, b, c) = a * b + c
// - max(a, b), min(a, b): b where either is NaN, as in the x86 instructions
// - gt(a, b), eq(a, b), is_nan(a), mask_and(m, n), mask_or(m, n): a V::Mask
// - blend(m, a, b): a where m, else b
// - reduce_add(a), reduce_max(a): over the lanes, in a fixed order
// - round(a): the nearest integer, for |a| < 2^22
// - ldexp(a, n): a * 2^n for integers n where 2^n is a normal number
namespace tokenops {

namespace portable {

template <class A>
struct Vec;

// Vectors of 16 bytes by the compiler, on any architecture: the operations that do not depend on A.
template <class A, class Bits, int Lanes>
struct Vec128 {
  static constexpr int W = Lanes;
  typedef A Data __attribute__((vector_size(16)));
  typedef Bits Mask __attribute__((vector_size(16)));
  Data v;

  static TOKENOPS_INLINE Vec<A> wrap(Data v) {
    Vec<A> out;
    out.v = v;
    return out;
  }
  static TOKENOPS_INLINE Vec<A> zero() { return wrap(Data{}); }
  static TOKENOPS_INLINE Vec<A> set1(A value) { return wrap(Data{} + value); }
  static TOKENOPS_INLINE Vec<A> load(const A* p) {
    Data v;
    std::memcpy(&v, p, sizeof v);
    return wrap(v);
  }
  TOKENOPS_INLINE void store(A* p) const { std::memcpy(p, &v, sizeof v); }
  TOKENOPS_INLINE void stream(A* p) const { std::memcpy(p, &v, sizeof v); }
  template <class T>
  static TOKENOPS_INLINE Vec<A> load_partial(const T* p, int n) {
    T lanes[W] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return Vec<A>::load(lanes);
  }
  template <class T>
  TOKENOPS_INLINE void store_partial(T* p, int n) const {
    T lanes[W];
    wrap(v).store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
};

template <>
struct Vec<double> : Vec128<double, int64_t, 2> {};

template <>
struct Vec<float> : Vec128<float, int32_t, 4> {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint32_t Words __attribute__((vector_size(16)));

  using Vec128::load;
  using Vec128::store;
  static TOKENOPS_INLINE Vec load(const c10::BFloat16* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return wrap(Data(__builtin_convertvector(halves, Words) << 16));
  }
  static TOKENOPS_INLINE Vec load(const c10::Half* p) { return wrap(Data{p[0], p[1], p[2], p[3]}); }
  TOKENOPS_INLINE void store(c10::BFloat16* p) const {
    const Words bits = Words(v);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words word = v == v ? rounded : Words{} + 0x7fc0;
    const Halves halves = __builtin_convertvector(word, Halves);
    std::memcpy(static_cast<void*>(p), &halves, sizeof halves);
  }
  TOKENOPS_INLINE void store(c10::Half* p) const {
    for (int i = 0; i < W; ++i) p[i] = c10::Half(v[i]);
  }
};

#define TOKENOPS_FOR(V)                                                      \
  TOKENOPS_INLINE V operator+(V a, V b) { return V::wrap(a.v + b.v); }       \
  TOKENOPS_INLINE V operator-(V a, V b) { return V::wrap(a.v - b.v); }       \
  TOKENOPS_INLINE V operator*(V a, V b) { return V::wrap(a.v * b.v); }       \
  TOKENOPS_INLINE V operator/(V a, V b) { return V::wrap(a.v / b.v); }       \
  TOKENOPS_INLINE V fma(V a, V b, V c) { return V::wrap(a.v * b.v + c.v); }  \
  TOKENOPS_INLINE V max(V a, V b) { return V::wrap(a.v > b.v ? a.v : b.v); } \
  TOKENOPS_INLINE V min(V a, V b) { return V::wrap(a.v < b.v ? a.v : b.v); } \
  TOKENOPS_INLINE V::Mask gt(V a, V b) { return a.v > b.v; }                 \
  TOKENOPS_INLINE V::Mask eq(V a, V b) { return a.v == b.v; }                \
  TOKENOPS_INLINE V::Mask is_nan(V a) { return a.v != a.v; }                 \
  TOKENOPS_INLINE V::Mask mask_and(V::Mask m, V::Mask n) { return m & n; }   \
  TOKENOPS_INLINE V::Mask mask_or(V::Mask m, V::Mask n) { return m | n; }    \
  TOKENOPS_INLINE V blend(V::Mask m, V a, V b) { return V::wrap(m ? a.v : b.v); }
TOKENOPS_FOR(Vec<float>)
TOKENOPS_FOR(Vec<double>)
#undef TOKENOPS_FOR

// Adding and subtracting 1.5 * 2^(mantissa bits) rounds the fraction away.
TOKENOPS_INLINE Vec<float> round(Vec<float> a) {
  return Vec<float>::wrap(a.v + 0x1.8p23f - 0x1.8p23f);
}
TOKENOPS_INLINE Vec<double> round(Vec<double> a) {
  return Vec<double>::wrap(a.v + 0x1.8p52 - 0x1.8p52);
}
TOKENOPS_INLINE Vec<float> ldexp(Vec<float> a, Vec<float> n) {
  const auto exponent = (__builtin_convertvector(n.v, Vec<float>::Mask) + 127) << 23;
  return Vec<float>::wrap(a.v * Vec<float>::Data(exponent));
}
TOKENOPS_INLINE Vec<double> ldexp(Vec<double> a, Vec<double> n) {
  const auto exponent = (__builtin_convertvector(n.v, Vec<double>::Mask) + 1023) << 52;
  return Vec<double>::wrap(a.v * Vec<double>::Data(exponent));
}

TOKENOPS_INLINE double reduce_add(Vec<double> a) { return a.v[0] + a.v[1]; }
TOKENOPS_INLINE double reduce_max(Vec<double> a) { return a.v[0] > a.v[1] ? a.v[0] : a.v[1]; }
TOKENOPS_INLINE float reduce_add(Vec<float> a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
TOKENOPS_INLINE float reduce_max(Vec<float> a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

}  // namespace portable

#if TOKENOPS_X86
TOKENOPS_TARGET_AVX2
namespace avx2 {

template <class A>
struct Vec;

template <>
struct Vec<double> {
  static constexpr int W = 4;
  using Mask = __m256d;
  __m256d v;

  static TOKENOPS_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static TOKENOPS_INLINE Vec set1(double value) { return {_mm256_set1_pd(value)}; }
  static TOKENOPS_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static TOKENOPS_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static TOKENOPS_INLINE Vec load_partial(const double* p, int n) {
    return {_mm256_maskload_pd(p, first(n))};
  }
  TOKENOPS_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  TOKENOPS_INLINE void stream(double* p) const { _mm256_stream_pd(p, v); }
  TOKENOPS_INLINE void store_partial(double* p, int n) const {
    _mm256_maskstore_pd(p, first(n), v);
  }
};

template <>
struct Vec<float> {
  static constexpr int W = 8;
  using Mask = __m256;
  __m256 v;

  static TOKENOPS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static TOKENOPS_INLINE Vec set1(float value) { return {_mm256_set1_ps(value)}; }
  static TOKENOPS_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static TOKENOPS_INLINE Vec from_bfloat16(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  TOKENOPS_INLINE __m128i to_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i word = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(word, word), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  static TOKENOPS_INLINE __m128i load_bits(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static TOKENOPS_INLINE __m128i load_bits_partial(const void* p, int n) {
    alignas(16) uint16_t lanes[W] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof lanes[0]);
    return load_bits(lanes);
  }
  static TOKENOPS_INLINE void store_bits(void* p, __m128i bits) {
    _mm_storeu_si128(static_cast<__m128i*>(p), bits);
  }
  static TOKENOPS_INLINE void store_bits_partial(void* p, __m128i bits, int n) {
    alignas(16) uint16_t lanes[W];
    store_bits(lanes, bits);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof lanes[0]);
  }

  static TOKENOPS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static TOKENOPS_INLINE Vec load(const c10::BFloat16* p) { return from_bfloat16(load_bits(p)); }
  static TOKENOPS_INLINE Vec load(const c10::Half* p) { return {_mm256_cvtph_ps(load_bits(p))}; }
  static TOKENOPS_INLINE Vec load_partial(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n))};
  }
  static TOKENOPS_INLINE Vec load_partial(const c10::BFloat16* p, int n) {
    return from_bfloat16(load_bits_partial(p, n));
  }
  static TOKENOPS_INLINE Vec load_partial(const c10::Half* p, int n) {
    return {_mm256_cvtph_ps(load_bits_partial(p, n))};
  }
  TOKENOPS_INLINE __m128i to_half() const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  TOKENOPS_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  TOKENOPS_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  TOKENOPS_INLINE void store(c10::BFloat16* p) const { store_bits(p, to_bfloat16()); }
  TOKENOPS_INLINE void store(c10::Half* p) const { store_bits(p, to_half()); }
  TOKENOPS_INLINE void store_partial(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  TOKENOPS_INLINE void store_partial(c10::BFloat16* p, int n) const {
    store_bits_partial(p, to_bfloat16(), n);
  }
  TOKENOPS_INLINE void store_partial(c10::Half* p, int n) const {
    store_bits_partial(p, to_half(), n);
  }
};

#define TOKENOPS_FOR(V, S)                                                                \
  TOKENOPS_INLINE V operator+(V a, V b) { return {_mm256_add_##S(a.v, b.v)}; }            \
  TOKENOPS_INLINE V operator-(V a, V b) { return {_mm256_sub_##S(a.v, b.v)}; }            \
  TOKENOPS_INLINE V operator*(V a, V b) { return {_mm256_mul_##S(a.v, b.v)}; }            \
  TOKENOPS_INLINE V operator/(V a, V b) { return {_mm256_div_##S(a.v, b.v)}; }            \
  TOKENOPS_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_##S(a.v, b.v, c.v)}; }      \
  TOKENOPS_INLINE V max(V a, V b) { return {_mm256_max_##S(a.v, b.v)}; }                  \
  TOKENOPS_INLINE V min(V a, V b) { return {_mm256_min_##S(a.v, b.v)}; }                  \
  TOKENOPS_INLINE V::Mask gt(V a, V b) { return _mm256_cmp_##S(a.v, b.v, _CMP_GT_OQ); }   \
  TOKENOPS_INLINE V::Mask eq(V a, V b) { return _mm256_cmp_##S(a.v, b.v, _CMP_EQ_OQ); }   \
  TOKENOPS_INLINE V::Mask is_nan(V a) { return _mm256_cmp_##S(a.v, a.v, _CMP_UNORD_Q); }  \
  TOKENOPS_INLINE V::Mask mask_and(V::Mask m, V::Mask n) { return _mm256_and_##S(m, n); } \
  TOKENOPS_INLINE V::Mask mask_or(V::Mask m, V::Mask n) { return _mm256_or_##S(m, n); }   \
  TOKENOPS_INLINE V blend(V::Mask m, V a, V b) { return {_mm256_blendv_##S(b.v, a.v, m)}; }
TOKENOPS_FOR(Vec<float>, ps)
TOKENOPS_FOR(Vec<double>, pd)
#undef TOKENOPS_FOR

// Reduction over the lanes: combine halves until one lane is left.
#define TOKENOPS_REDUCE(name, op)                                                          \
  TOKENOPS_INLINE float name(Vec<float> a) {                                               \
    __m128 x = _mm_##op##_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));  \
    x = _mm_##op##_ps(x, _mm_movehl_ps(x, x));                                             \
    return _mm_cvtss_f32(_mm_##op##_ss(x, _mm_movehdup_ps(x)));                            \
  }                                                                                        \
  TOKENOPS_INLINE double name(Vec<double> a) {                                             \
    __m128d x = _mm_##op##_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1)); \
    return _mm_cvtsd_f64(_mm_##op##_sd(x, _mm_unpackhi_pd(x, x)));                         \
  }
TOKENOPS_REDUCE(reduce_add, add)
TOKENOPS_REDUCE(reduce_max, max)
#undef TOKENOPS_REDUCE

TOKENOPS_INLINE Vec<float> round(Vec<float> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TOKENOPS_INLINE Vec<double> round(Vec<double> a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TOKENOPS_INLINE Vec<float> ldexp(Vec<float> a, Vec<float> n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
TOKENOPS_INLINE Vec<double> ldexp(Vec<double> a, Vec<double> n) {
  const __m256i wide = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n.v));
  const __m256i exponent = _mm256_add_epi64(wide, _mm256_set1_epi64x(1023));
  return {_mm256_mul_pd(a.v, _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52)))};
}

}  // namespace avx2
TOKENOPS_TARGET_END

TOKENOPS_TARGET_AVX512
namespace avx512 {

template <class A>
struct Vec;

template <>
struct Vec<double> {
  static constexpr int W = 8;
  using Mask = __mmask8;
  __m512d v;

  static TOKENOPS_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static TOKENOPS_INLINE Vec set1(double value) { return {_mm512_set1_pd(value)}; }
  static TOKENOPS_INLINE __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1); }
  static TOKENOPS_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static TOKENOPS_INLINE Vec load_partial(const double* p, int n) {
    return {_mm512_maskz_loadu_pd(first(n), p)};
  }
  TOKENOPS_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  TOKENOPS_INLINE void stream(double* p) const { _mm512_stream_pd(p, v); }
  TOKENOPS_INLINE void store_partial(double* p, int n) const {
    _mm512_mask_storeu_pd(p, first(n), v);
  }
};

template <>
struct Vec<float> {
  static constexpr int W = 16;
  using Mask = __mmask16;
  __m512 v;

  static TOKENOPS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static TOKENOPS_INLINE Vec set1(float value) { return {_mm512_set1_ps(value)}; }
  static TOKENOPS_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static TOKENOPS_INLINE Vec from_bfloat16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  // Integer arithmetic, because the instruction of AVX512-BF16 flushes subnormals to zero.
  TOKENOPS_INLINE __m256i to_bfloat16() const {
    // The table maps every NaN to the default NaN, which stays NaN when 0x7fff is added.
    const __m512i table = _mm512_set1_epi32(0x33);
    const __m512i bits = _mm512_castps_si512(_mm512_fixupimm_ps(v, v, table, 0));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i word = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    word = _mm512_mask_add_epi32(word, odd, word, _mm512_set1_epi32(1));
    const __m512i uppers =
        _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25,
                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(uppers, word));
  }
  static TOKENOPS_INLINE Vec from_half(__m256i bits) { return {_mm512_cvtph_ps(bits)}; }
  TOKENOPS_INLINE __m256i to_half() const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static TOKENOPS_INLINE __m256i load_bits(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }

  static TOKENOPS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static TOKENOPS_INLINE Vec load(const c10::BFloat16* p) { return from_bfloat16(load_bits(p)); }
  static TOKENOPS_INLINE Vec load(const c10::Half* p) { return from_half(load_bits(p)); }
  static TOKENOPS_INLINE Vec load_partial(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  static TOKENOPS_INLINE Vec load_partial(const c10::BFloat16* p, int n) {
    return from_bfloat16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static TOKENOPS_INLINE Vec load_partial(const c10::Half* p, int n) {
    return from_half(_mm256_maskz_loadu_epi16(first(n), p));
  }
  TOKENOPS_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  TOKENOPS_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  TOKENOPS_INLINE void store(c10::BFloat16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16());
  }
  TOKENOPS_INLINE void store(c10::Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half());
  }
  TOKENOPS_INLINE void store_partial(float* p, int n) const {
    _mm512_mask_storeu_ps(p, first(n), v);
  }
  TOKENOPS_INLINE void store_partial(c10::BFloat16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), to_bfloat16());
  }
  TOKENOPS_INLINE void store_partial(c10::Half* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), to_half());
  }
};

#define TOKENOPS_FOR(V, S)                                                                      \
  TOKENOPS_INLINE V operator+(V a, V b) { return {_mm512_add_##S(a.v, b.v)}; }                  \
  TOKENOPS_INLINE V operator-(V a, V b) { return {_mm512_sub_##S(a.v, b.v)}; }                  \
  TOKENOPS_INLINE V operator*(V a, V b) { return {_mm512_mul_##S(a.v, b.v)}; }                  \
  TOKENOPS_INLINE V operator/(V a, V b) { return {_mm512_div_##S(a.v, b.v)}; }                  \
  TOKENOPS_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_##S(a.v, b.v, c.v)}; }            \
  TOKENOPS_INLINE V max(V a, V b) { return {_mm512_max_##S(a.v, b.v)}; }                        \
  TOKENOPS_INLINE V min(V a, V b) { return {_mm512_min_##S(a.v, b.v)}; }                        \
  TOKENOPS_INLINE V::Mask gt(V a, V b) { return _mm512_cmp_##S##_mask(a.v, b.v, _CMP_GT_OQ); }  \
  TOKENOPS_INLINE V::Mask eq(V a, V b) { return _mm512_cmp_##S##_mask(a.v, b.v, _CMP_EQ_OQ); }  \
  TOKENOPS_INLINE V::Mask is_nan(V a) { return _mm512_cmp_##S##_mask(a.v, a.v, _CMP_UNORD_Q); } \
  TOKENOPS_INLINE V::Mask mask_and(V::Mask m, V::Mask n) { return m & n; }                      \
  TOKENOPS_INLINE V::Mask mask_or(V::Mask m, V::Mask n) { return m | n; }                       \
  TOKENOPS_INLINE V blend(V::Mask m, V a, V b) { return {_mm512_mask_blend_##S(m, b.v, a.v)}; }
TOKENOPS_FOR(Vec<float>, ps)
TOKENOPS_FOR(Vec<double>, pd)
#undef TOKENOPS_FOR

TOKENOPS_INLINE float reduce_add(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
TOKENOPS_INLINE float reduce_max(Vec<float> a) { return _mm512_reduce_max_ps(a.v); }
TOKENOPS_INLINE double reduce_add(Vec<double> a) { return _mm512_reduce_add_pd(a.v); }
TOKENOPS_INLINE double reduce_max(Vec<double> a) { return _mm512_reduce_max_pd(a.v); }

TOKENOPS_INLINE Vec<float> round(Vec<float> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TOKENOPS_INLINE Vec<double> round(Vec<double> a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TOKENOPS_INLINE Vec<float> ldexp(Vec<float> a, Vec<float> n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}
TOKENOPS_INLINE Vec<double> ldexp(Vec<double> a, Vec<double> n) {
  return {_mm512_scalef_pd(a.v, n.v)};
}

}  // namespace avx512
TOKENOPS_TARGET_END
#endif  // TOKENOPS_X86

}  // namespace tokenops
