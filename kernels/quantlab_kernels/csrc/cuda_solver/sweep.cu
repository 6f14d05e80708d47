// The triangular sweep (`quantlab.solvers.sweep`): one launch for a layer, or for one block of its positions.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"
#include "rounding.cuh"

namespace quantlab {
namespace {

template <typename Rounder>
__global__ void __launch_bounds__(kThreads) sweep_rows(const Sweep sweep, const Books books) {
  QUANTLAB_SHARED(float, matrix, PanelChunks::kMatrixFloats);
  QUANTLAB_SHARED(float, errors, PanelChunks::kErrorFloats);
  PanelChunks chunks(matrix, errors, sweep.feedback, sweep.feedback_pitch, sweep.behind, sweep.behind_pitch, sweep.end);
  const int lane = threadIdx.x;
  const int first_row = blockIdx.x * kBlockRows + kRows * threadIdx.y;
  Rounder round(books, first_row, sweep.rows);

  // Panels begin at multiples of four, where vectors do; positions before `begin` are left alone.
  const int origin = sweep.begin / kPositions * kPositions;
  for (int panel = origin + (sweep.end - 1 - origin) / kPanel * kPanel; panel >= origin; panel -= kPanel) {
    // From the last chunk behind to the first of the panel; those of the panel itself are rounded in place of a product.
    const auto start = [&](int chunk) {
      chunks.start(chunk, panel + chunk * kChunk, panel, chunk >= kPanelChunks);
    };
    const auto await = [&](int chunk) {
      if (chunk > 0) {
        start(chunk - 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
    };
    int chunk = (sweep.end - 1 - panel) / kChunk;
    start(chunk);
    PanelLane targets = {};
    for (; chunk >= kPanelChunks; --chunk) {
      await(chunk);
      chunks.multiply(chunk, targets);
      __syncthreads();
    }

    // Of a position that has been rounded, the distance from target to level and the error take their place.
    PanelLane values;
    uint32_t codes[kRows] = {};  // a byte per position
#pragma unroll
    for (int j = 0; j < kPositions; ++j) {
      const int position = panel + kPositions * lane + j;
      const bool visited = position >= sweep.begin && position < sweep.end;
      const int64_t input = visited ? sweep.columns[position] : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = first_row + r;
        const bool real = visited && row < sweep.rows;
        values[r][j] = real ? sweep.weight[static_cast<size_t>(row) * sweep.inputs + input] : 0.f;
        const bool given = real && sweep.targets != nullptr;
        targets[r][j] +=
            given ? sweep.targets[static_cast<size_t>(position - sweep.begin) * sweep.rows + row] : values[r][j];
      }
    }
    for (; chunk >= 0; --chunk) {
      await(chunk);
      for (int slot = kOwners - 1; slot >= 0; --slot) {
        const int owner = chunk * kOwners + slot;
#pragma unroll
        for (int j = kPositions - 1; j >= 0; --j) {
          const int position = panel + kPositions * owner + j;
          if (position < sweep.begin || position >= sweep.end) continue;
          if (books.groups > 1) round.enter(static_cast<int>(sweep.columns[position]) / books.group_size);
          float feedback[kPositions], target[kRows], value[kRows], level[kRows];
          int code[kRows];
          chunks.load(chunk, kPositions * slot + j, feedback);
#pragma unroll
          for (int r = 0; r < kRows; ++r) target[r] = __shfl_sync(kAllLanes, targets[r][j], owner);
#pragma unroll
          for (int r = 0; r < kRows; ++r) value[r] = __shfl_sync(kAllLanes, values[r][j], owner);
          round(target, code, level);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float error = value[r] - level[r];
            // Positions that are through keep what they have: for them the feedback is zero.
            add_product(error, feedback, targets[r]);
            if (lane == owner) {
              targets[r][j] = target[r] - level[r];
              values[r][j] = error;
              codes[r] |= static_cast<uint32_t>(code[r]) << 8 * j;
            }
          }
        }
      }
      __syncthreads();
    }

    float loss[kRows] = {};
#pragma unroll
    for (int j = 0; j < kPositions; ++j) {
      const int position = panel + kPositions * lane + j;
      if (position < sweep.begin || position >= sweep.end) continue;
      const int64_t input = sweep.columns[position];
      const float energy = sweep.energy[position], shift = sweep.shift[position];
      store_rows(sweep.behind + position * sweep.behind_pitch + first_row, values[0][j], values[1][j], values[2][j],
                 values[3][j]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float distance = targets[r][j], error = values[r][j];
        loss[r] += energy * distance * distance + shift * error * error;
        if (first_row + r >= sweep.rows) continue;
        const size_t place = static_cast<size_t>(first_row + r) * sweep.inputs + input;
        sweep.codes[place] = static_cast<uint8_t>(codes[r] >> 8 * j);
        sweep.error[place] = error;
        if (sweep.rounded != nullptr) sweep.rounded[place] = distance + (sweep.weight[place] - error);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const double total = sum_over_warp(loss[r]);
      if (lane == 0 && first_row + r < sweep.rows) sweep.loss[first_row + r] += total;
    }
    // The errors of this panel are copied for the next ones by other threads.
    __syncthreads();
  }
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_sweep(const quantlab::Sweep* sweep, const quantlab::Books* books, int32_t device,
                                          void* stream) {
  using namespace quantlab;
  if (sweep->rows == 0 || sweep->begin >= sweep->end) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return visit_rounder(*books, [&]<typename Rounder>() {
    const dim3 grid((sweep->rows + kBlockRows - 1) / kBlockRows), block(kWarpLanes, kWarps);
    return launch(sweep_rows<Rounder>, grid, block, stream, *sweep, *books);
  });
}
