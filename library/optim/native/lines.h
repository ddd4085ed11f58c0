// Lines of a tensor (lines.py): sums over them, and their numbers spread over elements, block by
// block. A tensor is [outer, size, inner], its lines lie along the middle. Where inner is 1 a line is a
// run of neighbours; else it is a column, whose elements lie `inner` apart.
#pragma once
#include <algorithm>

#include "call.h"

// Called once a block: copies of them in every pass would only take the compiler time.
#define LINES_APART __attribute__((noinline))

// A number that others are divided by, with less time than the processor's own division takes.
struct Divisor {
  int64_t of;
  double inverse;
  Divisor(int64_t of = 1) : of(of), inverse(1.0 / of) {}
  int64_t quotient(int64_t k) const {
    const int64_t near = (int64_t)(k * inverse);  // off by one at most, for k below 2⁵³
    return near - (near * of > k) + ((near + 1) * of <= k);
  }
};

struct Axis {
  Divisor size, inner, matrix;  // matrix: size · inner
  int64_t count;
  Axis(int64_t size = 1, int64_t inner = 1, int64_t count = 1)
      : size(size), inner(inner), matrix(size * inner), count(count) {}
};

// Where an element lies: in which line, or in the first line of which matrix; how far in it.
struct Place {
  int64_t line, offset;
};
static inline Place place_of(const Divisor& size, int64_t k) {
  const int64_t line = size.quotient(k);
  return {line, k - line * size.of};
}

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

static inline float sum_of(const float* x, int64_t n) {
  float sum = 0;
  if (n >= LANES) {
    V even{}, odd{};
    for (; n >= 2 * LANES; n -= 2 * LANES, x += 2 * LANES) {
      even += load(x);
      odd += load(x + LANES);
    }
    if (n >= LANES) {
      even += load(x);
      n -= LANES;
      x += LANES;
    }
    sum = total(even + odd);
  }
  for (int64_t k = 0; k < n; ++k) sum += x[k];
  return sum;
}

// What follows writes and reads whole vectors, also where a line ends within one: behind it comes what
// the next line overwrites, or padding. A narrower store in front of a wider load stalls it.

static inline void add_to(float* to, const float* x, int64_t n) {
  for (; n >= LANES; n -= LANES, x += LANES, to += LANES) store(to, load(to) + load(x));
  for (int64_t k = 0; k < n; ++k) to[k] += x[k];
}

// Which lane each lane takes: of runs of SIZE, that of its run's number, and that `apart` from it.
template <int SIZE>
static inline I run_of_lane() {
  I from{};
  for (int l = 0; l < LANES; ++l) from[l] = l / SIZE;
  return from;
}
static inline I lane_apart(int apart) {
  I from{};
  for (int l = 0; l < LANES; ++l) from[l] = l ^ apart;
  return from;
}

// Of lanes that lie APART, a's sums in those whose number lacks that bit, b's in the others.
template <int APART>
static inline V fold(V a, V b) {
  I own{}, other{};
#pragma GCC unroll 16
  for (int l = 0; l < LANES; ++l) {
    own[l] = l & APART ? l + LANES : l;
    other[l] = l & APART ? (l ^ APART) + LANES : l ^ APART;
  }
  return pick(a, b, own) + pick(a, b, other);
}

template <int COUNT>
static inline V fold_all(const V* x) {
  V half[COUNT / 2];
#pragma GCC unroll 8
  for (int k = 0; k < COUNT / 2; ++k) half[k] = fold<COUNT / 2>(x[k], x[k + COUNT / 2]);
  return fold_all<COUNT / 2>(half);
}
template <>
inline V fold_all<1>(const V* x) {
  return x[0];
}

// Runs of a size that LANES is a multiple of, from the beginning of one on.
template <int SIZE>
static inline void add_short_runs(const float* x, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += LANES, to += LANES / SIZE) {
    V sums = load(x + k);
    for (int apart = 1; apart < SIZE; apart *= 2) sums += pick(sums, sums, lane_apart(apart));
    for (int run = 0; run < std::min<int64_t>(LANES, n - k) / SIZE; ++run) to[run] += sums[run * SIZE];
  }
}

// Sixteen runs of sixteen: pairs of vectors are folded into one until one is left.
static inline void add_vector_runs(const float* x, int64_t n, float* to) {
  for (; n >= LANES * LANES; n -= LANES * LANES, x += LANES * LANES, to += LANES) {
    V rows[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k) rows[k] = load(x + k * LANES);
    store(to, load(to) + fold_all<LANES>(rows));
  }
  for (; n > 0; n -= LANES, x += LANES, ++to) *to += total(load(x));
}

static LINES_APART void add_runs(const Axis& axis, int64_t at, int64_t n, const float* x, float* to) {
  const int64_t size = axis.size.of;
  const Place place = place_of(axis.size, at);
  int64_t left = size - place.offset;
  to += place.line;
  if (size == LANES) return add_vector_runs(x, n, to);
  if (size == 8) return add_short_runs<8>(x, n, to);
  if (size == 4) return add_short_runs<4>(x, n, to);
  if (size == 2) return add_short_runs<2>(x, n, to);
  for (int64_t k = 0; k < n; k += left, left = size, ++to) {
    left = std::min(left, n - k);
    *to += sum_of(x + k, left);
  }
}

