// Lines of a tensor (lines.py): sums over them, and their numbers spread over elements, block by
// block. A tensor is [outer, size, inner], its lines lie along the middle. Where inner is 1 a line is a
// run of neighbours; else it is a column, whose elements lie `inner` apart.
#pragma once
#include <algorithm>

#include "call.h"

struct Axis {
  int64_t size, inner, count;
};

// What is known of a tensor's lines in the middle of its step.
struct Lines {
  Axis axes[3];      // row, column, filter
  float* values;     // [slots, stride]
  int64_t stride;    // lines of the longest axis, whole blocks
  float* const* to;  // [sums over lines], where the pass adds to: line 0
  float* at(int64_t slot) const { return values + slot * stride; }
};

static inline Lines lines_of(const Call& call, int64_t i) {
  const int64_t* sizes = call.lines + i;
  const int64_t numel = call.numel[i], n = call.tensors;
  const int64_t row = sizes[0], column = sizes[n], filter = sizes[2 * n];
  Lines lines{};
  lines.axes[0] = {row, 1, numel / row};
  lines.axes[1] = {column, row, numel / column};
  lines.axes[2] = {filter, 1, numel / filter};
  lines.stride = (sizes[3 * n] + BLOCK - 1) / BLOCK * BLOCK;
  return lines;
}

// The line that element k belongs to.
static inline int64_t line_of(const Axis& axis, int64_t k) {
  return k / (axis.size * axis.inner) * axis.inner + k % axis.inner;
}

static inline float sum_of(const float* x, int64_t n) {
  float sum = 0;
  if (n >= LANES) {
    V lanes{};
    for (; n >= LANES; n -= LANES, x += LANES) lanes += load(x);
    sum = total(lanes);
  }
  for (int64_t k = 0; k < n; ++k) sum += x[k];
  return sum;
}

static inline void add_to(float* to, const float* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k] += x[k];
}

// Runs of a size that LANES is a multiple of, from the beginning of one on.
template <int SIZE>
static inline void add_short_runs(const float* x, int64_t n, float* to) {
  for (int64_t line = 0; line < n / SIZE; ++line) {
    float sum = 0;
    for (int k = 0; k < SIZE; ++k) sum += x[line * SIZE + k];
    to[line] += sum;
  }
}

static inline void add_runs(int64_t size, int64_t at, int64_t n, const float* x, float* to) {
  int64_t line = at / size, left = size - at % size;
  to += line;
  if (size == 8) return add_short_runs<8>(x, n, to);
  if (size == 4) return add_short_runs<4>(x, n, to);
  if (size == 2) return add_short_runs<2>(x, n, to);
  for (int64_t k = 0; k < n; k += left, left = size, ++to) {
    left = std::min(left, n - k);
    *to += sum_of(x + k, left);
  }
}

// Numbers of one block first: added one by one to a long column's sum they would lose their digits.
static inline void add_columns(const Axis& axis, int64_t at, int64_t n, const float* x, float* to) {
  const int64_t matrix = axis.size * axis.inner;
  float own[BLOCK / 2];
  for (int64_t k = 0; k < n;) {
    const int64_t here = (at + k) % matrix, many = std::min(matrix - here, n - k);
    float* sums = to + (at + k) / matrix * axis.inner;
    const bool apart = axis.inner <= BLOCK / 2 && many > axis.inner;
    if (apart) std::fill_n(own, axis.inner, 0.0f);
    int64_t column = here % axis.inner;
    for (int64_t j = 0; j < many;) {
      const int64_t m = std::min(axis.inner - column, many - j);
      add_to((apart ? own : sums) + column, x + k + j, m);
      j += m;
      column = 0;
    }
    if (apart) add_to(sums, own, axis.inner);
    k += many;
  }
}

// Adds n elements of a block, the first of which is element `at`, to the sums of their lines.
static inline void add_lines(const Axis& axis, int64_t at, int64_t n, const float* x, float* to) {
  if (axis.inner == 1) return add_runs(axis.size, at, n, x, to);
  add_columns(axis, at, n, x, to);
}

template <int SIZE>
static inline void spread_short_runs(const float* from, int64_t n, float* x) {
  for (int64_t line = 0; line * SIZE < n; ++line)
    for (int k = 0; k < SIZE; ++k) x[line * SIZE + k] = from[line];
}

static inline void spread_runs(int64_t size, int64_t at, int64_t n, const float* from, float* x) {
  int64_t left = size - at % size;
  from += at / size;
  if (size == LANES) return spread_short_runs<LANES>(from, n, x);
  if (size == 8) return spread_short_runs<8>(from, n, x);
  if (size == 4) return spread_short_runs<4>(from, n, x);
  if (size == 2) return spread_short_runs<2>(from, n, x);
  for (int64_t k = 0; k < n; k += left, left = size, ++from) {
    left = std::min(left, n - k);
    std::fill_n(x + k, left, *from);
  }
}

static inline void spread_columns(const Axis& axis, int64_t at, int64_t n, const float* from, float* x) {
  const int64_t matrix = axis.size * axis.inner;
  for (int64_t k = 0; k < n;) {
    const int64_t here = (at + k) % matrix, column = here % axis.inner;
    const int64_t m = std::min(axis.inner - column, n - k);
    std::copy_n(from + (at + k) / matrix * axis.inner + column, m, x + k);
    k += m;
  }
}

// The numbers of the lines that n elements of a block belong to; x is as long as a block.
static inline void spread_lines(const Axis& axis, int64_t at, int64_t n, const float* from, float* x) {
  if (axis.inner == 1)
    spread_runs(axis.size, at, n, from, x);
  else
    spread_columns(axis, at, n, from, x);
  if (n < BLOCK) std::fill_n(x + n, BLOCK - n, 0.0f);
}

// For each row the mean over all rows of its matrix.
static inline void mean_of_rows(const Lines& lines, const float* from, float* to) {
  const int64_t height = lines.axes[1].size, rows = lines.axes[0].count;
  for (int64_t k = 0; k < rows; k += height)
    std::fill_n(to + k, height, sum_of(from + k, height) / height);
}
