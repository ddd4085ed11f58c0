// Leads tensors through the phases of a chain. What comes before this file in the program is made
// from the chain itself: look(), begin(), pass() and after(); how many PHASES, SUMS, LOOKS (sums of the
// look) and VALUES it has and how many numbers of an element are KEPT; the type of a parameter's
// Number and the row of the pairs' NORM.
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
constexpr int64_t SHARE = 16;    // chunks of a large tensor that a thread takes at once
constexpr int64_t TASK = 64;     // blocks: small tensors that a thread takes at once
constexpr int64_t PIECE = 256;   // blocks of gradients that a thread looks at at once

static int64_t blocks_of(const Call& call, int64_t i) { return (call.numel[i] + BLOCK - 1) / BLOCK; }

// Not more threads than there is work for.
static int threads_for(const Call& call) {
  int64_t all = 0;
  for (int64_t i = 0; i < call.tensors; ++i) all += blocks_of(call, i);
  return std::min<int64_t>(call.threads, (all + TASK - 1) / TASK);
}

static void add_up(const double* partial, int64_t chunks, double* sums) {
  for (int s = 0; s < SUMS; ++s) sums[s] = 0;
  for (int64_t c = 0; c < chunks; ++c)
    for (int s = 0; s < SUMS; ++s) sums[s] += partial[c * SUMS + s];
}

static void small_tensor(const Call& call, int64_t i, float* kept) {
  double values[VALUES + 1], sums[SUMS + 1], partial[(LARGE / CHUNK) * SUMS + 1];
  const int64_t blocks = blocks_of(call, i), chunks = (blocks + CHUNK - 1) / CHUNK;
  begin(call, i, values);
  for (int phase = 1; phase <= PHASES; ++phase) {
    for (int64_t c = 0; c < chunks; ++c)
      pass(phase, call, i, c * CHUNK, std::min(blocks, (c + 1) * CHUNK), values,
           partial + c * SUMS, kept, LARGE * BLOCK);
    add_up(partial, chunks, sums);
    after(phase, call, i, values, sums);
  }
}

// What threads share of a large tensor.
struct Shared {
  double values[VALUES + 1], sums[SUMS + 1];
  std::vector<double> partial;
  std::vector<float> kept;
  std::atomic<int64_t> next{0};
};

// Called by all threads of a team.
static void large_tensor(const Call& call, int64_t i, Shared& shared) {
  const int64_t blocks = blocks_of(call, i), chunks = (blocks + CHUNK - 1) / CHUNK;
#pragma omp master
  {
    begin(call, i, shared.values);
    shared.partial.resize(chunks * SUMS + 1);
    shared.kept.resize(KEPT * blocks * BLOCK);
  }
  for (int phase = 1; phase <= PHASES; ++phase) {
#pragma omp master
    shared.next = 0;
#pragma omp barrier
    for (int64_t c; (c = shared.next.fetch_add(SHARE)) < chunks;)
      for (const int64_t end = std::min(chunks, c + SHARE); c < end; ++c)
        pass(phase, call, i, c * CHUNK, std::min(blocks, (c + 1) * CHUNK), shared.values,
             shared.partial.data() + c * SUMS, shared.kept.data(), blocks * BLOCK);
#pragma omp barrier
#pragma omp master
    {
      add_up(shared.partial.data(), chunks, shared.sums);
      after(phase, call, i, shared.values, shared.sums);
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
