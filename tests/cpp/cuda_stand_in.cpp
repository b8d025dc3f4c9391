// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 that has one device and launches nothing: it keeps what the last launch was given.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using Result = int;  // CUresult

struct Config {  // CUlaunchConfig
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  void* attributes;
  unsigned number_of_attributes;
};

constexpr int kMost = 64;

struct Kept {
  uint64_t launches;
  uint64_t words[11];  // grid, block, shared memory, attributes, stream, function, parameters
  uint64_t parameters[kMost];
};

Kept kept = {};
int parameters = 0;     // that the next launch has
int bytes[kMost] = {};  // of each of them
Result outcome = 0;     // of the next launch
uint64_t loaded = 0;    // modules

}  // namespace

extern "C" {

Kept* stand_in_kept() { return &kept; }
void stand_in_expect(int number, const int* sizes, Result result) {
  parameters = number < kMost ? number : kMost;
  std::memcpy(bytes, sizes, parameters * sizeof(int));
  outcome = result;
}

Result cuLaunchKernelEx(const Config* config, void* function, void** values, void**) {
  const uint64_t words[] = {config->grid[0],
                            config->grid[1],
                            config->grid[2],
                            config->block[0],
                            config->block[1],
                            config->block[2],
                            config->shared_bytes,
                            config->number_of_attributes,
                            reinterpret_cast<uint64_t>(config->stream),
                            reinterpret_cast<uint64_t>(function),
                            static_cast<uint64_t>(parameters)};
  std::memcpy(kept.words, words, sizeof words);
  std::memset(kept.parameters, 0, sizeof kept.parameters);
  for (int i = 0; i < parameters; ++i) std::memcpy(&kept.parameters[i], values[i], bytes[i]);
  ++kept.launches;
  return outcome;
}

Result cuGetErrorString(Result, const char** text) {
  *text = "the stand-in refused";
  return 0;
}
Result cuCtxGetCurrent(void** context) {
  *context = &kept;
  return 0;
}
Result cuCtxSetCurrent(void*) { return 0; }
Result cuCtxGetLimit(size_t* value, int) {
  *value = 1 << 20;
  return 0;
}
Result cuCtxSetLimit(int, size_t) { return 0; }
Result cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void** context, int) { return cuCtxGetCurrent(context); }
Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
Result cuDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kSharedOptIn = 97, kSharedOfMultiprocessor = 81;
  *value = attribute == kSharedOptIn || attribute == kSharedOfMultiprocessor ? 227 << 10 : 1024;
  return 0;
}
Result cuModuleLoadData(void** module, const void*) {
  *module = reinterpret_cast<void*>(0x1000 + 16 * ++loaded);
  return 0;
}
Result cuModuleGetFunction(void** function, void* module, const char*) {
  *function = static_cast<char*>(module) + 8;
  return 0;
}
Result cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == 0 ? 1024 : 0;  // threads that a block may have
  return 0;
}
Result cuFuncSetAttribute(void*, int, int) { return 0; }
Result cuFuncSetCacheConfig(void*, int) { return 0; }
Result cuPointerGetAttribute(void* value, int, uint64_t pointer) {
  std::memcpy(value, &pointer, sizeof pointer);
  return 0;
}
Result cuOccupancyMaxActiveClusters(int* number, void*, void*) {
  *number = 1;
  return 0;
}
Result cuTensorMapEncodeTiled(void*) { return 0; }
Result cuTensorMapEncodeIm2col(void*) { return 0; }

}  // extern "C"
