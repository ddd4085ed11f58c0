// Mean row norms of B·A for many LoRA pairs at once. B·A is never formed: the norm of its row i is
// the root of bᵢ(AAᵀ)bᵢᵀ, and AAᵀ is as small as the rank.
#include <algorithm>
#include <vector>

#include "lanes.h"

constexpr int TILE = 4;  // rows by rows of A that are multiplied at once: sixteen registers

template <class Number>
static V load_some(const Number* at, int64_t n) {
  if (n >= LANES) return load(at);
  Number some[LANES] = {};
  std::memcpy(some, at, n * sizeof(Number));
  return load(some);
}

static float total(V x) {
  Sum sum;
  sum.add(x);
  return (float)sum.total();
}

// AAᵀ of A [rank, width], as rows of `stride` numbers.
template <class Number>
static void gram(const Number* a, int64_t rank, int64_t width, float* out, int64_t stride) {
  for (int64_t i = 0; i < rank; i += TILE)
    for (int64_t j = i; j < rank; j += TILE) {
      const Number *left[TILE], *right[TILE];
      for (int k = 0; k < TILE; ++k) {
        left[k] = a + std::min(i + k, rank - 1) * width;
        right[k] = a + std::min(j + k, rank - 1) * width;
      }
      V product[TILE][TILE] = {};
      for (int64_t at = 0; at < width; at += LANES) {
        V x[TILE], y[TILE];
        for (int k = 0; k < TILE; ++k) x[k] = load_some(left[k] + at, width - at);
        for (int k = 0; k < TILE; ++k) y[k] = load_some(right[k] + at, width - at);
        for (int k = 0; k < TILE; ++k)
          for (int l = 0; l < TILE; ++l) product[k][l] += x[k] * y[l];
      }
      for (int64_t k = 0; k < std::min<int64_t>(TILE, rank - i); ++k)
        for (int64_t l = 0; l < std::min<int64_t>(TILE, rank - j); ++l)
          out[(i + k) * stride + j + l] = out[(j + l) * stride + i + k] = total(product[k][l]);
    }
}

// The mean over the rows b of B [height, rank] of √(b·G·bᵀ).
template <class Number>
static double mean_norm(const Number* b, int64_t height, int64_t rank, const float* g,
                        int64_t stride) {
  double norms = 0;
  std::vector<float> row(stride);
  for (int64_t i = 0; i < height; ++i, b += rank) {
    for (int64_t j = 0; j < rank; j += LANES)
      store(row.data() + j, load_some(b + j, rank - j));
    V square{};
    for (int64_t j = 0; j < rank; j += LANES) {
      V even{}, odd{};
      int64_t k = 0;
      for (; k + 1 < rank; k += 2) {
        even += row[k] * load(g + k * stride + j);
        odd += row[k + 1] * load(g + (k + 1) * stride + j);
      }
      if (k < rank) even += row[k] * load(g + k * stride + j);
      square += (even + odd) * load(row.data() + j);
    }
    norms += std::sqrt(std::max(0.0f, total(square)));
  }
  return norms / height;
}

template <class Number>
static double row_norm(const void* a, const void* b, const int64_t* shape) {
  const int64_t rank = shape[0], width = shape[1], height = shape[2];
  const int64_t stride = (rank + LANES - 1) / LANES * LANES;
  std::vector<float> g(rank * stride);
  gram((const Number*)a, rank, width, g.data(), stride);
  return mean_norm((const Number*)b, height, rank, g.data(), stride);
}

// `shapes` is [pairs, 3]: rank, width of A, height of B; `half` tells bfloat16 from float32.
extern "C" void row_norms(const void* const* a, const void* const* b, const int64_t* shapes,
                          int64_t pairs, int half, int threads, double* norms) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t i = 0; i < pairs; ++i)
    norms[i] = half ? row_norm<bfloat>(a[i], b[i], shapes + 3 * i)
                    : row_norm<float>(a[i], b[i], shapes + 3 * i);
}
