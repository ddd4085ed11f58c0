// What a program is given for the tensors of one step; run.py fills it in.
#pragma once
#include <cstdint>

#include "lanes.h"

constexpr uint32_t NOISE = 1 << 15;  // numbers in the table

struct Call {
  int64_t tensors, threads;
  const int64_t* order;       // [tensors], in which tensors are worked on
  const int64_t* ranks;       // [tensors], at the first half of a LoRA pair in this order: its rank,
                              // negative if that half is B; 0 elsewhere
  const int64_t* numel;       // [tensors]
  const int64_t* lines;       // [4, tensors], sizes of rows, columns and filters, and how many lines
                              // there are of the axis that has most
  const void* const* grads;   // [tensors]
  double* looked;             // [LOOKS, tensors], sums over gradients alone
  double* given;              // [numbers, tensors]
  double* report;             // [reports, tensors]
  void* const* held;          // [pointers, tensors], the parameter and its state
  const uint32_t* seeds;      // [tensors]
  const int32_t* noise;
};

// The noise of tensor i's block b, the `draw`-th of this step: as in noise.py.
static inline const int32_t* noise_of(const Call& call, int64_t i, int64_t b, uint32_t draw) {
  const uint32_t stream = scramble(call.seeds[i] + draw * 0x85EBCA77u);
  return call.noise + (scramble(stream ^ ((uint32_t)b * 0x9E3779B1u)) & (NOISE - 1));
}
