// Whether all numbers of many tensors are finite: the one look at gradients before anything moves.
#include "lanes.h"
#include <algorithm>
#include <atomic>

template <class Number>
static bool finite(const Number* x, int64_t n) {
  I worst{};
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) worst = larger(worst, as<I>(load(x + k)) & 0x7f800000);
  if (k < n) {
    Number rest[LANES] = {};
    std::memcpy(rest, x + k, (n - k) * sizeof(Number));
    worst = larger(worst, as<I>(load(rest)) & 0x7f800000);
  }
  for (int l = 0; l < LANES; ++l)
    if (worst[l] == 0x7f800000) return false;
  return true;
}

// 1 where all are; `half` tells bfloat16 from float32.
extern "C" int all_finite(const void* const* tensors, const int64_t* numel, int64_t count,
                          int half, int threads) {
  constexpr int64_t PIECE = 1 << 16;
  std::atomic<int64_t> next{0};
  std::atomic<int> fine{1};
  int64_t all = 0;
  for (int64_t i = 0; i < count; ++i) all += numel[i];
#pragma omp parallel num_threads((int)std::min<int64_t>(threads, all / PIECE + 1))
  {
    // Threads walk through all tensors alike and take every piece whose turn is theirs.
    int64_t turn = 0, mine = next.fetch_add(1), begun = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t at = 0; at < numel[i]; at += PIECE) {
        const int64_t n = std::min(PIECE, numel[i] - at);
        if (turn == mine &&
            !(half ? finite((const bfloat*)tensors[i] + at, n) : finite((const float*)tensors[i] + at, n)))
          fine = 0;
        if ((begun += n) >= PIECE) {
          begun = 0;
          if (turn++ == mine) mine = next.fetch_add(1);
        }
      }
  }
  return fine;
}
