// From the partial sums of the warps of a block to y: outliers, the sum over the warps in a fixed order, bias, one
// rounding, one store. No atomics: repeated calls give the same bits.
#pragma once

#include <intrinsics.cuh>

#include "tile.cuh"
#include "weight.h"

namespace quantlab {

// Shared memory holds sums as (token, row). With this pitch the lanes of a warp write to 32 different banks.
constexpr int kRowPitch = kTileRows + 4;

template <int TOKENS>
__device__ __forceinline__ void store_partial(const float (&sums)[TOKENS / 8][4], float* partial) {
#pragma unroll
  for (int token_tile = 0; token_tile < TOKENS / 8; ++token_tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 8 * token_tile + 2 * lane_quarter() + (i & 1);
      partial[token * kRowPitch + lane_row() + 8 * (i >> 1)] = sums[token_tile][i];
    }
  }
}

__device__ __forceinline__ float outlier_value(const Weight& weight, int entry) {
  if (static_cast<Element>(weight.outlier_element) == Element::kFloat32) {
    return static_cast<const float*>(weight.outlier_values)[entry];
  }
  return static_cast<float>(static_cast<const __half*>(weight.outlier_values)[entry]);
}

// The outliers of one row times x, by a whole warp: consume(token, sum) is called once for every token, by one lane.
// Lanes stand side by side over tokens, as far as there are any, and share the entries of the row.
template <int TOKENS, typename T, typename Consume>
__device__ __forceinline__ void multiply_outliers(const Weight& weight, const T* x, int64_t x_stride, int tokens,
                                                  int row, Consume consume) {
  constexpr int kTokenLanes = TOKENS < kWarpLanes ? TOKENS : kWarpLanes;
  constexpr int kEntryLanes = kWarpLanes / kTokenLanes;
  const int lane = threadIdx.x;
  const int begin = weight.outlier_offsets[row], end = weight.outlier_offsets[row + 1];
#pragma unroll
  for (int first = 0; first < TOKENS; first += kTokenLanes) {
    const int token = first + lane % kTokenLanes;
    float sum = 0.f;
    if (token < tokens) {
      for (int entry = begin + lane / kTokenLanes; entry < end; entry += kEntryLanes) {
        const T element = x[token * x_stride + weight.outlier_columns[entry]];
        sum += outlier_value(weight, entry) * static_cast<float>(element);
      }
    }
#pragma unroll
    for (int distance = kTokenLanes; distance < kWarpLanes; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (lane < kTokenLanes && token < tokens) consume(token, sum);
  }
}

// y at one token and row.
template <typename T>
__device__ __forceinline__ void store_result(const Weight& weight, const T* bias, T* y, int token, int row, float sum) {
  if (bias != nullptr) sum += static_cast<float>(bias[row]);
  y[static_cast<size_t>(token) * weight.n + row] = T(sum);
}

}  // namespace quantlab