static inline bool is_short(int64_t inner) { return inner <= LANES && (inner & (inner - 1)) == 0; }

// Columns that come back within a vector, in a block that lies in one matrix.
static inline void add_short_columns(int64_t inner, const float* x, float* to) {
  V sums{};
  for (int j = 0; j < BLOCK; j += LANES) sums += load(x + j);
  for (int l = 0; l < LANES; ++l) to[l & (inner - 1)] += sums[l];
}

// Numbers of one block first: added one by one to a long column's sum they would lose their digits.
static LINES_APART void add_columns(const Axis& axis, int64_t at, int64_t n, const float* x, float* to) {
  const int64_t inner = axis.inner.of, matrix = axis.matrix.of;
  Place place = place_of(axis.matrix, at);
  float* sums = to + place.line * inner;
  if (is_short(inner) && n == BLOCK && place.offset + n <= matrix)
    return add_short_columns(inner, x, sums);
  int64_t column = place_of(axis.inner, place.offset).offset;
  float own[BLOCK / 2];
  for (int64_t k = 0; k < n; sums += inner, place.offset = column = 0) {
    const int64_t many = std::min(matrix - place.offset, n - k);
    const bool apart = inner <= BLOCK / 2 && many > inner;
    if (apart) std::fill_n(own, inner, 0.0f);
    for (const int64_t end = k + many; k < end; column = 0) {
      const int64_t m = std::min(inner - column, end - k);
      add_to((apart ? own : sums) + column, x + k, m);
      k += m;
    }
    if (apart) add_to(sums, own, inner);
  }
}

// Adds n elements of a block, the first of which is element `at`, to the sums of their lines.
static inline void add_lines(const Axis& axis, int64_t at, int64_t n, const float* x, float* to) {
  if (axis.inner.of == 1) return add_runs(axis, at, n, x, to);
  add_columns(axis, at, n, x, to);
}

template <int SIZE>
static inline void spread_short_runs(const float* from, int64_t n, float* x) {
  for (int64_t k = 0; k < n; k += LANES, from += LANES / SIZE) {
    const V numbers = load(from);
    store(x + k, pick(numbers, numbers, run_of_lane<SIZE>()));
  }
}

static LINES_APART void spread_runs(const Axis& axis, int64_t at, int64_t n, const float* from, float* x) {
  const int64_t size = axis.size.of;
  const Place place = place_of(axis.size, at);
  int64_t left = size - place.offset;
  from += place.line;
  if (size == LANES) {
    for (int64_t k = 0; k < n; k += LANES, ++from) store(x + k, splat(*from));
    return;
  }
  if (size == 8) return spread_short_runs<8>(from, n, x);
  if (size == 4) return spread_short_runs<4>(from, n, x);
  if (size == 2) return spread_short_runs<2>(from, n, x);
  for (int64_t k = 0; k < n; k += left, left = size, ++from) {
    left = std::min(left, n - k);
    for (int64_t j = 0; j < left; j += LANES) store(x + k + j, splat(*from));
  }
}

static LINES_APART void spread_columns(const Axis& axis, int64_t at, int64_t n, const float* from, float* x) {
  const int64_t inner = axis.inner.of, matrix = axis.matrix.of;
  Place place = place_of(axis.matrix, at);
  from += place.line * inner;
  if (is_short(inner) && place.offset + n <= matrix) {
    V numbers{};
    for (int l = 0; l < LANES; ++l) numbers[l] = from[l & (inner - 1)];
    for (int64_t k = 0; k < n; k += LANES) store(x + k, numbers);
    return;
  }
  int64_t column = place_of(axis.inner, place.offset).offset;
  for (int64_t k = 0; k < n; column = 0) {
    const int64_t m = std::min(inner - column, n - k);
    for (int64_t j = 0; j < m; j += LANES) store(x + k + j, load(from + column + j));
    k += m;
    if ((place.offset += m) == matrix) {
      place.offset = 0;
      from += inner;
    }
  }
}

// The numbers of the lines that n elements of a block belong to, 0 behind these: where they lie, or
// written to x, which has room for a block and a vector.
static inline const float* spread_lines(
    const Axis& axis, int64_t at, int64_t n, const float* from, float* x) {
  if (axis.inner.of == 1) {
    spread_runs(axis, at, n, from, x);
  } else {
    const Place place = place_of(axis.inner, at);
    if (n == BLOCK && place.offset + n <= axis.inner.of)
      return from + axis.matrix.quotient(at) * axis.inner.of + place.offset;
    spread_columns(axis, at, n, from, x);
  }
  if (n < BLOCK) std::fill_n(x + n, BLOCK - n, 0.0f);
  return x;
}

// For each row the mean over all rows of its matrix; 0 behind the last, where another tensor's may lie.
static inline void mean_of_rows(const Lines& lines, const float* from, float* to) {
  const int64_t height = lines.axes[1].size.of, rows = lines.axes[0].count;
  for (int64_t k = 0; k < rows; k += height)
    std::fill_n(to + k, height, sum_of(from + k, height) / height);
  std::fill(to + rows, to + lines.stride, 0.0f);
}
