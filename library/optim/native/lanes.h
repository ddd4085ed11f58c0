// Sixteen float32 lanes, as compilers' vector extensions give them: one AVX-512 register, two of
// AVX2, four of NEON. Rules that the chain is written in map to these functions one by one.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;
constexpr int BLOCK = 256;

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef double D __attribute__((vector_size(64)));  // eight lanes
typedef float Half __attribute__((vector_size(32)));

template <class To, class From>
static inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "a view of the same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

static inline V splat(float x) { return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
static inline I splat_int(int32_t x) { return I{} + x; }
static inline I splat_truth(bool x) { return splat_int(-static_cast<int32_t>(x)); }
static inline V to_float(I x) { return __builtin_convertvector(x, V); }
static inline float to_float(int32_t x) { return static_cast<float>(x); }
static inline double to_float(double x) { return x; }
static inline V to_float(V x) { return x; }
static inline float to_float(float x) { return x; }
static inline I to_int(V x) { return __builtin_convertvector(x, I); }
static inline I to_int(I x) { return x; }

// A truth value is a mask: all bits or none, for each lane.
static inline V where(I c, V a, V b) { return c ? a : b; }
static inline I where(I c, I a, I b) { return c ? a : b; }
static inline float where(bool c, float a, float b) { return c ? a : b; }
static inline double where(bool c, double a, double b) { return c ? a : b; }

static inline V magnitude(V x) { return as<V>(as<I>(x) & 0x7fffffff); }
#if defined(__AVX512F__)
static inline I magnitude(I x) { return (I)_mm512_abs_epi32((__m512i)x); }
#else
static inline I magnitude(I x) { return x < 0 ? -x : x; }
#endif
static inline float magnitude(float x) { return std::fabs(x); }
static inline double magnitude(double x) { return std::fabs(x); }

#if defined(__AVX512F__)
static inline V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
static inline V smaller(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline V larger(V a, V b) { return a > b ? a : b; }
static inline V smaller(V a, V b) { return a < b ? a : b; }
#endif
static inline I larger(I a, I b) { return a > b ? a : b; }
static inline float larger(float a, float b) { return a > b ? a : b; }
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline I smaller(I a, I b) { return a < b ? a : b; }
static inline float smaller(float a, float b) { return a < b ? a : b; }
static inline double smaller(double a, double b) { return a < b ? a : b; }

template <class X>
static inline X sign_of(X x) {
  X zero{}, one = zero + 1;
  return x > 0 ? one : (x < 0 ? -one : zero);
}

static inline double round_down(double x) { return std::floor(x); }
static inline float round_down(float x) { return std::floor(x); }
static inline V round_down(V x) {
  for (int l = 0; l < LANES; ++l) x[l] = std::floor(x[l]);
  return x;
}
template <class X>
static inline X round_up(X x) { return -round_down(-x); }

static inline V with_sign(V x, V of) {
  return as<V>((as<I>(x) & 0x7fffffff) | (as<I>(of) & (int32_t)0x80000000));
}
static inline float with_sign(float x, float of) { return std::copysign(x, of); }
static inline double with_sign(double x, double of) { return std::copysign(x, of); }

static inline float root(float x) { return std::sqrt(x); }
static inline double root(double x) { return std::sqrt(x); }
static inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
static inline double inverse_root(double x) { return 1.0 / std::sqrt(x); }
#if defined(__AVX512F__)
static inline V root(V x) { return (V)_mm512_sqrt_ps((__m512)x); }
// The 14 bits of the table (coarse), doubled by a Newton step; x is a normal number.
static inline V inverse_root(V x) {
  V y = (V)_mm512_rsqrt14_ps((__m512)x);
  return y * (1.5f - 0.5f * x * y * y);
}
static inline V coarse_inverse_root(V x) { return (V)_mm512_rsqrt14_ps((__m512)x); }
#else
static inline V root(V x) {
  for (int l = 0; l < LANES; ++l) x[l] = std::sqrt(x[l]);
  return x;
}
static inline V inverse_root(V x) { return 1.0f / root(x); }
static inline V coarse_inverse_root(V x) { return inverse_root(x); }
#endif

static inline double power(double x, double y) { return std::pow(x, y); }
static inline float power(float x, float y) { return std::pow(x, y); }
static inline V power(V x, V y) {
  for (int l = 0; l < LANES; ++l) x[l] = std::pow(x[l], y[l]);
  return x;
}
static inline double exponential(double x) { return std::exp(x); }
static inline float exponential(float x) { return std::exp(x); }
// 2ⁿ·eʳ with |r| ≤ ln 2/2, where Taylor's series to the seventh power is exact to a float's last bit.
static inline V exponential(V x) {
  x = smaller(larger(x, splat(-104.0f)), splat(89.0f));
  const float shift = 12582912.0f;  // 1.5 · 2²³: what is added to it is rounded to a whole number
  const V shifted = x * 1.44269504f + shift;
  const V whole = shifted - shift;
  const I n = as<I>(shifted) - as<I>(splat(shift));
  // ln 2 in two parts: the first has so few digits that its product is exact.
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V y = r * (1.0f / 5040) + 1.0f / 720;
  y = (y * r + 1.0f / 120) * r + 1.0f / 24;
  y = ((y * r + 1.0f / 6) * r + 0.5f) * r + 1;
  y = y * r + 1;
  const I low = n >> 1;  // 2ⁿ itself may be no float
  return y * as<V>((low + 127) << 23) * as<V>((n - low + 127) << 23);
}

static inline float logistic(float x) { return 1.0f / (1.0f + std::exp(-x)); }
static inline double logistic(double x) { return 1.0 / (1.0 + std::exp(-x)); }
#if defined(__AVX512F__)
// 1/(1 + 2ⁿ·2ᶠ), |f| ≤ ½, where the polynomial's relative error is at most 8e-8 (a least-squares fit,
// weighted until the error was even). The quotient is the 14 bits of the table, doubled by a Newton
// step: a division would take as long as all else here.
static inline V logistic(V x) {
  const float shift = 12582912.0f;  // as in `exponential`
  const V power = larger(x, splat(-80.0f)) * -1.44269504f;
  const V shifted = larger(power, splat(-120.0f)) + shift;
  const V f = power - (shifted - shift);
  V y = 1.32765e-3f * f + 9.67554e-3f;
  y = ((y * f + 5.550713e-2f) * f + 2.402212e-1f) * f + 6.9314697e-1f;
  y = y * f + 1.00000007f;
  y = 1.0f + as<V>(as<I>(y) + (as<I>(shifted) << 23));
  const V inverse = (V)_mm512_rcp14_ps((__m512)y);
  return inverse * (2.0f - y * inverse);
}
#else
static inline V logistic(V x) { return 1.0f / (1.0f + exponential(-x)); }
#endif

// A block's numbers are asked for before a later pass needs them.
template <class Number>
static inline void prefetch(const Number* at) {
  for (size_t k = 0; k < BLOCK * sizeof(Number); k += 64) __builtin_prefetch((const char*)at + k, 0, 2);
}

// Memory to lanes and back. What lies there is told by the type of the pointer.
struct bfloat { uint16_t bits; };

static inline V load(const float* at) { V x; std::memcpy(&x, at, sizeof x); return x; }
static inline I load(const int32_t* at) { I x; std::memcpy(&x, at, sizeof x); return x; }
static inline void store(float* at, V x) { std::memcpy(at, &x, sizeof x); }

#if defined(__AVX512F__)  // compilers take the general way below apart into single numbers
static inline I load(const int8_t* at) {
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
}
static inline I load(const uint8_t* at) {
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
}
static inline I load(const uint16_t* at) {
  return (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
}
static inline I load(const int16_t* at) {
  return (I)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)at));
}
static inline void store_bytes(void* at, I x) {
  _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8((__m512i)x));
}
static inline void store_halves(void* at, I x) {
  _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16((__m512i)x));
}
#else
template <class Number>
static inline I widen(const Number* at) {
  I x;
  for (int l = 0; l < LANES; ++l) x[l] = at[l];
  return x;
}
template <class Number>
static inline void narrow(Number* at, I x) {
  for (int l = 0; l < LANES; ++l) at[l] = static_cast<Number>(x[l]);
}
static inline I load(const int8_t* at) { return widen(at); }
static inline I load(const uint8_t* at) { return widen(at); }
static inline I load(const uint16_t* at) { return widen(at); }
static inline I load(const int16_t* at) { return widen(at); }
static inline void store_bytes(void* at, I x) { narrow((uint8_t*)at, x & 0xff); }
static inline void store_halves(void* at, I x) { narrow((uint16_t*)at, x & 0xffff); }
#endif
static inline void store(int8_t* at, I x) { store_bytes(at, x); }
static inline void store(uint8_t* at, I x) { store_bytes(at, x); }
static inline void store(int16_t* at, I x) { store_halves(at, x); }
// Two bits of each element of a block, four elements to a byte: as in state.py.
static inline I load_quarter(const uint8_t* at, int j) {
  return (load(at + j % (BLOCK / 4)) >> (j / (BLOCK / 4) * 2)) & 3;
}
static inline V load(const bfloat* at) { return as<V>(load(&at->bits) << 16); }
// What is stored as bfloat16 was rounded to it: the lower half of the bits is nothing.
static inline void store(bfloat* at, V x) { store_halves(at, as<I>(x) >> 16); }

