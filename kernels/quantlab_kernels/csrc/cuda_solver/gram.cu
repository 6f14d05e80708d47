// Sums of a Hessian over inputs with the same code (`quantlab.solvers.codebook`), the larger part of S H S^T.
//
// H is symmetric, so its upper triangle with half the diagonal, U, is enough: with Q = S U S^T the result is Q + Q^T.
// This file makes S U, one addition per entry of U; levels.cu sums its columns.
//
// The inputs of a row are sorted by code once, in segments of kSegment. A list holds the places of the inputs within
// the segment, a byte each, code after code. The list of a code is filled up to whole words with kSegment, the place of
// a row of zeros, so that four inputs are added at a time. For every row and segment:
//   lists  (rows, segments, list_words(levels)) words;
//   starts (rows, segments, levels + 1), the word where the list of a code begins, and where the last one ends.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"

namespace quantlab {
namespace {

constexpr int kSortSteps = kSegment / kWarpLanes;
static_assert(kSegment % kWarpLanes == 0 && kSegment < 256);

constexpr int kGramColumns = kWarpLanes;  // of a block: a lane owns one
constexpr int kGramRows = 2;              // of a warp
constexpr int kGramBlockRows = kGramRows * kWarps;
constexpr int kTileFloats = (kSegment + 1) * kGramColumns;

__host__ __device__ constexpr int list_words(int levels) { return kSegment / 4 + levels; }

__host__ __device__ constexpr int segments_of(int inputs) { return (inputs + kSegment - 1) / kSegment; }

// A warp per row and segment.
__global__ void __launch_bounds__(kThreads)
    sort_codes(const uint8_t* __restrict__ codes, const int rows, const int inputs, const int levels, uint32_t* lists,
               uint16_t* starts) {
  const int segments = segments_of(inputs);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (pair >= static_cast<int64_t>(rows) * segments) return;
  const int lane = threadIdx.x;
  const int row = static_cast<int>(pair / segments), first = static_cast<int>(pair % segments) * kSegment;
  int code[kSortSteps];
#pragma unroll
  for (int i = 0; i < kSortSteps; ++i) {
    const int input = first + i * kWarpLanes + lane;
    code[i] = input < inputs ? codes[static_cast<size_t>(row) * inputs + input] : -1;
  }
  uint8_t* const list = reinterpret_cast<uint8_t*>(lists + pair * list_words(levels));
  uint16_t* const start = starts + pair * (levels + 1);
  int place = 0;  // in bytes
  for (int level = 0; level < levels; ++level) {
    if (lane == 0) start[level] = static_cast<uint16_t>(place / 4);
#pragma unroll
    for (int i = 0; i < kSortSteps; ++i) {
      const unsigned members = __ballot_sync(kAllLanes, code[i] == level);
      if (code[i] == level) {
        list[place + __popc(members & ((1u << lane) - 1))] = static_cast<uint8_t>(i * kWarpLanes + lane);
      }
      place += __popc(members);
    }
    const int padding = -place & 3;
    if (lane < padding) list[place + lane] = kSegment;
    place += padding;
  }
  if (lane == 0) start[levels] = static_cast<uint16_t>(place / 4);
}

// sums[row][level][column] = sum of U[j][column] over inputs j with that code, for WINDOW levels. blockIdx.x: rows;
// y: columns, those with the most inputs above the diagonal first; z: levels.
template <int WINDOW>
__global__ void __launch_bounds__(kThreads)
    sum_hessian_rows(const float* __restrict__ hessian, const uint32_t* __restrict__ lists,
                     const uint16_t* __restrict__ starts, const int rows, const int inputs, const int levels,
                     float* __restrict__ sums) {
  QUANTLAB_SHARED(float, tile, kTileFloats);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int first_column = (gridDim.y - 1 - blockIdx.y) * kGramColumns;
  const int column = first_column + lane;
  const int first_row = blockIdx.x * kGramBlockRows + kGramRows * warp;
  const int first_level = blockIdx.z * WINDOW;
  const int segments = segments_of(inputs);
  const int limit = min(first_column + kGramColumns, inputs);  // inputs below the diagonal count nothing

  float totals[kGramRows][WINDOW] = {};
  if (warp == 0) tile[kSegment * kGramColumns + lane] = 0.f;
  for (int first = 0, segment = 0; first < limit; first += kSegment, ++segment) {
    __syncthreads();
    for (int place = warp; place < kSegment; place += kWarps) {
      const int input = first + place;
      float value = 0.f;
      if (input <= column && column < inputs) {
        value = hessian[static_cast<size_t>(input) * inputs + column] * (input == column ? 0.5f : 1.f);
      }
      tile[place * kGramColumns + lane] = value;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kGramRows; ++r) {
      if (first_row + r >= rows) continue;
      const size_t pair = static_cast<size_t>(first_row + r) * segments + segment;
      const uint32_t* const list = lists + pair * list_words(levels);
      // Lane k: where the list of level k of the window begins; of levels that do not exist, the end.
      const int own_start = starts[pair * (levels + 1) + min(first_level + lane, levels)];
      int end = __shfl_sync(kAllLanes, own_start, 0);
#pragma unroll
      for (int k = 0; k < WINDOW; ++k) {
        const int begin = end;
        end = __shfl_sync(kAllLanes, own_start, k + 1);
        for (int word = begin; word < end; ++word) {
          const uint32_t four = list[word];
          const float* const at = tile + lane;
          const float even = at[(four & 0xff) * kGramColumns] + at[(four >> 8 & 0xff) * kGramColumns];
          const float odd = at[(four >> 16 & 0xff) * kGramColumns] + at[(four >> 24) * kGramColumns];
          totals[r][k] += even + odd;
        }
      }
    }
  }
  if (column >= inputs) return;
#pragma unroll
  for (int r = 0; r < kGramRows; ++r) {
    if (first_row + r >= rows) continue;
#pragma unroll
    for (int k = 0; k < WINDOW; ++k) {
      if (first_level + k >= levels) continue;
      sums[(static_cast<size_t>(first_row + r) * levels + first_level + k) * inputs + column] = totals[r][k];
    }
  }
}

template <int WINDOW>
int run(const float* hessian, const uint32_t* lists, const uint16_t* starts, int rows, int inputs, int levels,
        float* sums, void* stream) {
  const dim3 grid((rows + kGramBlockRows - 1) / kGramBlockRows, (inputs + kGramColumns - 1) / kGramColumns,
                  (levels + WINDOW - 1) / WINDOW);
  return launch(sum_hessian_rows<WINDOW>, grid, dim3(kWarpLanes, kWarps), stream, hessian, lists, starts, rows, inputs,
                levels, sums);
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_sort_codes(const uint8_t* codes, int32_t rows, int32_t inputs, int32_t levels,
                                               uint32_t* lists, uint16_t* starts, int32_t device, void* stream) {
  using namespace quantlab;
  if (rows == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  const int64_t pairs = static_cast<int64_t>(rows) * segments_of(inputs);
  const dim3 grid(static_cast<unsigned>((pairs + kWarps - 1) / kWarps));
  return launch(sort_codes, grid, dim3(kWarpLanes, kWarps), stream, codes, rows, inputs, levels, lists, starts);
}

QUANTLAB_EXPORT int quantlab_solver_sum_hessian_rows(const float* hessian, const uint32_t* lists, const uint16_t* starts,
                                                     int32_t rows, int32_t inputs, int32_t levels, float* sums,
                                                     int32_t device, void* stream) {
  using namespace quantlab;
  if (rows == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  if (levels <= 4) return run<4>(hessian, lists, starts, rows, inputs, levels, sums, stream);
  if (levels <= 8) return run<8>(hessian, lists, starts, rows, inputs, levels, sums, stream);
  return run<16>(hessian, lists, starts, rows, inputs, levels, sums, stream);
}
