// Leads tensors through the phases of a chain. What comes before this file in the program is made
// from the chain itself: look(), begin(), pass() and after(); how many PHASES, SUMS, LOOKS (sums of the
// look) and VALUES it has and how many numbers of an element are KEPT; the type of a parameter's
// Number and the row of the pairs' NORM; how many SLOTS there are for what is known of lines, the
// table of sums over lines, and know(), which computes what is known of lines before a phase.
//
// A phase runs over a tensor's blocks, sums what a later phase needs, and writes what no later one
// makes use of.
// A small tensor goes through all phases in one thread while it lies in that core's cache; a large
// one is cut into chunks that all threads share. Sums are added chunk by chunk in their order, so
// that neither the number of threads nor the neighbours of a tensor change a bit of the result.
//
// Threads are OpenMP's, and so PyTorch's: threads of one's own would fight for the processor with
// those, which still wait for work in a loop when an optimizer's step begins.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "products.h"

constexpr int64_t CHUNK = 16;    // blocks whose sums are added first
constexpr int64_t LARGE = 2048;  // blocks: half a million elements, a core's cache
constexpr int64_t SHARE = 16;    // chunks of a large tensor that a thread takes at once, at least
constexpr int64_t BANDS = 64;    // into how many parts a large tensor is divided, at most
constexpr int64_t TASK = 64;     // blocks: small tensors that a thread takes at once
constexpr int64_t PIECE = 256;   // blocks of gradients that a thread looks at at once

static int64_t blocks_of(const Call& call, int64_t i) { return (call.numel[i] + BLOCK - 1) / BLOCK; }

// Not more threads than there is work for.
static int threads_for(const Call& call) {
  int64_t all = 0;
  for (int64_t i = 0; i < call.tensors; ++i) all += blocks_of(call, i);
  return std::min<int64_t>(call.threads, (all + TASK - 1) / TASK);
}

// The arrays of what is known of a tensor's lines.
struct LineValues {
  Lines lines{};
  std::vector<float> values;
  std::vector<float*> to;
  void begin(const Call& call, int64_t i) {
    if (!SLOTS) return;
    lines = lines_of(call, i);
    const size_t size = SLOTS * lines.stride + LANES;
    if (values.size() < size) values.resize(size);
    to.resize(LINE_SUMS);
    lines.values = values.data();
    for (int s = 0; s < LINE_SUMS; ++s) to[s] = lines.at(s);
    lines.to = to.data();
  }
  void clear(int phase) {
    for (int s = 0; s < LINE_SUMS; ++s)
      if (LINE_SUM[s].phase == phase) std::fill_n(lines.at(s), lines.stride, 0.0f);
  }
  void finish(int phase) {
    for (int s = 0; s < LINE_SUMS; ++s) {
      if (LINE_SUM[s].phase != phase || !LINE_SUM[s].mean) continue;
      const Axis& axis = lines.axes[LINE_SUM[s].axis];
      const float share = 1.0f / axis.size.of;
      for (int64_t k = 0; k < axis.count; ++k) lines.at(s)[k] *= share;
    }
  }
};

static void add_up(const double* partial, int64_t chunks, double* sums) {
  for (int s = 0; s < SUMS; ++s) sums[s] = 0;
  for (int64_t c = 0; c < chunks; ++c)
    for (int s = 0; s < SUMS; ++s) sums[s] += partial[c * SUMS + s];
}

static void small_tensor(const Call& call, int64_t i, float* kept) {
  double values[VALUES + 1], sums[SUMS + 1], partial[(LARGE / CHUNK) * SUMS + 1];
  const int64_t blocks = blocks_of(call, i), chunks = (blocks + CHUNK - 1) / CHUNK;
  static thread_local LineValues known;
  known.begin(call, i);
  begin(call, i, values);
  know(1, call, i, values, known.lines);
  for (int phase = 1; phase <= PHASES; ++phase) {
    known.clear(phase);
    for (int64_t c = 0; c < chunks; ++c)
      pass(phase, call, i, c * CHUNK, std::min(blocks, (c + 1) * CHUNK), values,
           partial + c * SUMS, kept, LARGE * BLOCK, known.lines);
    add_up(partial, chunks, sums);
    after(phase, call, i, values, sums);
    known.finish(phase);
    know(phase + 1, call, i, values, known.lines);
  }
}

// A part of a large tensor that one thread works on, with sums over the lines that it has of its own.
struct Band {
  int64_t first, last;  // chunks
  std::vector<float> sums[LINE_SUMS + 1];
  int64_t begins[LINE_SUMS + 1];  // the first line of each
  float* to[LINE_SUMS + 1];

  void clear(const Call& call, int64_t i, const Lines& lines, int phase) {
    const int64_t from = first * CHUNK * BLOCK, end = std::min(last * CHUNK * BLOCK, call.numel[i]);
    for (int s = 0; s < LINE_SUMS; ++s) {
      if (LINE_SUM[s].phase != phase) continue;
      const Axis& axis = lines.axes[LINE_SUM[s].axis];
      const int64_t matrix = axis.matrix.of, inner = axis.inner.of;
      begins[s] = from / matrix * inner;
      sums[s].assign(((end - 1) / matrix + 1) * inner - begins[s], 0.0f);
      to[s] = sums[s].data() - begins[s];
    }
  }
  void add_to_tensor(const Lines& lines, int phase) {
    for (int s = 0; s < LINE_SUMS; ++s)
      if (LINE_SUM[s].phase == phase) add_to(lines.at(s) + begins[s], sums[s].data(), sums[s].size());
  }
};

// What threads share of a large tensor.
struct Shared {
  double values[VALUES + 1], sums[SUMS + 1];
  std::vector<double> partial;
  std::vector<float> kept;
  LineValues known;
  std::vector<Band> bands;
  std::atomic<int64_t> next{0};

