// The mean row norm of B·A for a LoRA pair. B·A is never formed: the norm of its row i is the root
// of bᵢ(AAᵀ)bᵢᵀ, and AAᵀ is as small as the rank.
#pragma once
#include <algorithm>
#include <vector>

#include "lanes.h"

constexpr int TILE = 4;  // rows by rows of A that are multiplied at once: sixteen registers
constexpr int HALF = 8;  // rows of the Gram matrix at once

template <class Number>
static V load_some(const Number* at, int64_t n) {
  if (n >= LANES) return load(at);
  Number some[LANES] = {};
  std::memcpy(some, at, n * sizeof(Number));
  return load(some);
}

// Which lanes of two vectors, counted through, a step of the transposition takes.
struct Lanes {
  I upper[4], lower[4];
  Lanes() {
    for (int s = 0, d = 1; s < 4; ++s, d *= 2)
      for (int l = 0; l < LANES; ++l) {
        upper[s][l] = l & d ? l - d + LANES : l;
        lower[s][l] = l & d ? l + LANES : l + d;
      }
  }
};
static const Lanes lanes;

// Sixteen vectors as the rows of a matrix, turned into its columns.
static inline void transpose(V* x) {
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const I upper = lanes.upper[s], lower = lanes.lower[s];
    const int d = 1 << s;
#pragma GCC unroll 8
    for (int k = 0; k < LANES / 2; ++k) {
      const int i = (k & ~(d - 1)) * 2 + (k & (d - 1));
      const V a = x[i], b = x[i + d];
      x[i] = pick(a, b, upper);
      x[i + d] = pick(a, b, lower);
    }
  }
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
      V* rows = &product[0][0];
      transpose(rows);
      V sums{};
      for (int l = 0; l < LANES; ++l) sums += rows[l];
      for (int64_t k = 0; k < std::min<int64_t>(TILE, rank - i); ++k)
        for (int64_t l = 0; l < std::min<int64_t>(TILE, rank - j); ++l)
          out[(i + k) * stride + j + l] = out[(j + l) * stride + i + k] = sums[k * TILE + l];
    }
}

// The mean over the rows b of B [height, rank] of √(b·G·bᵀ); sixteen rows at once, one a lane.
template <class Number>
static double mean_norm(const Number* b, int64_t height, int64_t rank, const float* g,
                        int64_t stride) {
  Sum norms;
  std::vector<V> columns(stride);
  for (int64_t i = 0; i < height; i += LANES) {
    for (int64_t j = 0; j < rank; j += LANES) {
      for (int l = 0; l < LANES; ++l) {
        const Number* row = b + (i + l) * rank + j;
        columns[j + l] = i + l < height ? load_some(row, rank - j) : V{};
      }
      transpose(&columns[j]);
    }
    V square{};
    for (int64_t j = 0; j < rank; j += HALF) {
      V product[HALF] = {};  // of rows j … j + 7 of G; what lies right of these columns counts twice
      for (int64_t k = j + HALF; k < rank; ++k)
        for (int l = 0; l < HALF; ++l) product[l] += g[(j + l) * stride + k] * columns[k];
      for (int l = 0; l < HALF; ++l) product[l] *= 2.0f;
      for (int64_t k = j; k < std::min<int64_t>(j + HALF, rank); ++k)
        for (int l = 0; l < HALF; ++l) product[l] += g[(j + l) * stride + k] * columns[k];
      for (int l = 0; l < HALF; ++l) square += columns[j + l] * product[l];
    }
    norms.add(root(larger(square, V{})));
  }
  return norms.total() / height;
}

template <class Number>
static double row_norm(const Number* a, const Number* b, int64_t rank, int64_t width,
                       int64_t height) {
  const int64_t stride = (rank + LANES - 1) / LANES * LANES;
  std::vector<float> g(stride * stride);
  gram(a, rank, width, g.data(), stride);
  return mean_norm(b, height, rank, g.data(), stride);
}
