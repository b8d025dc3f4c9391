// SPDX-License-Identifier: Apache-2.0
// Finds the best destinations of one small image, by one block on tensor cores.
//
// Destinations are in shared memory as float32. Each warp holds the rows of some sources in
// registers and goes over all destinations. Rows of one head in half precision are exact in the 11
// bits of tf32: one product in tf32 suffices. Others are split into a high and a low part of tf32,
// and three products keep the precision of float32 (3xTF32). The row of a destination that takes no
// part is NaN, so that no comparison is true.
#pragma once

#include <cmath>

#include "../cuda.cuh"
#include "arguments.h"

namespace tokenops::matching {

using cuda::kAllLanes;
using cuda::kWarpSize;

// Whether registers allow two blocks on a multiprocessor: one loads while the other multiplies.
TOKENOPS_HOST_DEVICE constexpr bool two_per_sm(int steps, int tiles) {
  return tiles == 1 && steps <= 8;
}
// Warps of a block. Seven warps of 16 sources suit 197 to 224 tokens (ViT), half of them sources.
TOKENOPS_HOST_DEVICE constexpr int search_warps(int steps, int tiles) {
  return two_per_sm(steps, tiles) ? 7 : 8;
}

// A metric as kernels read it.
struct MetricRows : Metric {
  int32_t type;  // 0: float, 1: half, 2: bfloat16
  bool paired;   // elements 2 i and 2 i + 1 may be loaded at once

  explicit MetricRows(const Metric& x) : Metric(x) {
    type = dtype == ScalarType::Float ? 0 : dtype == ScalarType::Half ? 1 : 2;
    const int64_t pair = type == 0 ? 8 : 4;  // bytes
    paired = stride == 1 && width % 2 == 0 && batch_stride % 2 == 0 && head_stride % 2 == 0 &&
             token_stride % 2 == 0 && reinterpret_cast<uintptr_t>(data) % pair == 0;
  }
};

// ---- products of matrices ----

// Round to tf32, which has 11 significant bits; ties away from zero.
__device__ __forceinline__ float to_tf32(float x) {
#if defined(TOKENOPS_EMULATE)
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&x, &bits, 4);
  return x;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#endif
}

// sums += a b for a of 16 by 8 and b of 8 by 8 elements, in the fragments of mma.m16n8k8: with
// g = lane / 4 and t = lane % 4, a[i] is row g + 8 (i % 2), column t + 4 (i / 2); b[i] is row
// t + 4 i, column g; sums[i] is row g + 8 (i / 2), column 2 t + i % 2.
__device__ __forceinline__ void multiply(float (&sums)[4], const float (&a)[4],
                                         const float (&b)[2]) {
#if defined(TOKENOPS_EMULATE)
  struct Fragments {
    float a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  emulate::in_warp(mine, [&](auto of_lane) {
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < 8; ++k) {
        const float left = of_lane(g * 4 + k % 4).a[i / 2 + k / 4 * 2];
        const float right = of_lane((2 * t + i % 2) * 4 + k % 4).b[k / 4];
        sums[i] += to_tf32(left) * to_tf32(right);
      }
    }
    return 0;
  });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

// ---- rows ----

// Rows that a warp loads at a time, averaged over heads, zero past the width. Lane l holds elements
// 2 l and 2 l + 1 of every 64.
template <int Steps, int kBatch>
struct RowBatch {
  static constexpr int kPairs = (Steps * 8 + 63) / 64;
  float value[kBatch][kPairs][2];

  // Load the rows of tokens `token(i)`, i < kBatch.
  template <class F>
  __device__ __forceinline__ void load(const MetricRows& x, int64_t image, const F& token) {
    switch (x.type) {
      case 0: return load_as<float>(x, image, token);
      case 1: return load_as<c10::Half>(x, image, token);
      default: return load_as<c10::BFloat16>(x, image, token);
    }
  }

