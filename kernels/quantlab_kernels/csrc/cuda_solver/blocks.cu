// Block descent (`quantlab.solvers.blocks`): one launch for a pass over a layer.
//
// For a block with Hessian H_BB = L L^T and coupling g = e_R H_RB to the other inputs, the sweep over w_B + g H_BB^-1 has
// the targets
//
//     v_j = w_j + q_j / L_jj^2 + sum_{u > j} e_u F_uj,       F = L / diag L,  F q = g,
//
// in terms of the errors e_u of the weight itself, so that the shifted weight is never formed.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"
#include "rounding.cuh"

namespace quantlab {
namespace {

constexpr int kBlockPositions = kMaxBlock / kWarpLanes;
using BlockChunks = Chunks<kBlockPositions>;
using BlockLane = Lane<kBlockPositions>;
static_assert(BlockChunks::kColumns == kMaxBlock);

// Row i of a small matrix (kMaxBlock, kMaxBlock) at the positions of this lane.
__device__ __forceinline__ void load_row(const float* matrix, int i, float (&row)[kBlockPositions]) {
  load_run(matrix + i * kMaxBlock + kBlockPositions * threadIdx.x, row);
}

// Position i of a block, handed round by its owner.
__device__ __forceinline__ float broadcast(const float (&own)[kBlockPositions], int i) {
  static_assert(kBlockPositions == 2);
  return __shfl_sync(kAllLanes, i % 2 == 0 ? own[0] : own[1], i / 2);
}

// sums += numbers times a small symmetric matrix
__device__ __forceinline__ void multiply_small(const float* matrix, int count, const BlockLane& numbers,
                                               BlockLane& sums) {
  for (int i = 0; i < count; ++i) {
    float row[kBlockPositions];
    load_row(matrix, i, row);
#pragma unroll
    for (int r = 0; r < kRows; ++r) add_product(broadcast(numbers[r], i), row, sums[r]);
  }
}

constexpr double kSmallestStep = 1e-8;  // of the damping

// A block of inputs by a block of threads: its Hessian and its factors, by Cholesky in float64. While it is not positive
// definite with `damping` times its mean diagonal added, the damping is multiplied by ten from the smallest step on (as
// in cholesky.py), up to one.
__global__ void __launch_bounds__(kThreads) factor_blocks(const Factors factors) {
  constexpr int kPitch = kMaxBlock + 1;  // columns in different banks
  QUANTLAB_SHARED(double, lower, kMaxBlock * kPitch);
  const int thread = threadIdx.y * kWarpLanes + threadIdx.x;
  const int size = factors.size, first = blockIdx.x * size;
  const int count = min(size, factors.visited - first);
  const int64_t* const order = factors.order + first;
  const size_t matrix = static_cast<size_t>(blockIdx.x) * size * size;
  const auto entry = [&](int i, int j) { return factors.hessian[order[i] * factors.inputs + order[j]]; };

  double mean = 0.0;
  for (int i = 0; i < count; ++i) mean += static_cast<double>(entry(i, i)) / count;
  double damping = factors.damping;
  bool solved = false;
  while (!solved) {
    for (int at = thread; at < count * count; at += kThreads) {
      const int i = at / count, j = at % count;
      lower[i * kPitch + j] = static_cast<double>(entry(i, j)) + (i == j ? damping * mean : 0.0);
    }
    __syncthreads();
    solved = true;
    for (int c = 0; c < count && solved; ++c) {
      const double pivot = sqrt(lower[c * kPitch + c]);
      solved = pivot > 0;
      __syncthreads();
      for (int i = c + thread; i < count; i += kThreads) lower[i * kPitch + c] /= pivot;
      __syncthreads();
      for (int at = thread; at < count * count; at += kThreads) {
        const int i = at / count, j = at % count;
        if (c < j && j <= i) lower[i * kPitch + j] -= lower[i * kPitch + c] * lower[j * kPitch + c];
      }
      __syncthreads();
    }
    if (damping >= 1) break;
    damping = fmin(fmax(10 * damping, kSmallestStep), 1.0);
  }

  for (int at = thread; at < size * size; at += kThreads) {
    const int i = at / size, j = at % size;
    const bool real = i < count && j < count;
    factors.within[matrix + at] = real ? entry(i, j) : 0.f;
    factors.feedback[matrix + at] = real && j <= i ? static_cast<float>(lower[i * kPitch + j] / lower[j * kPitch + j]) : 0.f;
    factors.upper[matrix + at] = real && i <= j ? static_cast<float>(lower[j * kPitch + i] / lower[i * kPitch + i]) : 0.f;
  }
  for (int i = thread; i < count; i += kThreads) {
    const double pivot = lower[i * kPitch + i];
    factors.precision[first + i] = static_cast<float>(1 / (pivot * pivot));
  }
  if (thread == 0) factors.failed[blockIdx.x] = !solved;
}

template <typename Rounder>
__global__ void __launch_bounds__(kThreads) descend_blocks(const Blocks blocks, const Books books) {
  QUANTLAB_SHARED(float, matrix, BlockChunks::kMatrixFloats);
  QUANTLAB_SHARED(float, errors, BlockChunks::kErrorFloats);
  BlockChunks chunks(matrix, errors, blocks.hessian, blocks.hessian_pitch, blocks.error, blocks.error_pitch,
                     blocks.inputs);
  const int lane = threadIdx.x;
  const int first_row = blockIdx.x * kBlockRows + kRows * threadIdx.y;
  Rounder round(books, first_row, blocks.rows);
  double gained[kRows] = {};

  for (int first = 0, block = 0; first < blocks.visited; first += blocks.size, ++block) {
    const int count = min(blocks.size, blocks.visited - first);
    const int64_t* const order = blocks.order + first;
    const float* const within = blocks.within + static_cast<size_t>(block) * kMaxBlock * kMaxBlock;
    const float* const feedback = blocks.feedback + static_cast<size_t>(block) * kMaxBlock * kMaxBlock;
    const float* const upper = blocks.upper + static_cast<size_t>(block) * kMaxBlock * kMaxBlock;

    // e H for the inputs of the block, with the errors of all inputs.
    const int products = (blocks.inputs + kChunk - 1) / kChunk;
    BlockLane coupling = {};
    chunks.start(0, 0, block * kMaxBlock, true);
    for (int chunk = 0; chunk < products; ++chunk) {
      if (chunk + 1 < products) {
        chunks.start(chunk + 1, (chunk + 1) * kChunk, block * kMaxBlock, true);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      chunks.multiply(chunk, coupling);
      __syncthreads();
    }

    BlockLane weights, before, own = {};
    float precision[kBlockPositions];
#pragma unroll
    for (int j = 0; j < kBlockPositions; ++j) {
      const int i = kBlockPositions * lane + j;
      const int64_t input = i < count ? order[i] : 0;
      precision[j] = i < count ? blocks.precision[first + i] : 0.f;
      float error[kRows] = {};
      if (i < count) load_run(blocks.error + input * blocks.error_pitch + first_row, error);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        before[r][j] = error[r];
        const bool real = i < count && first_row + r < blocks.rows;
        weights[r][j] = real ? blocks.weight[static_cast<size_t>(first_row + r) * blocks.inputs + input] : 0.f;
      }
    }

    // Less the block's own part: the coupling to the others, g. Then F q = g, by columns of F.
    multiply_small(within, count, before, own);
    BlockLane solved;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kBlockPositions; ++j) solved[r][j] = coupling[r][j] -= own[r][j];
    }
    for (int i = 0; i < count; ++i) {
      float column[kBlockPositions];
      load_row(upper, i, column);
#pragma unroll
      for (int j = 0; j < kBlockPositions; ++j) {
        if (kBlockPositions * lane + j <= i) column[j] = 0.f;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) add_product(-broadcast(solved[r], i), column, solved[r]);
    }

