// SPDX-License-Identifier: Apache-2.0
// CPU operators tokenops::nearest and tokenops::match.

#include <tuple>
#include <vector>

#include "arguments.h"
#include "nearest.h"
#include "select.h"

namespace tokenops::matching {

#define TOKENOPS_KERNELS "matching/matching_kernels.h"
#include "../isa_kernels.h"

namespace {

// ---- driver ----

// A metric [B, N, D] or [B, H, N, D], and its tokens of one image that are listed.
template <class T>
struct Metric {
  explicit Metric(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())), batch_stride(t.stride(0)) {
    const int64_t dims = t.dim();
    tokens = t.size(dims - 2);
    rows.heads = dims == 4 ? t.size(1) : 1;
    rows.head_stride = dims == 4 ? t.stride(1) : 0;
    rows.width = t.size(dims - 1);
    rows.token_stride = t.stride(dims - 2);
    rows.stride = t.stride(dims - 1);
  }
  Tokens<T> of(int64_t image, const int32_t* list, int64_t count) const {
    Tokens<T> out = rows;
    out.data = data + image * batch_stride;
    out.list = list;
    out.count = count;
    return out;
  }

  const T* data;
  int64_t batch_stride, tokens;
  Tokens<T> rows;
};

// Bool [B, N] or [N], or nothing.
struct Mask {
  Mask() = default;
  Mask(const std::optional<Tensor>& t, const char* name, int64_t batch, int64_t tokens,
       bool shared) {
    if (!t.has_value()) return;
    const int64_t dims = t->dim();
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Bool, name, ": expected bool");
    STD_TORCH_CHECK((dims == 2 && t->size(0) == batch) || (dims == 1 && shared), name,
                    ": expected one row per image");
    STD_TORCH_CHECK(t->size(dims - 1) == tokens, name, ": expected one entry per token");
    data = static_cast<const uint8_t*>(t->const_data_ptr());
    batch_stride = dims == 2 ? t->stride(0) : 0;
    stride = t->stride(dims - 1);
  }
  const uint8_t* row(int64_t image) const {
    return data == nullptr ? nullptr : data + image * batch_stride;
  }

  const uint8_t* data = nullptr;
  int64_t batch_stride = 0, stride = 0;
};

// Everything that one image needs in memory.
template <class T>
struct Image {
  using A = acc_t<T>;

  Image(Layout& layout, int64_t n, int64_t sources, int64_t destinations, int64_t width) {
    const int64_t columns = (destinations + kBlock - 1) / kBlock * kBlock;
    search.panels = layout.take<A>(columns * width);
    search.inverse = layout.take<A>(columns);
    search.score = layout.take<A>(sources);
    search.choice = layout.take<int32_t>(sources);
    selection.role = layout.take<uint8_t>(n);
    selection.sources = layout.take<int32_t>(n);
    selection.destinations = layout.take<int32_t>(n);
    selection.group = layout.take<int32_t>(n);
    selection.number = layout.take<int32_t>(n);
    selection.candidates = layout.take<Candidate<A>>(n);
  }

  // After the lists are known: how the search divides, or that there is nothing to find.
  void plan(int64_t threads) {
    const int64_t groups = (search.tiles() * kTile + kGroup - 1) / kGroup;
    search.groups = std::min((groups + threads - 1) / threads * threads, search.tiles());
    if (search.destinations.count > 0) return;
    search.groups = 0;
    std::fill_n(search.score, search.sources.count, -infinity<A>());
    std::fill_n(search.choice, search.sources.count, -1);
  }

  Search<T> search;
  Selection<A> selection;
};

// Split [0, count) evenly among so many threads: f(thread, begin, end).
template <class F>
void split_among(int64_t threads, int64_t count, const F& f) {
  if (threads == 1) return f(0, 0, count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, count * i / threads, count * (i + 1) / threads);
  });
}

