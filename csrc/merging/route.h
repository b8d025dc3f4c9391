// SPDX-License-Identifier: Apache-2.0
// Where tokens go, through one map or two.
#pragma once

#include "arguments.h"

namespace tokenops {

struct Route {
  const int32_t* assign;   // [B, N], or [B, middle] behind an earlier map
  const int32_t* earlier;  // [B, N] into `middle` tokens, or null
  int64_t inputs, middle, outputs;

  // Output token of input n of image b, -1 for none.
  TOKENOPS_HOST_DEVICE int32_t operator()(int64_t b, int64_t n) const {
    int64_t through = n;
    if (earlier != nullptr) {
      through = earlier[b * inputs + n];
      if (through < 0 || through >= middle) return -1;
    }
    const int32_t m = assign[b * middle + through];
    return m >= 0 && m < outputs ? m : -1;
  }
};

inline void check_count(const char* op, int64_t inputs, int64_t outputs) {
  STD_TORCH_CHECK(0 <= outputs && outputs < INT32_MAX && inputs < INT32_MAX, op,
                  ": expected fewer than 2^31 - 1 tokens, got ", inputs, " to ", outputs);
}

// The arguments of `invert`.
struct Inversion {
  int64_t batch;
  Matrix assign;
  Route route;

  Inversion(const char* op, const Tensor& given, int64_t outputs)
      : batch(given.size(0)),
        assign(op, "assign", given, batch, given.size(1), ScalarType::Int),
        route{MapTensors::pointer(assign), nullptr, given.size(1), given.size(1), outputs} {
    check_count(op, route.inputs, outputs);
  }
};

// The arguments of `compose`.
struct Composition {
  int64_t batch;
  Matrix assign, earlier;
  Route route;

  Composition(const char* op, const Tensor& later, const Tensor& before, int64_t outputs)
      : batch(before.size(0)),
        assign(op, "assign", later, batch, later.size(1), ScalarType::Int),
        earlier(op, "earlier", before, batch, before.size(1), ScalarType::Int),
        route{MapTensors::pointer(assign), MapTensors::pointer(earlier), before.size(1),
              later.size(1), outputs} {
    check_count(op, route.inputs, outputs);
  }
};

}  // namespace tokenops
