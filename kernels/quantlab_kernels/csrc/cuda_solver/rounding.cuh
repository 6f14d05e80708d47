// Rounding to the nearest level of a codebook, by a warp for its kRows rows at a time. All lanes hand in the same
// targets and receive the same answers. A rounder holds the codebooks of one group; `enter` changes it.
#pragma once

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"

namespace quantlab {

__device__ __forceinline__ size_t book_of(const Books& books, int first_row, int r, int rows, int group) {
  // Lanes of a ragged block without a row of their own repeat the last one.
  return static_cast<size_t>(min(first_row + r, rows - 1)) * books.groups + group;
}

// Tables of up to 32 levels: lane k holds level k and the midpoint above it. One vote counts the midpoints below a
// target, so that a target halfway between two levels goes to the lower one.
class TableRounder {
 public:
  __device__ __forceinline__ TableRounder(const Books& books, int first_row, int rows)
      : books_(books), first_row_(first_row), rows_(rows) {
    load(0);
  }

  __device__ __forceinline__ void enter(int group) {
    if (group != group_) load(group);
  }

  __device__ __forceinline__ void operator()(const float (&targets)[kRows], int (&codes)[kRows],
                                             float (&levels)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) codes[r] = __popc(__ballot_sync(kAllLanes, targets[r] > midpoints_[r]));
#pragma unroll
    for (int r = 0; r < kRows; ++r) levels[r] = __shfl_sync(kAllLanes, levels_[r], codes[r]);
  }

 private:
  __device__ __forceinline__ void load(int group) {
    const int k = threadIdx.x;
    group_ = group;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const size_t book = book_of(books_, first_row_, r, rows_, group);
      levels_[r] = k < books_.count ? books_.levels[book * books_.count + k] : 0.f;
      midpoints_[r] = k < books_.count - 1 ? books_.midpoints[book * (books_.count - 1) + k] : INFINITY;
    }
  }

  const Books& books_;
  int first_row_, rows_, group_;
  float levels_[kRows], midpoints_[kRows];
};

// Tables of any size, searched in memory.
class WideTableRounder {
 public:
  __device__ __forceinline__ WideTableRounder(const Books& books, int first_row, int rows)
      : books_(books), first_row_(first_row), rows_(rows), group_(0) {}

  __device__ __forceinline__ void enter(int group) { group_ = group; }

  __device__ __forceinline__ void operator()(const float (&targets)[kRows], int (&codes)[kRows],
                                             float (&levels)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const size_t book = book_of(books_, first_row_, r, rows_, group_);
      const float* const midpoints = books_.midpoints + book * (books_.count - 1);
      int code = 0;
      for (int step = 128; step > 0; step /= 2) {
        if (code + step < books_.count && targets[r] > midpoints[code + step - 1]) code += step;
      }
      codes[r] = code;
      levels[r] = books_.levels[book * books_.count + code];
    }
  }

 private:
  const Books& books_;
  int first_row_, rows_, group_;
};

// Uniform grids. Halves go to the even code, like torch.round.
class GridRounder {
 public:
  __device__ __forceinline__ GridRounder(const Books& books, int first_row, int rows)
      : books_(books), first_row_(first_row), rows_(rows) {
    load(0);
  }

  __device__ __forceinline__ void enter(int group) {
    if (group != group_) load(group);
  }

  __device__ __forceinline__ void operator()(const float (&targets)[kRows], int (&codes)[kRows],
                                             float (&levels)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float largest = static_cast<float>(books_.count - 1);
      const float code = rintf(fminf(fmaxf(targets[r] / scale_[r] + zero_[r], 0.f), largest));
      codes[r] = static_cast<int>(code);
      levels[r] = (code - zero_[r]) * scale_[r];
    }
  }

 private:
  __device__ __forceinline__ void load(int group) {
    group_ = group;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const size_t book = book_of(books_, first_row_, r, rows_, group);
      scale_[r] = books_.scale[book];
      zero_[r] = books_.zero[book];
    }
  }

  const Books& books_;
  int first_row_, rows_, group_;
  float scale_[kRows], zero_[kRows];
};

// Calls visit.template operator()<Rounder>() for the rounder of a codebook.
template <typename Visit>
int visit_rounder(const Books& books, Visit visit) {
  if (books.levels == nullptr) return visit.template operator()<GridRounder>();
  if (books.count <= kWarpLanes) return visit.template operator()<TableRounder>();
  return visit.template operator()<WideTableRounder>();
}

}  // namespace quantlab