    // The sweep over the block.
    BlockLane targets, after = {};
    uint32_t codes[kRows] = {};  // a byte per position
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kBlockPositions; ++j) targets[r][j] = weights[r][j] + solved[r][j] * precision[j];
    }
    for (int i = count - 1; i >= 0; --i) {
      if (books.groups > 1) round.enter(static_cast<int>(order[i]) / books.group_size);
      float row[kBlockPositions], target[kRows], level[kRows];
      int code[kRows];
      load_row(feedback, i, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) target[r] = broadcast(targets[r], i);
      round(target, code, level);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float error = broadcast(weights[r], i) - level[r];
        add_product(error, row, targets[r]);
#pragma unroll
        for (int j = 0; j < kBlockPositions; ++j) {
          if (kBlockPositions * lane + j != i) continue;
          after[r][j] = error;
          codes[r] |= static_cast<uint32_t>(code[r]) << 8 * j;
        }
      }
    }

    // The difference of the two losses, from the difference of the errors so that nothing cancels:
    // (after - before) (H_BB (after + before) + 2 coupling)
    BlockLane both, slope;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kBlockPositions; ++j) {
        both[r][j] = after[r][j] + before[r][j];
        slope[r][j] = 2 * coupling[r][j];
      }
    }
    multiply_small(within, count, both, slope);
    bool better[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float change = 0.f;
#pragma unroll
      for (int j = 0; j < kBlockPositions; ++j) change += (after[r][j] - before[r][j]) * slope[r][j];
      const double total = sum_over_warp(change);
      better[r] = total < 0;
      if (better[r]) gained[r] += total;
    }
#pragma unroll
    for (int j = 0; j < kBlockPositions; ++j) {
      const int i = kBlockPositions * lane + j;
      if (i >= count) continue;
      const int64_t input = order[i];
      float kept[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        kept[r] = better[r] ? after[r][j] : before[r][j];
        if (!better[r] || first_row + r >= blocks.rows) continue;
        blocks.codes[static_cast<size_t>(first_row + r) * blocks.inputs + input] =
            static_cast<uint8_t>(codes[r] >> 8 * j);
      }
      store_rows(blocks.error + input * blocks.error_pitch + first_row, kept[0], kept[1], kept[2], kept[3]);
    }
    // The errors of this block are copied for the next one by other threads.
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane == 0 && first_row + r < blocks.rows) blocks.gained[first_row + r] += gained[r];
  }
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_factor_blocks(const quantlab::Factors* factors, int32_t device, void* stream) {
  using namespace quantlab;
  if (factors->visited == 0) return 0;
  if (factors->size < 1 || factors->size > kMaxBlock) return kUnsupported;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  const dim3 grid((factors->visited + factors->size - 1) / factors->size), block(kWarpLanes, kWarps);
  return launch(factor_blocks, grid, block, stream, *factors);
}

QUANTLAB_EXPORT int quantlab_solver_descend_in_blocks(const quantlab::Blocks* blocks, const quantlab::Books* books,
                                                      int32_t device, void* stream) {
  using namespace quantlab;
  if (blocks->rows == 0 || blocks->visited == 0) return 0;
  if (blocks->size < 1 || blocks->size > kMaxBlock) return kUnsupported;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return visit_rounder(*books, [&]<typename Rounder>() {
    const dim3 grid((blocks->rows + kBlockRows - 1) / kBlockRows), block(kWarpLanes, kWarps);
    return launch(descend_blocks<Rounder>, grid, block, stream, *blocks, *books);
  });
}