// Search all images of a job, which prepares each one (lists its tokens) and finishes it. Threads
// take whole images, cache-hot from end to end, where that is fair to all of them; else they share
// every phase of all images. The results are the same bit for bit.
template <class T, class Job>
void run(const Job& job, int64_t batch, int64_t n, int64_t sources, int64_t destinations,
         const Tokens<T>& rows) {
  const int64_t width = rows.width;
  constexpr double kSmall = 2e6;  // multiplications that are not worth another thread
  const bool small =
      double(batch) * double(sources) * double(destinations) * double(width) < kSmall;
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  const bool whole_images = batch % threads == 0 || batch >= 8 * threads;
  const int64_t held = whole_images ? threads : batch;

  Layout measure(nullptr);
  Image<T> measured(measure, n, sources, destinations, width);
  const int64_t work_bytes = work_words(width) * sizeof(acc_t<T>);
  Scratch<char> memory(held * measure.used() + threads * work_bytes);
  const auto image = [&](int64_t i) {
    Layout layout(memory.data() + i * measure.used());
    return Image<T>(layout, n, sources, destinations, width);
  };
  const auto work = [&](int64_t thread) {
    return reinterpret_cast<acc_t<T>*>(memory.data() + held * measure.used() + thread * work_bytes);
  };
  // Pairs of bfloat16 hold one head's metric exactly; a mean over heads stays float32.
  const Kernels<T> kernels = kernels_for<T>(rows.heads == 1);

  if (whole_images) {
    split_among(threads, batch, [&](int64_t thread, int64_t begin, int64_t end) {
      Image<T> im = image(thread);
      for (int64_t b = begin; b < end; ++b) {
        job.prepare(b, im);
        im.plan(1);
        kernels.pack(im.search, 0, im.search.blocks(), work(thread));
        kernels.search(im.search, 0, im.search.groups, work(thread));
        job.finish(b, im);
      }
    });
    return;
  }
  std::vector<Image<T>> images;
  for (int64_t b = 0; b < batch; ++b) images.push_back(image(b));
  split_among(threads, batch, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      job.prepare(b, images[b]);
      images[b].plan(threads);
    }
  });
  int64_t blocks = 0, groups = 0;  // of the image that has most
  for (const Image<T>& im : images) {
    blocks = std::max(blocks, im.search.blocks());
    groups = std::max(groups, im.search.groups);
  }
  split_among(threads, batch * blocks, [&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Search<T>& search = images[i / blocks].search;
      if (i % blocks < search.blocks()) {
        kernels.pack(search, i % blocks, i % blocks + 1, work(thread));
      }
    }
  });
  split_among(threads, batch * groups, [&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Search<T>& search = images[i / groups].search;
      if (i % groups < search.groups) {
        kernels.search(search, i % groups, i % groups + 1, work(thread));
      }
    }
  });
  split_among(threads, batch, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) job.finish(b, images[b]);
  });
}

// ---- nearest ----

template <class T>
struct NearestJob {
  void prepare(int64_t image, Image<T>& im) const {
    int32_t* const sources = im.selection.sources;
    int32_t* const destinations = im.selection.destinations;
    im.search.sources = a.of(image, sources, list(a.tokens, a_mask, image, sources));
    im.search.destinations = b.of(image, destinations, list(b.tokens, b_mask, image, destinations));
    im.search.cosine = cosine;
  }
  void finish(int64_t image, Image<T>& im) const {
    const Search<T>& found = im.search;
    acc_t<T>* const out_score = score + image * a.tokens;
    int32_t* const out_index = index + image * a.tokens;
    std::fill_n(out_score, a.tokens, -infinity<acc_t<T>>());
    std::fill_n(out_index, a.tokens, -1);
    for (int64_t i = 0; i < found.sources.count; ++i) {
      const int32_t row = found.sources.list[i], choice = found.choice[i];
      out_score[row] = found.score[i];
      out_index[row] = choice < 0 ? -1 : found.destinations.list[choice];
    }
  }
  // Rows that take part in an image, ascending; returns how many.
  static int64_t list(int64_t rows, const Mask& mask, int64_t image, int32_t* out) {
    const uint8_t* const takes_part = mask.row(image);
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) {
      out[count] = static_cast<int32_t>(i);
      count += takes_part == nullptr || takes_part[i * mask.stride];
    }
    return count;
  }

  Metric<T> a, b;
  Mask a_mask, b_mask;
  bool cosine;
  acc_t<T>* score;
  int32_t* index;
};

