// SPDX-License-Identifier: Apache-2.0
// A stand-in for libcuda that records the last launch and fails on request.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;  // 0: success

struct Config {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  unsigned number_of_attributes;
};

enum { kMost = 64 };

static struct {
  uint64_t launches;
  uint64_t config[10];  // grid, block, shared memory, number of attributes, stream, function
  uint64_t parameters[kMost];
} kept;

static int parameters = 0;  // number of the kernel's parameters
static int bytes[kMost];    // size of each parameter
static Result outcome = 0;  // returned by the next launches

const uint64_t* kept_launches(void) { return &kept.launches; }

void expect_launches(int number, const int* sizes, Result result) {
  parameters = number < kMost ? number : kMost;
  memcpy(bytes, sizes, parameters * sizeof *sizes);
  outcome = result;
}

Result cuLaunchKernelEx(const struct Config* config, void* function, void** values, void** extra) {
  const uint64_t words[] = {config->grid[0],           config->grid[1],
                            config->grid[2],           config->block[0],
                            config->block[1],          config->block[2],
                            config->shared_bytes,      config->number_of_attributes,
                            (uintptr_t)config->stream, (uintptr_t)function};
  memcpy(kept.config, words, sizeof words);
  memset(kept.parameters, 0, sizeof kept.parameters);
  for (int i = 0; i < parameters; ++i) memcpy(&kept.parameters[i], values[i], bytes[i]);
  ++kept.launches;
  return outcome;
}
