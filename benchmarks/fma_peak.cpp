// SPDX-License-Identifier: Apache-2.0
// Peak rate of fused multiply-adds: independent chains in registers, no memory.
// benchmarks/machine.py compiles it for the machine it runs on. Usage: fma_peak THREADS SECONDS;
// prints GFLOP/s in float32 and in bfloat16 (0 where there is no instruction for it), each the best
// of several trials.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#define OPAQUE(a, b) asm volatile("" : "+x"(a), "+x"(b))
#elif defined(__aarch64__)
#define OPAQUE(a, b) asm volatile("" : "+w"(a), "+w"(b))
#else
#define OPAQUE(a, b) asm volatile("" : "+m"(a), "+m"(b))
#endif

namespace {

using Clock = std::chrono::steady_clock;
constexpr long kSteps = 20000;

#if defined(__AVX512F__)
constexpr int kChains = 24;  // two units, four cycles of latency, and room
struct Float32 {
  using Vec = __m512;
  static constexpr double kFlops = 2 * 16;
  static Vec start(float x) { return _mm512_set1_ps(x); }
  static Vec step(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
};
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kChains = 12;
struct Float32 {
  using Vec = __m256;
  static constexpr double kFlops = 2 * 8;
  static Vec start(float x) { return _mm256_set1_ps(x); }
  static Vec step(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
};
#else
constexpr int kChains = 12;
struct Float32 {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr double kFlops = 2 * 4;
  static Vec start(float x) { return Vec{x, x, x, x}; }
  static Vec step(Vec a, Vec b, Vec sum) { return a * b + sum; }
};
#endif

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Vec = __m512;
  static constexpr double kFlops = 2 * 32;
  static Vec start(float x) { return _mm512_set1_ps(x); }
  static Vec step(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

template <class Kind>
void spin() {
  typename Kind::Vec sums[kChains];
  typename Kind::Vec a = Kind::start(1.0f), b = Kind::start(1e-3f);
  for (int c = 0; c < kChains; ++c) sums[c] = Kind::start(static_cast<float>(c));
  for (long i = 0; i < kSteps; ++i) {
    OPAQUE(a, b);  // else the product is taken out of the loop
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sums[c] = Kind::step(a, b, sums[c]);
  }
  for (auto& sum : sums) asm volatile("" : : "m"(sum));  // the results count as used
}

template <class Kind>
double gflops(int threads, double seconds) {
  double best = 0;
  for (int trial = 0; trial < 8; ++trial) {
    std::atomic<int> ready{0};
    std::vector<double> rates(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        spin<Kind>();
        ++ready;
        while (ready < threads) std::this_thread::yield();
        const auto begin = Clock::now();
        double elapsed = 0;
        long runs = 0;
        while (elapsed < seconds / 8) {
          spin<Kind>();
          ++runs;
          elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
        }
        rates[t] = runs * Kind::kFlops * kChains * kSteps / elapsed * 1e-9;
      });
    for (auto& thread : pool) thread.join();
    double sum = 0;
    for (double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 1.0;
  double bfloat16 = 0;
#if defined(__AVX512BF16__)
  bfloat16 = gflops<BFloat16>(threads, seconds);
#endif
  std::printf("%.2f %.2f\n", gflops<Float32>(threads, seconds), bfloat16);
}
