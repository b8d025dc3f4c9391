// SPDX-License-Identifier: Apache-2.0
// CPU operators tokenops::nearest and tokenops::match.

#include <vector>

#include "search.h"
#include "select_cpu.h"
#include "split.h"

namespace tokenops::matching {

#define TOKENOPS_KERNELS "matching/matching_kernels.h"
#include "../isa_kernels.h"

namespace {

// ---- driver ----

// The memory of one image.
template <class T>
struct Image {
  using A = acc_t<T>;

  Image(Arena& arena, int64_t n, int64_t num_src, int64_t num_dst, int64_t width)
      : selection(arena, n) {
    const int64_t columns = (num_dst + kBlock - 1) / kBlock * kBlock;
    search.panels = arena.take<A>(columns * width);
    search.inverse = arena.take<A>(columns);
    search.node_max = arena.take<A>(num_src);
    search.node_idx = arena.take<int32_t>(num_src);
  }

  // Divide the listed sources into groups: a multiple of the threads, if there are enough tiles.
  void plan(int64_t threads) {
    const int64_t groups = (search.tiles() * kTile + kGroup - 1) / kGroup;
    search.groups = std::min((groups + threads - 1) / threads * threads, search.tiles());
    if (search.dst.count > 0) return;
    search.groups = 0;
    std::fill_n(search.node_max, search.src.count, -infinity<A>());
    std::fill_n(search.node_idx, search.src.count, -1);
  }

  Selection<A> selection;
  Search<T> search;
};

// Split [0, count) evenly among threads: f(thread, begin, end).
template <class F>
void split_among(int64_t threads, int64_t count, const F& f) {
  if (threads == 1) return f(0, 0, count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, count * i / threads, count * (i + 1) / threads);
  });
}

// Search all images: prepare(b, image) lists the tokens of image b, finish(b, image) writes its
// results. If images divide well among the threads, a thread does all phases of an image, whose
// data stay in its cache; else the threads share each phase of all images. Both ways give the same
// bits.
template <class T, class Prepare, class Finish>
void run(const Metric& x, int64_t n, int64_t num_src, int64_t num_dst, const Prepare& prepare,
         const Finish& finish) {
  const int64_t batch = x.batch, width = x.width;
  constexpr double kSmall = 2e6;  // fewer multiplications do not pay for a second thread
  const bool small = double(batch) * double(num_src) * double(num_dst) * double(width) < kSmall;
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  const bool whole_images = batch % threads == 0 || batch >= 8 * threads;
  const int64_t held = whole_images ? threads : batch;  // images in memory at a time

  Arena measure(nullptr);
  const Image<T> measured(measure, n, num_src, num_dst, width);  // counts its bytes
  const int64_t work_bytes = kGroup * row_words(width) * sizeof(acc_t<T>);
  Scratch<char> memory(held * measure.used() + threads * work_bytes);
  const auto image = [&](int64_t i) {
    Arena arena(memory.data() + i * measure.used());
    return Image<T>(arena, n, num_src, num_dst, width);
  };
  const auto work = [&](int64_t thread) {
    return reinterpret_cast<acc_t<T>*>(memory.data() + held * measure.used() + thread * work_bytes);
  };
  // Pairs of bfloat16 hold one head's metric exactly; a mean over heads stays float32.
  const Kernels<T> kernels = kernels_for<T>(x.heads == 1);

  if (whole_images) {
    split_among(threads, batch, [&](int64_t thread, int64_t begin, int64_t end) {
      Image<T> im = image(thread);
      for (int64_t b = begin; b < end; ++b) {
        prepare(b, im);
        im.plan(1);
        kernels.pack(im.search, 0, im.search.blocks(), work(thread));
        kernels.search(im.search, 0, im.search.groups, work(thread));
        finish(b, im);
      }
    });
    return;
  }
  std::vector<Image<T>> images;
  for (int64_t b = 0; b < batch; ++b) images.push_back(image(b));
  // f(thread, image, i) for each i < count of all images
  const auto phase = [&](int64_t count, const auto& f) {
    split_among(threads, batch * count, [&](int64_t thread, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(thread, i / count, i % count);
    });
  };
  phase(1, [&](int64_t, int64_t b, int64_t) {
    prepare(b, images[b]);
    images[b].plan(threads);
  });
  int64_t blocks = 0, groups = 0;  // the largest numbers of any image
  for (const Image<T>& im : images) {
    blocks = std::max(blocks, im.search.blocks());
    groups = std::max(groups, im.search.groups);
  }
  phase(blocks, [&](int64_t thread, int64_t b, int64_t i) {
    const Search<T>& search = images[b].search;
    if (i < search.blocks()) kernels.pack(search, i, i + 1, work(thread));
  });
  phase(groups, [&](int64_t thread, int64_t b, int64_t i) {
    const Search<T>& search = images[b].search;
    if (i < search.groups) kernels.search(search, i, i + 1, work(thread));
  });
  phase(1, [&](int64_t, int64_t b, int64_t) { finish(b, images[b]); });
}

