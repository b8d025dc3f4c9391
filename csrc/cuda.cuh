// SPDX-License-Identifier: Apache-2.0
// Shared by the CUDA operators: device and stream, launches, shared memory, scans within a block.
//
// Kernels use only the x axis, dynamic shared memory, and the device functions that emulate.h has:
// with TOKENOPS_EMULATE they are compiled as C++ and run on CPU tensors.
#pragma once

#include <atomic>
#include <climits>
#include <optional>
#include <string>

#include "tensors.h"

#if defined(TOKENOPS_EMULATE)
#include "emulate.h"
#define TOKENOPS_DEVICE CPU
#define TOKENOPS_UNROLL
#define TOKENOPS_UNROLL_4
#else
#include <cuda_runtime.h>
#include <dlfcn.h>
#define TOKENOPS_DEVICE CUDA
#define TOKENOPS_UNROLL _Pragma("unroll")
#define TOKENOPS_UNROLL_4 _Pragma("unroll 4")
#endif

namespace tokenops::cuda {

// ---- on the host ----

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
};

// Where the kernels of one call run: the device of its first tensor, and the current stream.
class Target {
 public:
  Target(const char* op, const Tensor& first) : op_(op), first_(first) {
#if !defined(TOKENOPS_EMULATE)
    device_ = first.get_device_index();
    check(cudaGetDevice(&previous_));
    if (previous_ != device_) check(cudaSetDevice(device_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream_function()(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
#endif
  }

  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;
#if !defined(TOKENOPS_EMULATE)
  ~Target() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
#endif

  // Check that a tensor is on this device.
  void expect(const char* name, const Tensor& t) const {
#if !defined(TOKENOPS_EMULATE)
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, op_, ": expected ", name,
                    " on CUDA device ", device_);
#else
    (void)name, (void)t;
#endif
  }
  void expect(const char* name, const std::optional<Tensor>& t) const {
    if (t) expect(name, *t);
  }

  // A new contiguous tensor on this device, uninitialised.
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return tokenops::empty(sizes, dtype, first_);
  }

  // The most bytes of shared memory that a block can have.
  int64_t max_shared_bytes() const {
#if defined(TOKENOPS_EMULATE)
    return int64_t{227} << 10;
#else
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];  // 0 until queried
    int bytes = device_ < kDevices ? known[device_].load() : 0;
    if (bytes == 0) {
      check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
      if (device_ < kDevices) known[device_] = bytes;
    }
    return bytes;
#endif
  }

#if !defined(TOKENOPS_EMULATE)
  cudaStream_t stream() const { return stream_; }

  void check(cudaError_t error, const Grid* grid = nullptr) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, which the next launch would report again
    const bool unknown =
        error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    STD_TORCH_CHECK(!unknown, op_, ": the library was not compiled for this device; ",
                    "TOKENOPS_CUDA_ARCHS names what it is compiled for, tokenops.use_backend "
                    "chooses another backend");
    STD_TORCH_CHECK(grid == nullptr, op_, ": ", shape(), ": launching ", grid->blocks,
                    " blocks of ", grid->threads, " threads with ", grid->shared_bytes,
                    " bytes of shared memory: ", cudaGetErrorString(error));
    STD_TORCH_CHECK(false, op_, ": ", shape(), ": ", cudaGetErrorString(error));
  }
#endif

  // Set memory on this device to zero, on the stream.
  void zero(void* memory, int64_t bytes) const {
#if defined(TOKENOPS_EMULATE)
    std::memset(memory, 0, static_cast<size_t>(bytes));
#else
    check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream_));
#endif
  }

  // Launch a kernel, unless the grid is empty. Errors name the operator and the shape of its first
  // tensor.
  template <class... P, class... A>
  void launch(void (*kernel)(P...), Grid grid, A... args) const {
    if (grid.blocks <= 0) return;
    STD_TORCH_CHECK(grid.blocks <= INT_MAX, op_, ": ", shape(), " needs ", grid.blocks,
                    " blocks, at most ", INT_MAX, " can be launched");
#if defined(TOKENOPS_EMULATE)
    emulate::launch<P...>(kernel, grid.blocks, grid.threads, grid.shared_bytes, P(args)...);
#else
    constexpr int64_t kDefaultMax = 48 << 10;
    if (grid.shared_bytes > kDefaultMax) {  // every call sets the same limit: no race of threads
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(max_shared_bytes())));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, P(args)...), &grid);
#endif
  }

 private:
  std::string shape() const {
    std::string text = "input [";
    for (int64_t d = 0; d < first_.dim(); ++d) {
      text += (d > 0 ? ", " : "") + std::to_string(first_.size(d));
    }
    return text + "]";
  }

  const char* op_;
  const Tensor& first_;
#if !defined(TOKENOPS_EMULATE)
  // Looked up in PyTorch's CUDA library: this library, which works with any PyTorch, is not linked
  // to it.
  using StreamFunction = AOTITorchError (*)(int32_t device_index, void** stream);
  StreamFunction current_stream_function() const {
    static const StreamFunction found = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      if (library == nullptr) library = RTLD_DEFAULT;
      return reinterpret_cast<StreamFunction>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(found != nullptr, op_, ": this PyTorch has no CUDA");
    return found;
  }

  int device_ = 0, previous_ = 0;
  cudaStream_t stream_ = nullptr;
#endif
};

// A kernel that `python -m tokenops.info` reports, as a global constant beside the kernel:
// `const Reported reported("name", kernel, threads, shared_bytes);`
struct Reported {
  const char* name;
  const void* function;
  int threads;
  int64_t shared_bytes;
  const Reported* next;

  template <class... P>
  Reported(const char* name_, void (*kernel)(P...), int threads_, int64_t shared_bytes_ = 0)
      : name(name_),
        function(reinterpret_cast<const void*>(kernel)),
        threads(threads_),
        shared_bytes(shared_bytes_),
        next(first()) {
    first() = this;
  }
  static const Reported*& first() {
    static const Reported* head = nullptr;
    return head;
  }
};

// ---- in kernels ----

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
#if defined(TOKENOPS_EMULATE)
  return emulate::running().block->shared;
#else
  extern __shared__ __align__(128) char tokenops_shared[];
  return tokenops_shared;
#endif
}

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

// V elements that one instruction loads or stores.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T item[V];
};

// Exclusive scan: returns the sum of the values of all threads before this one; `total` is the sum
// of all. All threads of the block must call it, and the block must have whole warps. `scratch`
// holds one int per warp, and one more.
__device__ __forceinline__ int exclusive_scan(int value, int* scratch, int* total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int sum = value;
  for (int by = 1; by < kWarpSize; by *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, by);
    if (lane >= by) sum += other;
  }
  __syncthreads();  // after the last reads of scratch
  if (lane == kWarpSize - 1) scratch[warp] = sum;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  if (warp == 0) {
    const int own = lane < warps ? scratch[lane] : 0;
    int before = own;
    for (int by = 1; by < kWarpSize; by *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, by);
      if (lane >= by) before += other;
    }
    if (lane < warps) scratch[lane] = before - own;
    if (lane == warps - 1) scratch[warps] = before;
  }
  __syncthreads();
  *total = scratch[warps];
  return scratch[warp] + sum - value;
}

}  // namespace tokenops::cuda
