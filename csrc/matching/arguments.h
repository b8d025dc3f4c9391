// SPDX-License-Identifier: Apache-2.0
// Arguments of the matching operators on any device: as the schemas list them, then checked.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "../tensors.h"

namespace tokenops::matching {

using OptionalTensor = std::optional<Tensor>;

// A request as the schemas list it.
struct RequestArgs {
  int64_t r;
  std::optional<double> threshold;
  OptionalTensor thresholds;  // [B]
  Text order;                 // position or tome

  auto fields() { return std::tie(r, threshold, thresholds, order); }
};

// A split as the schemas list it.
struct SplitArgs {
  int64_t num_prefix;
  OptionalTensor protected_tokens;      // bool [N] or [B, N]
  OptionalTensor src_index, dst_index;  // [K] or [B, K]
  int64_t stride, grid_width, cell_height;
  OptionalTensor cell;  // [cells] or [B, cells]

  auto fields() {
    return std::tie(num_prefix, protected_tokens, src_index, dst_index, stride, grid_width,
                    cell_height, cell);
  }
};

inline int32_t check_count(const char* op, const char* what, int64_t count) {
  STD_TORCH_CHECK(0 <= count && count <= int64_t{1} << 30, op, ": expected at most 2^30 ", what,
                  ", got ", count);
  return static_cast<int32_t>(count);
}

inline bool is_cosine(const char* op, const Text& similarity) {
  STD_TORCH_CHECK(similarity == "cosine" || similarity == "dot", op,
                  ": expected similarity cosine or dot, got ", similarity);
  return similarity == "cosine";
}

// Clamp a number to [low, high].
inline int32_t clamp(int64_t value, int64_t low, int64_t high) {
  return static_cast<int32_t>(value < low ? low : value > high ? high : value);
}

// ---- plain data ----

// A metric [B, N, D] or [B, H, N, D], any strides.
struct Metric {
  const void* data;
  ScalarType dtype;
  int32_t heads, width;
  int64_t batch, tokens;
  int64_t batch_stride, head_stride, token_stride, stride;

  Metric() = default;
  Metric(const char* op, const Tensor& t) : data(t.const_data_ptr()), dtype(t.scalar_type()) {
    const int64_t dims = t.dim();
    STD_TORCH_CHECK(dims == 3 || dims == 4, op, ": expected [B, N, D] or [B, H, N, D]");
    batch = t.size(0), batch_stride = t.stride(0);
    heads = dims == 4 ? check_count(op, "heads", t.size(1)) : 1;
    head_stride = dims == 4 ? t.stride(1) : 0;
    tokens = t.size(dims - 2), token_stride = t.stride(dims - 2);
    width = check_count(op, "channels", t.size(dims - 1)), stride = t.stride(dims - 1);
    STD_TORCH_CHECK(heads > 0, op, ": expected at least one head");
    // The CPU search keeps indices of vectors of at least 4 tokens as float32, exact up to 2^24.
    STD_TORCH_CHECK(tokens <= int64_t{1} << 26, op, ": expected at most 2^26 tokens");
  }

  // The metric of one image, whose elements are T.
  template <class T>
  Metric image(int64_t i) const {
    Metric one = *this;
    one.data = static_cast<const T*>(data) + i * batch_stride;
    return one;
  }
};

// Clamp an index to [0, count); count is at least one.
TOKENOPS_HOST_DEVICE int32_t clamp_index(int64_t index, int32_t count) {
  return static_cast<int32_t>(index < 0 ? 0 : index >= count ? count - 1 : index);
}

// A tensor [K] or [B, K] with any strides, or its row of one image. `data` may be null.
struct View {
  const void* data;
  int64_t batch_bytes;  // from one row to the next; 0 if all images share a row
  int64_t stride;
  int32_t bytes;  // of an element