std::tuple<Tensor, Tensor> nearest(const Tensor& a, const Tensor& b,
                                   const std::optional<Tensor>& a_mask,
                                   const std::optional<Tensor>& b_mask, const Text& similarity) {
  const char* const op = "tokenops::nearest";
  check_metric(op, a);
  check_metric(op, b);
  const int64_t dims = a.dim();
  bool fits = b.dim() == dims && b.scalar_type() == a.scalar_type();
  for (int64_t d = 0; fits && d < dims; ++d) fits = d == dims - 2 || a.size(d) == b.size(d);
  STD_TORCH_CHECK(fits, op, ": a and b do not fit together");
  const int64_t batch = a.size(0), na = a.size(dims - 2), nb = b.size(dims - 2);
  const Mask sources(a_mask, op, batch, na, false), destinations(b_mask, op, batch, nb, false);
  const bool cosine = is_cosine(op, similarity);
  const Tensor score = empty({batch, na}, acc_dtype(a.scalar_type()));
  const Tensor index = empty({batch, na}, ScalarType::Int);
  if (batch * na == 0) return {score, index};
  dispatch(op, a.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const NearestJob<T> job = {Metric<T>(a),
                               Metric<T>(b),
                               sources,
                               destinations,
                               cosine,
                               static_cast<acc_t<T>*>(score.mutable_data_ptr()),
                               static_cast<int32_t*>(index.mutable_data_ptr())};
    run<T>(job, batch, std::max(na, nb), na, nb, job.a.rows);
  });
  return {score, index};
}

// ---- match ----

// Index tensor [K] or [B, K], int32 or int64.
struct IndexTensor {
  explicit IndexTensor(const Tensor& t, int64_t batch)
      : data(static_cast<const char*>(t.const_data_ptr())) {
    const int64_t dims = t.dim();
    const bool wide = t.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int,
                    "tokenops::match: expected int32 or int64 indices");
    STD_TORCH_CHECK(dims == 1 || (dims == 2 && t.size(0) == batch),
                    "tokenops::match: expected indices [K] or [B, K]");
    first.wide = wide;
    first.count = t.size(dims - 1);
    first.stride = t.stride(dims - 1);
    batch_bytes = dims == 2 ? t.stride(0) * (wide ? 8 : 4) : 0;
  }
  Indices row(int64_t image) const {
    Indices out = first;
    out.data = data + image * batch_bytes;
    return out;
  }

  const char* data;
  int64_t batch_bytes;
  Indices first;
};

// Tensor [B] of float or double, or nothing.
struct Thresholds {
  explicit Thresholds(const std::optional<Tensor>& t) {
    if (!t.has_value()) return;
    data = t->const_data_ptr();
    stride = t->stride(0);
    is_double = t->scalar_type() == ScalarType::Double;
  }
  double of(int64_t image) const {
    return is_double ? static_cast<const double*>(data)[image * stride]
                     : static_cast<const float*>(data)[image * stride];
  }

  const void* data = nullptr;
  int64_t stride = 0;
  bool is_double = false;
};

template <class T>
struct MatchJob {
  void prepare(int64_t image, Image<T>& im) const {
    Selection<acc_t<T>>& s = im.selection;
    take_part(request(image), s);
    im.search.sources = metric.of(image, s.sources, s.eligible + s.last_resorts);
    im.search.destinations = metric.of(image, s.destinations, s.num_destinations);
    im.search.cosine = cosine;
  }
  void finish(int64_t image, Image<T>& im) const {
    const Request ask = request(image);
    select_best(ask, im.search.score, im.search.choice, im.selection);
    write_map(ask, im.selection, assign + image * ask.tokens, offsets + image * (ask.outputs + 1),
              members + image * ask.tokens, counts + image);
  }
  Request request(int64_t image) const {
    Request ask = shared;
    ask.is_protected = protected_tokens.row(image);
    ask.protected_stride = protected_tokens.stride;
    if (ask.listed) {
      ask.sources = sources->row(image);
      ask.destinations = destinations->row(image);
    }
    if (cell.has_value()) ask.cell = cell->row(image);
    if (thresholds.data != nullptr) ask.threshold = thresholds.of(image);
    return ask;
  }

