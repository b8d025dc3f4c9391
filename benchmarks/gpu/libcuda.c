// SPDX-License-Identifier: Apache-2.0
// A stand-in for libcuda.so.1, so that Triton compiles for an H100 or H200 that is not there. It
// accepts every module and every launch and does nothing. Attributes are those of these devices.
#include <stddef.h>
#include <stdint.h>

typedef int Result;  // 0: success

#define SUCCEEDS(name, ...) \
  Result name(__VA_ARGS__) { return 0; }

// ---- context and device ----

SUCCEEDS(cuCtxSetCurrent, void* context)
SUCCEEDS(cuCtxSetLimit, int limit, size_t value)
Result cuCtxGetCurrent(void** context) { *context = (void*)0x10; return 0; }
Result cuCtxGetLimit(size_t* value, int limit) { *value = 1 << 20; return 0; }
Result cuCtxGetDevice(int* device) { *device = 0; return 0; }
Result cuStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
Result cuDeviceGet(int* device, int index) { *device = index; return 0; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { return cuCtxGetCurrent(context); }
Result cuDriverGetVersion(int* version) { *version = 13000; return 0; }
Result cuGetErrorString(Result error, const char** text) {
  *text = "an error of the stand-in for libcuda";
  return 0;
}
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 48 << 10; break;    // shared memory of a block
    case 10: *value = 32; break;         // threads of a warp
    case 12: *value = 64 << 10; break;   // registers of a block
    case 13: *value = 1980000; break;    // clock, kHz
    case 16: *value = 132; break;        // multiprocessors
    case 36: *value = 2619000; break;    // memory clock, kHz
    case 37: *value = 5120; break;       // bits of the memory bus
    case 81: *value = 228 << 10; break;  // shared memory of a multiprocessor
    case 97: *value = 227 << 10; break;  // shared memory of a block that asks for it
    default: *value = 1;
  }
  return 0;
}

// ---- modules and functions ----

SUCCEEDS(cuModuleUnload, void* module)
SUCCEEDS(cuFuncSetAttribute, void* function, int attribute, int value)
SUCCEEDS(cuFuncSetCacheConfig, void* function, int config)
// Weak: a test replaces it to keep the launch.
__attribute__((weak)) SUCCEEDS(cuLaunchKernelEx, const void* config, void* function, void** params,
                               void** extra)
Result cuModuleLoadData(void** module, const void* image) {
  static char* last = (char*)0x1000;
  *module = last += 16;
  return 0;
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (char*)module + 8;
  return 0;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 100 : 0;  // threads of a block; registers
  return 0;
}
Result cuOccupancyMaxActiveClusters(int* number, void* function, void* config) {
  *number = 1;
  return 0;
}

// ---- pointers: every one is of the device ----

SUCCEEDS(cuTensorMapEncodeTiled, void* map)
SUCCEEDS(cuTensorMapEncodeIm2col, void* map)
Result cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return 0;
}
Result cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t pointer) {
  for (unsigned i = 0; i < count; ++i) *(uint64_t*)data[i] = pointer;
  return 0;
}