  // Issues all loads of a head before it uses the first one.
  template <class T, class F>
  __device__ __forceinline__ void load_as(const MetricRows& x, int64_t image, const F& token) {
    const T* base = static_cast<const T*>(x.data) + image * x.batch_stride;
    const int first = threadIdx.x % kWarpSize * 2;
    int64_t at[kBatch];
    TOKENOPS_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      at[i] = token(i) * x.token_stride + first * x.stride;
      TOKENOPS_UNROLL
      for (int p = 0; p < kPairs; ++p) value[i][p][0] = value[i][p][1] = 0;
    }
    for (int h = 0; h < x.heads; ++h, base += x.head_stride) {
      cuda::Pack<T, 2> loaded[kBatch][kPairs];
      TOKENOPS_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        TOKENOPS_UNROLL
        for (int p = 0; p < kPairs; ++p) {
          const T* from = base + at[i] + p * 64 * x.stride;
          const int d = first + p * 64;
          if (x.paired) {
            if (d < x.width) loaded[i][p] = *reinterpret_cast<const cuda::Pack<T, 2>*>(from);
          } else {
            if (d < x.width) loaded[i][p].item[0] = from[0];
            if (d + 1 < x.width) loaded[i][p].item[1] = from[x.stride];
          }
        }
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        TOKENOPS_UNROLL
        for (int p = 0; p < kPairs; ++p) {
          const int d = first + p * 64;
          if (d < x.width) value[i][p][0] += static_cast<float>(loaded[i][p].item[0]);
          if (d + 1 < x.width) value[i][p][1] += static_cast<float>(loaded[i][p].item[1]);
        }
      }
    }
    if (x.heads == 1) return;
    TOKENOPS_UNROLL
    for (int i = 0; i < kBatch * kPairs * 2; ++i) {
      value[i / 2 / kPairs][i / 2 % kPairs][i % 2] /= static_cast<float>(x.heads);
    }
  }

  // 1 / length of row i, or 0 for a length of 0, in all lanes.
  __device__ __forceinline__ float inverse_length(int i) const {
    float squares = 0;
    TOKENOPS_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      squares += value[i][p][0] * value[i][p][0] + value[i][p][1] * value[i][p][1];
    }
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
      squares += __shfl_xor_sync(kAllLanes, squares, bits);
    }
    return squares == 0 ? 0 : 1 / sqrtf(squares);
  }

  __device__ __forceinline__ void store(int i, float* to, float factor) const {
    TOKENOPS_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      const int d = p * 64 + threadIdx.x % kWarpSize * 2;
      if (d >= Steps * 8) continue;
      to[d] = value[i][p][0] * factor;
      to[d + 1] = value[i][p][1] * factor;
    }
  }
};

// ---- the search ----

// Shared memory of a block. The lists of both sides are inputs, node_max and node_idx outputs.
struct SearchMemory {
  const int32_t* src;  // [num_src] tokens
  const int32_t* dst;  // [num_dst] tokens, ascending
  float* node_max;     // [num_src]
  int32_t* node_idx;   // [num_src]
  int* first;          // [1] the index of the first destination that takes part
  char* rows;          // search_bytes(num_dst, steps, tiles)
};

// Floats from one row to the next: four more than elements, so that the rows of a fragment are in
// different banks.
TOKENOPS_HOST_DEVICE constexpr int row_pitch(int steps) { return steps * 8 + 4; }

TOKENOPS_HOST_DEVICE int64_t search_bytes(int64_t num_dst, int steps, int tiles) {
  const int64_t padded = (num_dst + 7) / 8 * 8;
  return (padded * row_pitch(steps) + padded + search_warps(steps, tiles) * 16 * row_pitch(steps)) *
         static_cast<int64_t>(sizeof(float));
}