  Metric<T> metric;
  bool cosine;
  Request shared;
  Mask protected_tokens;
  std::optional<IndexTensor> sources, destinations, cell;
  Thresholds thresholds;
  int32_t *assign, *offsets, *members, *counts;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> match(
    const Tensor& metric, const Text& similarity, int64_t r, const std::optional<double>& threshold,
    const std::optional<Tensor>& thresholds, const Text& order, int64_t num_prefix,
    const std::optional<Tensor>& protected_tokens, const std::optional<Tensor>& source_index,
    const std::optional<Tensor>& destination_index, int64_t stride, int64_t grid_width,
    int64_t cell_height, const std::optional<Tensor>& cell) {
  const char* const op = "tokenops::match";
  check_metric(op, metric);
  const int64_t batch = metric.size(0), n = metric.size(metric.dim() - 2);
  STD_TORCH_CHECK(order == "position" || order == "tome", op,
                  ": expected order position or tome, got ", order);
  check_split(op, source_index, destination_index, stride, grid_width, cell_height);
  check_thresholds(op, thresholds, batch);
  Request ask = {};
  ask.tokens = n;
  ask.r = mergeable(n, r);
  ask.has_threshold = threshold.has_value() || thresholds.has_value();
  ask.outputs = ask.has_threshold ? n : n - ask.r;
  ask.prefix = std::min(std::max<int64_t>(num_prefix, 0), n);
  ask.threshold = threshold.value_or(0);
  ask.tome_order = order == "tome";
  ask.listed = source_index.has_value();
  ask.stride = stride;
  const Mask taboo(protected_tokens, op, batch, n, true);
  const bool cosine = is_cosine(op, similarity);
  std::optional<IndexTensor> sources, destinations, places;
  int64_t max_sources = n - n / stride, max_destinations = n / stride;
  if (ask.listed) {
    sources.emplace(*source_index, batch);
    destinations.emplace(*destination_index, batch);
    max_sources = std::min(n, sources->first.count);
    max_destinations = std::min(n, destinations->first.count);
  } else if (grid_width > 0) {
    ask.grid = Grid(op, n - ask.prefix, grid_width, cell_height, stride, cell);
    if (cell.has_value()) places.emplace(*cell, batch);
    max_destinations = ask.grid.cells();
    max_sources = n - ask.prefix - max_destinations;
  }

  const Tensor outputs[] = {empty({batch, n}, ScalarType::Int),
                            empty({batch, ask.outputs + 1}, ScalarType::Int),
                            empty({batch, n}, ScalarType::Int), empty({batch}, ScalarType::Int)};
  int32_t* data[4];
  for (int i = 0; i < 4; ++i) data[i] = static_cast<int32_t*>(outputs[i].mutable_data_ptr());
  if (ask.r == 0) {
    for (int64_t b = 0; b < batch; ++b) {
      write_identity(n, data[0] + b * n, data[1] + b * (n + 1), data[2] + b * n, data[3] + b);
    }
  } else if (batch > 0) {
    dispatch(op, metric.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const MatchJob<T> job = {Metric<T>(metric), cosine,       ask,     taboo,
                               sources,           destinations, places,  Thresholds(thresholds),
                               data[0],           data[1],      data[2], data[3]};
      run<T>(job, batch, n, max_sources, max_destinations, job.metric.rows);
    });
  }
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace
}  // namespace tokenops::matching

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("nearest", TORCH_BOX(&tokenops::matching::nearest));
  m.impl("match", TORCH_BOX(&tokenops::matching::match));
}
