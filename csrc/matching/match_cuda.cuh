// SPDX-License-Identifier: Apache-2.0
// A whole match by one block for an image: sides, search, choice and map in one launch.
#pragma once

#include "search_cuda.cuh"
#include "select_cuda.cuh"

namespace tokenops::matching {

// Where what a block has in shared memory lies, in bytes. The choice and the lists of sides take
// the place of the search.
struct MatchLayout {
  int64_t source, destination, score, choice, first, rest, bytes;

  TOKENOPS_HOST_DEVICE MatchLayout(const Choice& ask, int steps, int tiles) {
    source = 0;
    destination = source + 4 * int64_t{ask.sources};
    score = destination + 4 * int64_t{ask.destinations};
    choice = score + 4 * int64_t{ask.sources};
    first = choice + 4 * int64_t{ask.sources};
    rest = (first + 4 + 15) / 16 * 16;
    const int64_t search = search_bytes(ask.destinations, steps, tiles);
    const int64_t select = few_bytes<float>(ask);
    const int64_t lists = ask.listed ? (ask.tokens + kMostThreads / 32 + 1) * int64_t{4} : 0;
    const int64_t most = search > select ? search : select;
    bytes = rest + (most > lists ? most : lists);
  }
};

// The tokens of both sides; returns how many destinations there are.
__device__ __forceinline__ int list_tokens(const Choice& ask, int32_t* source, int32_t* destination,
                                           int* scratch) {
  if (!ask.listed) {
    for (int i = threadIdx.x; i < ask.sources; i += blockDim.x) source[i] = ask.rule.source(i);
    for (int i = threadIdx.x; i < ask.destinations; i += blockDim.x) {
      destination[i] = ask.rule.destination(i);
    }
    return ask.destinations;
  }
  int* const listed = scratch + kMostThreads / kWarpSize + 1;  // [tokens]
  for (int t = threadIdx.x; t < ask.tokens; t += blockDim.x) listed[t] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < ask.sources; i += blockDim.x) {
    source[i] = ask.source_index.at(i, ask.tokens);
  }
  for (int i = threadIdx.x; i < ask.destinations; i += blockDim.x) {
    listed[ask.destination_index.at(i, ask.tokens)] = 1;
  }
  __syncthreads();
  const int found = enumerate(
      ask.tokens, scratch, [&](int t) { return listed[t] != 0; },
      [&](int t, int place) { destination[place] = t; });
  __syncthreads();
  return found;
}

// Blocks that share a multiprocessor. Compiled for sm_80, rows of 64 elements in two parts would
// spill if there were two.
template <bool Exact, int Steps, int Tiles>
constexpr int resident_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (!Exact && Steps == 8) return 1;
#endif
  return in_pairs(Steps, Tiles) ? 2 : 1;
}

template <bool Exact, int Steps, int Tiles>
__global__ void __launch_bounds__(search_warps(Steps, Tiles) * kWarpSize,
                                  resident_blocks<Exact, Steps, Tiles>())
    match_image(MetricRows x, Choice asked, bool cosine, ChosenMap maps) {
  const int64_t image = blockIdx.x;
  const Choice ask = asked.row(image);
  const MatchLayout at(ask, Steps, Tiles);
  char* const memory = cuda::shared_memory();
  int32_t* const source = reinterpret_cast<int32_t*>(memory + at.source);
  int32_t* const destination = reinterpret_cast<int32_t*>(memory + at.destination);
  float* const score = reinterpret_cast<float*>(memory + at.score);
  int32_t* const choice = reinterpret_cast<int32_t*>(memory + at.choice);
  int* const first = reinterpret_cast<int*>(memory + at.first);
  int* const scratch = reinterpret_cast<int*>(memory + at.rest);

  const int destinations = list_tokens(ask, source, destination, scratch);
  const SearchMemory parts = {source, destination, score, choice, first, memory + at.rest};
  const auto counts = [&](int token) {
    return token >= ask.prefix &&
           (ask.is_protected == nullptr || ask.is_protected[token * ask.protected_stride] == 0);
  };
  search_image<Exact, Steps, Tiles>(x, image, ask.sources, destinations, cosine, parts, counts);
  select_few(ask, score, choice, memory + at.rest, maps.row(ask, image));
}

}  // namespace tokenops::matching
