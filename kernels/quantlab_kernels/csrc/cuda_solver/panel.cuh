// What the sweep and both descents share: a warp owns kRows output rows and walks over panels of positions. Every lane
// holds a few neighbouring positions of the panel for all rows of its warp, in registers.
//
// Most of the work is errors (rows, inputs) times a matrix (inputs, columns). A block of eight warps streams both
// through shared memory, kChunk inputs at a time, two chunks in turn: copies of the next one run while this one is
// multiplied. What is sequential about a panel, one position after the other, happens within a warp: the position's
// owner hands its target round, and every lane adds the new error times one row of the matrix to its own positions.
#pragma once

#include <intrinsics.cuh>

#include "interface.h"

namespace quantlab {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpLanes;
constexpr int kRows = kBlockRows / kWarps;  // of a warp
constexpr int kChunk = 32;

static_assert(kRows == 4, "rows of a warp are read and written as one vector");

// Of one lane: numbers by row and position.
template <int POSITIONS>
using Lane = float[kRows][POSITIONS];

// Neighbouring numbers, read as one vector.
template <int COUNT>
__device__ __forceinline__ void load_run(const float* source, float (&run)[COUNT]) {
  if constexpr (COUNT == 4) {
    const float4 vector = *reinterpret_cast<const float4*>(source);
    run[0] = vector.x, run[1] = vector.y, run[2] = vector.z, run[3] = vector.w;
  } else {
    static_assert(COUNT == 2);
    const float2 vector = *reinterpret_cast<const float2*>(source);
    run[0] = vector.x, run[1] = vector.y;
  }
}

template <int COUNT>
__device__ __forceinline__ void add_product(float factor, const float (&run)[COUNT], float (&sums)[COUNT]) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) sums[j] = fmaf(factor, run[j], sums[j]);
}

// One position of kRows rows in a matrix by positions.
__device__ __forceinline__ void store_rows(float* target, float a, float b, float c, float d) {
  *reinterpret_cast<float4*>(target) = make_float4(a, b, c, d);
}

// Two chunks in shared memory, for panels with POSITIONS positions per lane.
template <int POSITIONS>
class Chunks {
 public:
  static constexpr int kColumns = kWarpLanes * POSITIONS;
  static constexpr int kMatrixFloats = 2 * kChunk * kColumns;
  static constexpr int kErrorFloats = 2 * kChunk * kBlockRows;

  // matrix: (inputs, pitch); errors: (inputs, error_pitch). Inputs from `limit` count as zeros.
  __device__ __forceinline__ Chunks(float* shared_matrix, float* shared_errors, const float* matrix, int64_t pitch,
                                    const float* errors, int64_t error_pitch, int limit)
      : shared_matrix_(shared_matrix),
        shared_errors_(shared_errors),
        matrix_(matrix),
        errors_(errors),
        pitch_(pitch),
        error_pitch_(error_pitch),
        limit_(limit) {}

  // Begins to copy the inputs from `first`, with the columns of the matrix from `column` and, if wanted, the errors
  // of this block's rows. Even and odd chunks take turns in memory.
  __device__ __forceinline__ void start(int chunk, int first, int column, bool with_errors) {
    copy<kColumns>(shared_matrix_ + (chunk & 1) * kChunk * kColumns, matrix_, pitch_, first, column);
    if (with_errors) {
      float* const target = shared_errors_ + (chunk & 1) * kChunk * kBlockRows;
      copy<kBlockRows>(target, errors_, error_pitch_, first, blockIdx.x * kBlockRows);
    }
    commit_copies();
  }

  // The row of the matrix for input i of a chunk, at the positions of this lane.
  __device__ __forceinline__ void load(int chunk, int i, float (&row)[POSITIONS]) const {
    load_run(shared_matrix_ + ((chunk & 1) * kChunk + i) * kColumns + POSITIONS * threadIdx.x, row);
  }

  // sums += errors times matrix over one chunk. Partial sums keep long sums exact.
  __device__ __forceinline__ void multiply(int chunk, Lane<POSITIONS>& sums) const {
    const float* const errors = shared_errors_ + (chunk & 1) * kChunk * kBlockRows + kRows * threadIdx.y;
    Lane<POSITIONS> partial = {};
#pragma unroll 8
    for (int i = 0; i < kChunk; ++i) {
      float row[POSITIONS], error[kRows];
      load(chunk, i, row);
      load_run(errors + i * kBlockRows, error);
#pragma unroll
      for (int r = 0; r < kRows; ++r) add_product(error[r], row, partial[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < POSITIONS; ++j) sums[r][j] += partial[r][j];
    }
  }

 private:
  template <int WIDTH>
  __device__ __forceinline__ void copy(float* target, const float* source, int64_t pitch, int first, int column) const {
    constexpr int kVector = 4, kVectors = WIDTH / kVector;
    for (int i = threadIdx.y * kWarpLanes + threadIdx.x; i < kChunk * kVectors; i += kThreads) {
      const int row = first + i / kVectors, at = column + i % kVectors * kVector;
      const bool valid = row < limit_ && at < pitch;
      copy_async(target + i * kVector, valid ? source + row * pitch + at : source, valid);
    }
  }

  float* shared_matrix_;
  float* shared_errors_;
  const float* matrix_;
  const float* errors_;
  int64_t pitch_;
  int64_t error_pitch_;
  int limit_;
};

// Panels of the sweep and of coordinate descent.
constexpr int kPositions = 4;
constexpr int kPanel = kWarpLanes * kPositions;
constexpr int kPanelChunks = kPanel / kChunk;
constexpr int kOwners = kChunk / kPositions;  // lanes that own the positions of a chunk
using PanelChunks = Chunks<kPositions>;
using PanelLane = Lane<kPositions>;

// The sum of a value over the lanes of a warp, for all of them.
__device__ __forceinline__ double sum_over_warp(double value) {
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

}  // namespace quantlab