// ---- nearest ----

// List the rows of an image that take part.
template <class T>
Tokens list_rows(const Metric& x, int64_t image, const View& takes_part, int32_t* list) {
  const View mask = takes_part.image(image);
  const int count = enumerate(
      Serial{}, x.tokens, [&](int i) { return mask.data == nullptr || mask.flag(i); },
      [&](int i, int n) { list[n] = i; });
  return {x.image<T>(image), list, count};
}

std::tuple<Tensor, Tensor> nearest(const Tensor& a, const Tensor& b, const OptionalTensor& a_mask,
                                   const OptionalTensor& b_mask, const Text& similarity) {
  const char* const op = "tokenops::nearest";
  const Metric x(op, a), y(op, b);
  STD_TORCH_CHECK(a.dim() == b.dim() && x.dtype == y.dtype && x.batch == y.batch &&
                      x.heads == y.heads && x.width == y.width,
                  op, ": a and b do not fit together");
  const View src = make_mask(op, "a_mask", a_mask, x.batch, x.tokens);
  const View dst = make_mask(op, "b_mask", b_mask, x.batch, y.tokens);
  const bool cosine = is_cosine(op, similarity);
  const Tensor score = empty({x.batch, x.tokens}, acc_dtype(x.dtype));
  const Tensor index = empty({x.batch, x.tokens}, ScalarType::Int);
  if (x.batch * x.tokens == 0) return {score, index};
  dispatch(op, x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    acc_t<T>* const scores = static_cast<acc_t<T>*>(score.mutable_data_ptr());
    int32_t* const indices = static_cast<int32_t*>(index.mutable_data_ptr());
    const auto prepare = [&](int64_t image, Image<T>& im) {
      im.search.src = list_rows<T>(x, image, src, im.selection.src);
      im.search.dst = list_rows<T>(y, image, dst, im.selection.dst);
      im.search.cosine = cosine;
    };
    const auto finish = [&](int64_t image, const Image<T>& im) {
      const Search<T>& found = im.search;
      std::fill_n(scores + image * x.tokens, x.tokens, -infinity<acc_t<T>>());
      std::fill_n(indices + image * x.tokens, x.tokens, -1);
      for (int64_t i = 0; i < found.src.count; ++i) {
        const int64_t row = image * x.tokens + found.src.list[i], best = found.node_idx[i];
        scores[row] = found.node_max[i];
        indices[row] = best < 0 ? -1 : found.dst.list[best];
      }
    };
    run<T>(x, std::max(x.tokens, y.tokens), x.tokens, y.tokens, prepare, finish);
  });
  return {score, index};
}

// ---- match ----

void list_grid(const Grid& grid, int64_t images) {
  const int64_t bands = grid.bands();
  parallel_for(images * bands, 16 * grid.tokens / bands, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      grid.list(Serial{}, i / bands, static_cast<int32_t>(i % bands));
    }
  });
}

MapTensors match(const Tensor& metric, const Text& similarity, const RequestArgs& args,
                 SplitArgs split) {
  const char* const op = "tokenops::match";
  const Metric x(op, metric);
  const bool cosine = is_cosine(op, similarity);
  make_lists(op, metric, x.batch, x.tokens, split, list_grid);
  const Request ask = make_request(op, x.batch, x.tokens, args, split);
  const MapTensors maps = new_map(metric, ask, x.batch);
  const TokenMap out = pointers(maps);
  if (ask.r == 0) {
    for (int64_t b = 0; b < x.batch; ++b) write_identity(ask.tokens, out.image(ask, b));
  } else if (x.batch > 0) {
    dispatch(op, x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const auto prepare = [&](int64_t image, Image<T>& im) {
        Selection<acc_t<T>>& s = im.selection;
        list_tokens(ask.image(image), s);
        im.search.src = {x.image<T>(image), s.src, s.num_src};
        im.search.dst = {x.image<T>(image), s.dst, s.num_dst};
        im.search.cosine = cosine;
      };
      const auto finish = [&](int64_t image, const Image<T>& im) {
        select_image(ask.image(image), im.search.node_max, im.search.node_idx, im.selection,
                     out.image(ask, image));
      };
      run<T>(x, ask.tokens, std::min(ask.tokens, ask.num_src), std::min(ask.tokens, ask.num_dst),
             prepare, finish);
    });
  }
  return maps;
}

}  // namespace
}  // namespace tokenops::matching

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("nearest", TORCH_BOX(&tokenops::matching::nearest));
  m.impl("match", TOKENOPS_BOX(&tokenops::matching::match));
}