  TOKENOPS_HOST_DEVICE View image(int64_t i) const {
    return {static_cast<const char*>(data) + i * batch_bytes, batch_bytes, stride, bytes};
  }
  // Element i as a flag, as an index that is clamped to [0, count), or as a number.
  TOKENOPS_HOST_DEVICE bool flag(int64_t i) const {
    return static_cast<const uint8_t*>(data)[i * stride] != 0;
  }
  TOKENOPS_HOST_DEVICE int32_t index(int64_t i, int32_t count) const {
    return clamp_index(bytes == 8 ? static_cast<const int64_t*>(data)[i * stride]
                                  : static_cast<const int32_t*>(data)[i * stride],
                       count);
  }
  TOKENOPS_HOST_DEVICE double number(int64_t i) const {
    return bytes == 8 ? static_cast<const double*>(data)[i * stride]
                      : static_cast<const float*>(data)[i * stride];
  }
};

// A view of a tensor of dtype `narrow` or `wide` whose rows have `count` elements, any if negative.
inline View make_view(const char* op, const char* name, const OptionalTensor& t, int64_t batch,
                      ScalarType narrow, ScalarType wide, int64_t count = -1) {
  if (!t) return {};
  const int64_t dims = t->dim();
  STD_TORCH_CHECK(dims == 1 || (dims == 2 && (t->size(0) == batch || t->size(0) == 1)), op,
                  ": expected ", name, " to have one row, or one per image");
  const int64_t size = t->size(dims - 1);
  STD_TORCH_CHECK(count < 0 || size == count, op, ": expected ", name, " of size ", count, ", got ",
                  size);
  check_count(op, name, size);
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(dtype == narrow || dtype == wide, op, ": expected ", name, " of dtype ", narrow,
                  " or ", wide, ", got ", dtype);
  const int32_t bytes = dtype == ScalarType::Bool ? 1 : dtype == wide ? 8 : 4;
  return {t->const_data_ptr(), dims == 2 && t->size(0) > 1 ? t->stride(0) * bytes : 0,
          t->stride(dims - 1), bytes};
}
inline View make_mask(const char* op, const char* name, const OptionalTensor& t, int64_t batch,
                      int64_t tokens) {
  return make_view(op, name, t, batch, ScalarType::Bool, ScalarType::Bool, tokens);
}
inline View make_list(const char* op, const char* name, const OptionalTensor& t, int64_t batch,
                      int64_t count = -1) {
  return make_view(op, name, t, batch, ScalarType::Int, ScalarType::Long, count);
}

// A pattern: every stride-th token is a destination, all others are sources.
struct Strided {
  uint32_t stride;

  TOKENOPS_HOST_DEVICE int32_t dst_before(uint32_t token) const {
    return static_cast<int32_t>(token / stride);
  }
  // Index of a token among the sources, -1 for destinations.
  TOKENOPS_HOST_DEVICE int32_t src_index(uint32_t token) const {
    const uint32_t before = token / stride;
    return token - before * stride == stride - 1 ? -1 : static_cast<int32_t>(token - before);
  }
  // Tokens by index. A stride of one has no sources.
  TOKENOPS_HOST_DEVICE int32_t src(uint32_t index) const {
    return static_cast<int32_t>(index + index / (stride - 1));
  }
  TOKENOPS_HOST_DEVICE int32_t dst(uint32_t index) const {
    return static_cast<int32_t>(index * stride + stride - 1);
  }
};

// A request and a split, checked: of all images or, from `image`, of one. Owns no tensors.
struct Request {
  int32_t tokens, outputs;   // N, M
  int32_t num_src, num_dst;  // of the pattern or the lists
  int32_t r, prefix;
  bool listed, has_threshold, tome_order;
  double threshold;           // if `thresholds` has no data
  View thresholds;            // [B, 1]
  Strided pattern;            // the split, unless it is listed
  View src_index, dst_index;  // the split, if it is listed
  View protected_tokens;      // besides the prefix