#if defined(__AVX512F__)
static inline D widen(Half x) { return (D)_mm512_cvtps_pd((__m256)x); }
#else
static inline D widen(Half x) { return __builtin_convertvector(x, D); }
#endif

// A sum: float32 within a block, float64 over blocks.
struct Sum {
  D sums{};
  void add(V x) {
    Half halves[2];
    std::memcpy(halves, &x, sizeof x);
    sums += widen(halves[0] + halves[1]);
  }
  double total() const {
    double x = 0;
    for (int l = 0; l < LANES / 2; ++l) x += sums[l];
    return x;
  }
};

// Of two vectors, counted through, the lanes that are named.
#if defined(__clang__)
static inline V pick(V a, V b, I from) {
  V x;
  for (int l = 0; l < LANES; ++l) x[l] = from[l] < LANES ? a[from[l]] : b[from[l] - LANES];
  return x;
}
#else
static inline V pick(V a, V b, I from) { return __builtin_shuffle(a, b, from); }
#endif

static inline float total(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float y = x[0];
  for (int l = 1; l < LANES; ++l) y += x[l];
  return y;
#endif
}

static inline float largest(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float y = x[0];
  for (int l = 1; l < LANES; ++l) y = larger(y, x[l]);
  return y;
#endif
}

// The exponents of float32: those of NaN and infinity are the largest.
static inline I exponent_bits(V x) { return as<I>(x) & 0x7f800000; }
static inline bool are_finite(I exponents) {
  for (int l = 0; l < LANES; ++l)
    if (exponents[l] == 0x7f800000) return false;
  return true;
}

// The seed of a block's noise: the same hash as in noise.py.
static inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
