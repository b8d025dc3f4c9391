// SPDX-License-Identifier: Apache-2.0
// A stand-in for libcuda.so.1, to let Triton compile for an H100 or H200 that is not there: it
// accepts every module and every launch and does nothing. What Triton asks of a device is what
// these two would answer.
#include <stddef.h>
#include <stdint.h>

typedef int Result;  // 0: success

// Tests put another one in its place, which keeps the launch.
__attribute__((weak)) Result cuLaunchKernelEx(const void* config, void* function, void** params,
                                              void** extra) {
  return 0;
}
Result cuGetErrorString(Result error, const char** text) {
  *text = "an error of the stand-in for libcuda";
  return 0;
}

// ---- context and device ----

Result cuCtxGetCurrent(void** context) {
  *context = (void*)0x10;
  return 0;
}
Result cuCtxSetCurrent(void* context) { return 0; }
Result cuCtxGetLimit(size_t* value, int limit) {
  *value = 1 << 20;
  return 0;
}
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
Result cuStreamIsCapturing(void* stream, int* status) {
  *status = 0;
  return 0;
}
Result cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) { return cuCtxGetCurrent(context); }
Result cuDriverGetVersion(int* version) {
  *version = 13000;
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

Result cuModuleLoadData(void** module, const void* image) {
  static char* last = (char*)0x1000;
  *module = last += 16;
  return 0;
}
Result cuModuleUnload(void* module) { return 0; }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (char*)module + 8;
  return 0;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 100 : 0;  // threads of a block; registers
  return 0;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void* function, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int* number, void* function, void* config) {
  *number = 1;
  return 0;
}

// ---- pointers: every one is the device's ----

Result cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  *(uint64_t*)data = pointer;
  return 0;
}
Result cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t pointer) {
  for (unsigned i = 0; i < count; ++i) *(uint64_t*)data[i] = pointer;
  return 0;
}
Result cuTensorMapEncodeTiled(void* map) { return 0; }
Result cuTensorMapEncodeIm2col(void* map) { return 0; }
