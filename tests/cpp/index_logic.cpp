// SPDX-License-Identifier: Apache-2.0
// Tests the index arithmetic of the CUDA kernels on the CPU: random cases against plain loops.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "matching/select.h"
#include "merging/merging.h"

using namespace tokenops;
using namespace tokenops::matching;

namespace {

std::mt19937_64 generator(7);

int64_t number(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

void sides_of_a_pattern() {
  for (uint32_t stride = 1; stride <= 9; ++stride) {
    const Strided pattern = {stride};
    int32_t num_src = 0, num_dst = 0;
    for (uint32_t token = 0; token < 100; ++token) {
      const bool is_dst = token % stride == stride - 1;
      CHECK(pattern.dst_before(token) == num_dst);
      CHECK(pattern.src_index(token) == (is_dst ? -1 : num_src));
      if (is_dst) {
        CHECK(pattern.dst(num_dst++) == static_cast<int32_t>(token));
      } else {
        CHECK(pattern.src(num_src++) == static_cast<int32_t>(token));
      }
    }
  }
}

template <class A>
A any_score() {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  const A special[] = {A(0),
                       -A(0),
                       kInfinity,
                       -kInfinity,
                       std::numeric_limits<A>::denorm_min(),
                       -std::numeric_limits<A>::denorm_min(),
                       std::numeric_limits<A>::max(),
                       std::numeric_limits<A>::lowest(),
                       A(1),
                       A(-1)};
  if (number(0, 2) == 0) return special[number(0, 9)];
  return std::ldexp(A(number(-1000, 1000)), static_cast<int>(number(-60, 60)));
}

template <class A>
void keys_order_scores() {
  for (int i = 0; i < 20000; ++i) {
    const A a = any_score<A>(), b = any_score<A>();
    CHECK((key_of(a) < key_of(b)) == (a > b));
    CHECK((key_of(a) == key_of(b)) == (a == b));
    CHECK(key_of(a) <= kUnscored<A>);
    CHECK((key_of(a) == kUnscored<A>) == (a == -std::numeric_limits<A>::infinity()));
  }
  CHECK(key_of(std::numeric_limits<A>::quiet_NaN()) == kUnscored<A>);
  CHECK(kUnscored<A> < kProtected<A> && kProtected<A> < kNever<A>);
}

// Radix select as a thread block computes it, with a histogram for each digit.
template <class W>
void intervals_find_the_nth_smallest() {
  for (int i = 0; i < 3000; ++i) {
    const int count = static_cast<int>(number(1, 40));
    const W base = static_cast<W>(generator());
    const int spread = static_cast<int>(number(0, 8 * sizeof(W) - 1));
    std::vector<W> numbers(count);
    for (W& x : numbers) {
      x = static_cast<W>(generator()) >> spread;
      if (number(0, 1)) x = base;  // ties
    }
    std::vector<W> sorted = numbers;
    std::sort(sorted.begin(), sorted.end());
    const int rank = static_cast<int>(number(0, count - 1));
    Interval<W> among = {sorted.front(), sorted.back(), rank, count};
    for (int round = 0; !among.takes_all() && among.low < among.high; ++round) {
      CHECK(round < 10);
      const int shift = among.shift();
      std::vector<int> digits(1 << kDigitBits);
      for (W x : numbers) {
        if (among.holds(x)) ++digits.at(among.digit(x, shift));
      }
      int digit = 0, before = 0;
      while (before + digits[digit] <= among.rank) before += digits[digit++];
      among = among.of_digit(digit, shift, before, digits[digit]);
    }
    // The numbers up to the interval's end are the rank + 1 smallest, or the interval is the n-th.
    if (among.takes_all()) {
      const auto up_to =
          std::count_if(numbers.begin(), numbers.end(), [&](W x) { return x <= among.high; });
      CHECK(up_to == rank + 1 && among.holds(sorted[rank]));
    } else {
      CHECK(among.low == sorted[rank]);
    }
  }
}

void ranks_go_by_key_then_token() {
  using R = KeyedToken<uint32_t>;
  const R last = {10, 4};
  const R others[] = {{9, 100}, {10, 4}, {10, 0}};
  for (const R& other : others) CHECK(!(last < other));
  const R behind[] = {{10, 5}, {11, 0}};
  CHECK(last < behind[0] && last < behind[1]);
}

void wild_indices_stay_inside() {
  for (int i = 0; i < 20000; ++i) {
    const int32_t count = static_cast<int32_t>(number(1, 50));
    const int64_t value = number(0, 1) ? number(-60, 60) : static_cast<int64_t>(generator());
    const int32_t inside = clamp_index(value, count);
    CHECK(0 <= inside && inside < count);
    CHECK(value < 0 || value >= count || inside == value);

    const int64_t inputs = number(0, 9), outputs = number(0, 9), middle = number(1, 9);
    const auto wild = [&](int64_t size) {
      std::vector<int32_t> out(size + 1);
      for (int32_t& x : out) {
        x = static_cast<int32_t>(number(0, 3) ? number(-2, 12) : number(INT32_MIN, INT32_MAX));
      }
      return out;
    };
    const std::vector<int32_t> assign = wild(inputs + middle), earlier = wild(inputs);
    const std::vector<int32_t> offsets = wild(outputs), members = wild(inputs);
    const merging::TokenMap map = {assign.data(), offsets.data(), members.data(), 1,
                                   inputs,        outputs};
    for (int64_t m = 0; m < outputs; ++m) {
      const merging::Segment segment = map.segment(0, m);
      CHECK(segment.count >= 0 && segment.members >= members.data());
      CHECK(segment.members + segment.count <= members.data() + inputs);
    }
    const merging::Assignment direct = {assign.data(), nullptr, 1, inputs, inputs, outputs};
    const merging::Assignment through = {assign.data(), earlier.data(), 1, inputs, middle, outputs};
    for (int64_t n = 0; n < inputs; ++n) {
      const bool live = assign[n] >= 0 && assign[n] < outputs;
      CHECK(direct(0, n) == (live ? assign[n] : -1));
      CHECK(map.output_of(0, n) == direct(0, n));
      const bool known = earlier[n] >= 0 && earlier[n] < middle;
      const int32_t to = known ? assign[earlier[n]] : -1;
      CHECK(through(0, n) == (to >= 0 && to < outputs ? to : -1));
    }
  }
}

void comparing_members_stays_cheap() {
  int before = 0;
  for (int64_t tokens = 1; tokens < int64_t{1} << 22; tokens = tokens * 3 / 2 + 1) {
    const int bits = short_bits(tokens);
    CHECK(5 <= bits && bits <= 10 && before <= bits);
    before = bits;
  }
}

}  // namespace

int main() {
  sides_of_a_pattern();
  keys_order_scores<float>();
  keys_order_scores<double>();
  intervals_find_the_nth_smallest<uint32_t>();
  intervals_find_the_nth_smallest<uint64_t>();
  ranks_go_by_key_then_token();
  wild_indices_stay_inside();
  comparing_members_stays_cheap();
  std::printf("passed\n");
}