  TOKENOPS_HOST_DEVICE Request image(int64_t i) const {
    Request one = *this;
    one.src_index = src_index.image(i);
    one.dst_index = dst_index.image(i);
    one.protected_tokens = protected_tokens.image(i);
    one.thresholds = thresholds.image(i);
    return one;
  }
  // The i-th listed source or destination, clamped.
  TOKENOPS_HOST_DEVICE int32_t src(int i) const { return src_index.index(i, tokens); }
  TOKENOPS_HOST_DEVICE int32_t dst(int i) const { return dst_index.index(i, tokens); }
  // For tokens after the prefix.
  TOKENOPS_HOST_DEVICE bool is_protected(int32_t token) const {
    return protected_tokens.data != nullptr && protected_tokens.flag(token);
  }
  // Whether unmerged sources are ordered by falling score, and how many they are at most.
  TOKENOPS_HOST_DEVICE bool by_score() const { return tome_order && prefix == 0; }
  TOKENOPS_HOST_DEVICE int64_t max_sorted() const {
    const int64_t most = num_src < tokens ? num_src : tokens;
    if (!by_score() || has_threshold || num_dst == 0) return by_score() ? most : 0;
    return most > r ? most - r : 0;
  }
};

// `split` was checked by make_lists in split.h, which turns a grid into lists.
inline Request make_request(const char* op, int64_t batch, int64_t tokens, const RequestArgs& args,
                            const SplitArgs& split) {
  STD_TORCH_CHECK(args.order == "position" || args.order == "tome", op,
                  ": expected order position or tome, got ", args.order);
  Request ask = {};
  ask.tokens = static_cast<int32_t>(tokens);
  ask.r = clamp(args.r, 0, tokens > 0 ? tokens - 1 : 0);  // one token stays
  ask.has_threshold = args.threshold || args.thresholds;
  ask.outputs = ask.has_threshold ? ask.tokens : ask.tokens - ask.r;
  ask.prefix = clamp(split.num_prefix, 0, tokens);
  ask.tome_order = args.order == "tome" && ask.r > 0;  // r = 0 leaves all tokens in place
  ask.threshold = args.threshold.value_or(0);
  ask.thresholds = make_view(op, "thresholds", args.thresholds, batch, ScalarType::Float,
                             ScalarType::Double, batch);
  ask.thresholds.batch_bytes = ask.thresholds.stride * ask.thresholds.bytes;  // [B] to [B, 1]
  ask.protected_tokens = make_mask(op, "protected", split.protected_tokens, batch, tokens);
  ask.pattern = {static_cast<uint32_t>(clamp(split.stride, 1, tokens + 1))};
  ask.num_dst = ask.pattern.dst_before(ask.tokens);
  ask.num_src = ask.tokens - ask.num_dst;
  ask.listed = split.src_index.has_value();
  if (ask.listed) {
    ask.src_index = make_list(op, "src_index", split.src_index, batch);
    ask.dst_index = make_list(op, "dst_index", split.dst_index, batch);
    const auto count = [&](const Tensor& t) { return tokens == 0 ? 0 : t.size(t.dim() - 1); };
    ask.num_src = static_cast<int32_t>(count(*split.src_index));
    ask.num_dst = static_cast<int32_t>(count(*split.dst_index));
  }
  return ask;
}

// ---- token maps ----

// A token map of all images or of one.
struct TokenMap {
  int32_t* assign;   // [N]
  int32_t* offsets;  // [M + 1]
  int32_t* members;  // [N]
  int32_t* count;    // [1] output tokens that have members

  TOKENOPS_HOST_DEVICE TokenMap image(const Request& ask, int64_t i) const {
    return {assign + i * ask.tokens, offsets + i * (ask.outputs + int64_t{1}),
            members + i * ask.tokens, count + i};
  }
};

// The tensors of a token map, as the operators return them.
using MapTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// New tensors on the device of `like`.
inline MapTensors new_map(const Tensor& like, const Request& ask, int64_t batch) {
  return {empty({batch, ask.tokens}, ScalarType::Int, like),
          empty({batch, ask.outputs + int64_t{1}}, ScalarType::Int, like),
          empty({batch, ask.tokens}, ScalarType::Int, like), empty({batch}, ScalarType::Int, like)};
}

inline TokenMap pointers(const MapTensors& tensors) {
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  return {data(std::get<0>(tensors)), data(std::get<1>(tensors)), data(std::get<2>(tensors)),
          data(std::get<3>(tensors))};
}

}  // namespace tokenops::matching