  // Where there are sums over lines, at most so many bands that their sums stay small beside the tensor.
  void divide(int64_t blocks, int64_t chunks) {
    int64_t share = SHARE;
    if (LINE_SUMS) {
      const int64_t most = std::clamp<int64_t>(blocks * BLOCK / known.lines.stride / 8, 1, BANDS);
      share = std::max(share, (chunks + most - 1) / most);
    }
    bands.resize((chunks + share - 1) / share);
    for (size_t k = 0; k < bands.size(); ++k) {
      bands[k].first = k * share;
      bands[k].last = std::min<int64_t>(chunks, (k + 1) * share);
    }
  }
};

// Called by all threads of a team.
static void large_tensor(const Call& call, int64_t i, Shared& shared) {
  const int64_t blocks = blocks_of(call, i), chunks = (blocks + CHUNK - 1) / CHUNK;
  LineValues& known = shared.known;
#pragma omp master
  {
    known.begin(call, i);
    begin(call, i, shared.values);
    know(1, call, i, shared.values, known.lines);
    shared.partial.resize(chunks * SUMS + 1);
    shared.kept.resize(KEPT * blocks * BLOCK);
    shared.divide(blocks, chunks);
  }
  for (int phase = 1; phase <= PHASES; ++phase) {
#pragma omp master
    {
      shared.next = 0;
      known.clear(phase);
    }
#pragma omp barrier
    for (int64_t k; (k = shared.next.fetch_add(1)) < (int64_t)shared.bands.size();) {
      Band& band = shared.bands[k];
      band.clear(call, i, known.lines, phase);
      Lines lines = known.lines;
      lines.to = band.to;
      for (int64_t c = band.first; c < band.last; ++c)
        pass(phase, call, i, c * CHUNK, std::min(blocks, (c + 1) * CHUNK), shared.values,
             shared.partial.data() + c * SUMS, shared.kept.data(), blocks * BLOCK, lines);
    }
#pragma omp barrier
#pragma omp master
    {
      for (Band& band : shared.bands) band.add_to_tensor(known.lines, phase);
      add_up(shared.partial.data(), chunks, shared.sums);
      after(phase, call, i, shared.values, shared.sums);
      known.finish(phase);
      know(phase + 1, call, i, shared.values, known.lines);
    }
  }
}

// Looks at all gradients: 1 where they are finite. The sums go to `looked`.
extern "C" int look_at_all(const Call* given) {
  const Call& call = *given;
  struct Piece { int64_t tensor, first, last; };
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < call.tensors; ++i)
    for (int64_t b = 0, blocks = blocks_of(call, i); b < blocks; b += PIECE)
      pieces.push_back({i, b, std::min(blocks, b + PIECE)});
  const int64_t count = pieces.size();
  std::vector<double> partial(count * LOOKS + 1);
  int fine = 1;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads_for(call)) reduction(& : fine)
  for (int64_t k = 0; k < count; ++k)
    fine &= look(call, pieces[k].tensor, pieces[k].first, pieces[k].last, &partial[k * LOOKS]);
  std::fill_n(call.looked, LOOKS * call.tensors, 0.0);
  for (int64_t k = 0; k < count; ++k)
    for (int s = 0; s < LOOKS; ++s)
      call.looked[s * call.tensors + pieces[k].tensor] += partial[k * LOOKS + s];
  return fine;
}

// The mean row norm of B·A of the pair whose first half is at this place of the order.
static void norm_of_pair(const Call& call, int64_t place) {
  const int64_t first = call.order[place], second = call.order[place + 1];
  const int64_t rank = std::abs(call.ranks[place]);
  const int64_t a = call.ranks[place] > 0 ? first : second, b = a == first ? second : first;
  double* norms = call.given + NORM * call.tensors;
  norms[a] = norms[b] = row_norm((const Number*)call.held[a], (const Number*)call.held[b], rank,
                                 call.numel[a] / rank, call.numel[b] / rank);
}

extern "C" void advance_all(const Call* given) {
  const Call& call = *given;
  const auto is_large = [&](int64_t place) { return blocks_of(call, call.order[place]) > LARGE; };
  const auto is_paired = [&](int64_t place) { return place > 0 && call.ranks[place - 1]; };
  std::vector<int64_t> large, pairs, tasks;  // places in the order; a task ends where one begins
  int64_t filled = TASK;
  for (int64_t k = 0; k < call.tensors; ++k) {
    if (is_large(k)) large.push_back(k);
    if (call.ranks[k] && (is_large(k) || is_large(k + 1))) pairs.push_back(k);
    if (filled >= TASK && !is_paired(k)) {
      tasks.push_back(k);
      filled = 0;
    }
    filled += is_large(k) ? 0 : blocks_of(call, call.order[k]);
  }
  const int64_t count = tasks.size();
  tasks.push_back(call.tensors);
  Shared shared;
#pragma omp parallel num_threads(threads_for(call))
  {
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < (int64_t)pairs.size(); ++k) norm_of_pair(call, pairs[k]);
    for (int64_t k : large) large_tensor(call, call.order[k], shared);
    // A thread's own, from step to step: fresh pages cost more than what is computed on them.
    static thread_local std::unique_ptr<float[]> scratch;
    if (!scratch) scratch.reset(new float[KEPT * LARGE * BLOCK + LANES]);
    float* kept = scratch.get();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < count; ++task)
      for (int64_t k = tasks[task]; k < tasks[task + 1]; ++k) {
        if (call.ranks[k] && !is_large(k) && !is_large(k + 1)) norm_of_pair(call, k);
        if (!is_large(k)) small_tensor(call, call.order[k], kept);
      }
  }
}
