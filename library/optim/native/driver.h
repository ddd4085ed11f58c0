// Leads tensors through the phases of a chain. What comes before this file in the program is made
// from the chain itself: begin(), pass() and after(), and how many phases, sums and values it has.
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
#include <memory>
#include <vector>

constexpr int64_t CHUNK = 16;    // blocks whose sums are added first
constexpr int64_t LARGE = 2048;  // blocks: half a million elements, a core's cache
constexpr int64_t SHARE = 16;    // chunks of a large tensor that a thread takes at once
constexpr int64_t TASK = 64;     // blocks: small tensors that a thread takes at once

static int64_t blocks_of(const Call& call, int64_t i) { return (call.numel[i] + BLOCK - 1) / BLOCK; }

static void add_up(const double* partial, int64_t chunks, double* sums) {
  for (int s = 0; s < SUMS; ++s) sums[s] = 0;
  for (int64_t c = 0; c < chunks; ++c)
    for (int s = 0; s < SUMS; ++s) sums[s] += partial[c * SUMS + s];
}

static void small_tensor(const Call& call, int64_t i, float* kept) {
  double values[VALUES + 1], sums[SUMS + 1], partial[(LARGE / CHUNK) * SUMS + 1];
  const int64_t blocks = blocks_of(call, i), chunks = (blocks + CHUNK - 1) / CHUNK;
  begin(call, i, values);
  for (int phase = 0; phase < PHASES; ++phase) {
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
  for (int phase = 0; phase < PHASES; ++phase) {
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

extern "C" void advance(const Call* given) {
  const Call& call = *given;
  std::vector<int64_t> large, task_ends;
  int64_t filled = TASK, all = 0;
  // From the last to the first: the search for non-finite gradients ended at the last ones, and
  // these still lie in the processor's shared cache.
  for (int64_t i = call.tensors - 1; i >= 0; --i) {
    const int64_t blocks = blocks_of(call, i);
    all += blocks;
    if (blocks > LARGE) large.push_back(i);
    if (filled >= TASK) { task_ends.push_back(i); filled = 0; }
    task_ends.back() = i;
    filled += blocks > LARGE ? 0 : blocks;
  }
  Shared shared;
  std::atomic<int64_t> next{0};
  const int threads = std::min<int64_t>(call.threads, (all + TASK - 1) / TASK);
#pragma omp parallel num_threads(threads)
  {
    for (int64_t i : large) large_tensor(call, i, shared);
    // A thread's own, from step to step: fresh pages cost more than what is computed on them.
    static thread_local std::unique_ptr<float[]> scratch;
    if (!scratch) scratch.reset(new float[KEPT * LARGE * BLOCK + LANES]);
    float* kept = scratch.get();
    for (int64_t task; (task = next.fetch_add(1)) < (int64_t)task_ends.size();) {
      const int64_t from = task ? task_ends[task - 1] - 1 : call.tensors - 1;
      for (int64_t i = from; i >= task_ends[task]; --i)
        if (blocks_of(call, i) <= LARGE) small_tensor(call, i, kept);
    }
  }
}