// Find the best destination of each source of an image among the destinations that
// takes_part(token) holds for: of equal scores the first one, and the first of all if no score is
// above -inf. Exact: rows are exact in tf32, so they are multiplied as they are and their scores
// are scaled by the inverse lengths. Steps: a row has 8 * Steps elements. Tiles: a warp holds 16 *
// Tiles sources.
template <bool Exact, int Steps, int Tiles, class TakesPart>
__device__ __forceinline__ void search_image(const MetricRows& x, int64_t image, int num_src,
                                             int num_dst, bool cosine, const SearchMemory& memory,
                                             const TakesPart& takes_part) {
  constexpr int kPitch = row_pitch(Steps), kWarps = search_warps(Steps, Tiles);
  constexpr int kBatch = two_per_sm(Steps, Tiles) ? 4 : 8;  // rows that a warp loads at a time
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int padded = (num_dst + 7) / 8 * 8;
  float* const rows = reinterpret_cast<float*>(memory.rows);  // [padded, kPitch]
  float* const inverse = rows + padded * kPitch;              // [padded]
  float* const staging = inverse + padded + warp * 16 * kPitch;
  const float nan = nanf("");

  if (threadIdx.x == 0) *memory.first = INT_MAX;
  __syncthreads();
  RowBatch<Steps, kBatch> batch;
  for (int begin = warp * kBatch; begin < padded; begin += kWarps * kBatch) {
    const auto token = [&](int i) {
      return memory.dst[begin + i < num_dst ? begin + i : num_dst - 1];
    };
    batch.load(x, image, token);
    TOKENOPS_UNROLL
    for (int i = 0; i < kBatch; ++i) {  // padded is a multiple of the batch
      const int j = begin + i;
      const float cosine_factor = cosine ? batch.inverse_length(i) : 1;
      const bool candidate = j < num_dst && takes_part(token(i));
      if (candidate && lane == 0) atomicMin(memory.first, j);
      const float factor = candidate ? cosine_factor : nan;
      batch.store(i, rows + j * kPitch, Exact ? 1 : factor);
      if (Exact && lane == 0) inverse[j] = factor;
    }
  }
  __syncthreads();

  for (int begin = warp * Tiles * 16; begin < num_src; begin += kWarps * Tiles * 16) {
    float high[Tiles][Steps][4], low[Tiles][Exact ? 1 : Steps][4], scale[Tiles][2];
    TOKENOPS_UNROLL
    for (int tile = 0; tile < Tiles; ++tile) {
      float row_factor = 1;  // lane i holds the factor of row i
      for (int half = 0; half < 16; half += kBatch) {
        const int at = begin + tile * 16 + half;
        batch.load(x, image,
                   [&](int i) { return memory.src[at + i < num_src ? at + i : num_src - 1]; });
        TOKENOPS_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          const float factor = cosine ? batch.inverse_length(i) : 1;
          if (lane == half + i) row_factor = factor;
          batch.store(i, staging + (half + i) * kPitch, Exact ? 1 : factor);
        }
      }
      scale[tile][0] = __shfl_sync(kAllLanes, row_factor, g);
      scale[tile][1] = __shfl_sync(kAllLanes, row_factor, g + 8);
      __syncwarp();
      TOKENOPS_UNROLL
      for (int step = 0; step < Steps; ++step) {
        TOKENOPS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float value = staging[(g + i % 2 * 8) * kPitch + step * 8 + t + i / 2 * 4];
          high[tile][step][i] = Exact ? value : to_tf32(value);
          if (!Exact) low[tile][Exact ? 0 : step][i] = to_tf32(value - high[tile][step][i]);
        }
      }
      __syncwarp();
    }

    float best[Tiles][2];
    int at[Tiles][2];
    TOKENOPS_UNROLL
    for (int i = 0; i < Tiles * 2; ++i) best[i / 2][i % 2] = -INFINITY, at[i / 2][i % 2] = INT_MAX;
    for (int column = 0; column < padded; column += 8) {
      float large[Tiles][4] = {}, small[Tiles][4] = {};
      const float* const from = rows + (column + g) * kPitch + t;
      TOKENOPS_UNROLL
      for (int step = 0; step < Steps; ++step) {
        const float b[2] = {from[step * 8], from[step * 8 + 4]};
        if (Exact) {
          TOKENOPS_UNROLL
          for (int tile = 0; tile < Tiles; ++tile) multiply(large[tile], high[tile][step], b);
        } else {
          const float b_high[2] = {to_tf32(b[0]), to_tf32(b[1])};
          const float b_low[2] = {to_tf32(b[0] - b_high[0]), to_tf32(b[1] - b_high[1])};
          TOKENOPS_UNROLL
          for (int tile = 0; tile < Tiles; ++tile) {
            multiply(small[tile], low[tile][Exact ? 0 : step], b_high);
            multiply(small[tile], high[tile][step], b_low);
            multiply(large[tile], high[tile][step], b_high);
          }
        }
      }
      TOKENOPS_UNROLL
      for (int i = 0; i < Tiles * 4; ++i) {
        const int tile = i / 4, c = i % 4, j = column + 2 * t + c % 2;
        float score = large[tile][c];
        if (Exact) {
          score *= inverse[j];
        } else if (small[tile][c] == small[tile][c]) {  // NaN if a row has an infinite element
          score += small[tile][c];
        }
        if (score > best[tile][c / 2]) best[tile][c / 2] = score, at[tile][c / 2] = j;
      }
    }
    // Four lanes share a row and saw different columns: reduce over them.
    TOKENOPS_UNROLL
    for (int i = 0; i < Tiles * 2; ++i) {
      float mine = best[i / 2][i % 2];
      int where = at[i / 2][i % 2];
      for (int bits = 1; bits < 4; bits *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, mine, bits);
        const int there = __shfl_xor_sync(kAllLanes, where, bits);
        if (other > mine || (other == mine && there < where)) mine = other, where = there;
      }
      const int row = begin + i / 2 * 16 + g + i % 2 * 8;
      if (t == 0 && row < num_src) {
        const bool found = mine > -INFINITY;
        const int first = *memory.first == INT_MAX ? -1 : *memory.first;
        memory.node_max[row] = found ? mine * (Exact ? scale[i / 2][i % 2] : 1) : -INFINITY;
        memory.node_idx[row] = found ? where : first;
      }
    }
  }
  __syncthreads();
}

}  // namespace tokenops::matching
