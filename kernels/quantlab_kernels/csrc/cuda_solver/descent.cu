// Coordinate descent (`quantlab.solvers.descent`): one launch for all passes over a layer.
//
// The product e H of a panel is formed when the pass arrives there; changes within the panel are added as the pass goes
// through it. Rows of a block end their passes together, when one of them changes nothing.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"
#include "rounding.cuh"

namespace quantlab {
namespace {

// Stands in for a rounder where nothing is rounded.
struct NoRounder {
  __device__ __forceinline__ NoRounder(const Books&, int, int) {}
};

// A panel of one warp on its way through: the positions of a lane.
template <Mode MODE>
struct DescentPanel {
  PanelLane weights, errors;
  uint32_t codes[kRows];     // a byte per position
  float gains[kRows];        // of this lane
  float diagonal[kPositions], inverse[kPositions];
  bool changed;

  __device__ __forceinline__ void load(const Descent& descent, int panel, int first_row) {
    changed = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) codes[r] = 0, gains[r] = 0.f;
#pragma unroll
    for (int j = 0; j < kPositions; ++j) {
      const int position = panel + kPositions * threadIdx.x + j;
      const bool visited = position < descent.inputs;
      const int64_t input = visited ? descent.order[position] : 0;
      diagonal[j] = visited ? descent.diagonal[position] : 0.f;
      inverse[j] = visited ? descent.inverse_diagonal[position] : 0.f;
      float error[kRows] = {};
      if (visited) load_run(descent.error + position * descent.error_pitch + first_row, error);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        errors[r][j] = error[r];
        if constexpr (MODE != Mode::kRelax) {
          const bool real = visited && first_row + r < descent.rows;
          const size_t place = real ? static_cast<size_t>(first_row + r) * descent.inputs + input : 0;
          weights[r][j] = real ? descent.weight[place] : 0.f;
          if (MODE == Mode::kDescend && real) codes[r] |= static_cast<uint32_t>(descent.codes[place]) << 8 * j;
        }
      }
    }
  }

  // Moves position j of lane `owner` to its best level, or to its minimum. `excess` is e H for the present errors,
  // `coupling` the row of H of that position.
  template <typename Rounder>
  __device__ __forceinline__ void visit(Rounder& round, float closer, int owner, int j,
                                        const float (&coupling)[kPositions], PanelLane& excess) {
    float wanted[kRows], target[kRows], level[kRows], change[kRows];
    int code[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) wanted[r] = errors[r][j] - excess[r][j] * inverse[j];
    if constexpr (MODE != Mode::kRelax) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) target[r] = __shfl_sync(kAllLanes, weights[r][j] - wanted[r], owner);
      round(target, code, level);
    }
    const bool own = static_cast<int>(threadIdx.x) == owner;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float present = errors[r][j];
      float settled = wanted[r];
      if constexpr (MODE != Mode::kRelax) {
        const float candidate = weights[r][j] - level[r];
        const float before = fabsf(present - wanted[r]), after = fabsf(candidate - wanted[r]);
        const bool better = MODE == Mode::kRound || after < closer * before;
        settled = better ? candidate : present;
        if (own && better) {
          codes[r] = (codes[r] & ~(0xffu << 8 * j)) | static_cast<uint32_t>(code[r]) << 8 * j;
          gains[r] += diagonal[j] * (before * before - after * after);
          changed = true;
        }
      }
      change[r] = settled - present;
      if (own) errors[r][j] = settled;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) change[r] = __shfl_sync(kAllLanes, change[r], owner);
#pragma unroll
    for (int r = 0; r < kRows; ++r) add_product(change[r], coupling, excess[r]);
  }

  __device__ __forceinline__ void store(const Descent& descent, int panel, int first_row) const {
#pragma unroll
    for (int j = 0; j < kPositions; ++j) {
      const int position = panel + kPositions * threadIdx.x + j;
      if (position >= descent.inputs) continue;
      store_rows(descent.error + position * descent.error_pitch + first_row, errors[0][j], errors[1][j], errors[2][j],
                 errors[3][j]);
      if constexpr (MODE != Mode::kRelax) {
        const int64_t input = descent.order[position];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first_row + r >= descent.rows) continue;
          descent.codes[static_cast<size_t>(first_row + r) * descent.inputs + input] =
              static_cast<uint8_t>(codes[r] >> 8 * j);
        }
      }
    }
    if constexpr (MODE == Mode::kDescend) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const double total = sum_over_warp(gains[r]);
        if (threadIdx.x == 0 && first_row + r < descent.rows) descent.gain[first_row + r] += total;
      }
    }
  }
};

// One block per multiprocessor is aimed at: for two, the compiler would keep a panel in local memory.
template <Mode MODE, typename Rounder>
__global__ void __launch_bounds__(kThreads, 1) descend_rows(const Descent descent, const Books books) {
  QUANTLAB_SHARED(float, matrix, PanelChunks::kMatrixFloats);
  QUANTLAB_SHARED(float, errors, PanelChunks::kErrorFloats);
  QUANTLAB_SHARED(int, changed_by_warp, kWarps);
  PanelChunks chunks(matrix, errors, descent.hessian, descent.hessian_pitch, descent.error, descent.error_pitch,
                descent.inputs);
  const int warp = threadIdx.y;
  const int first_row = blockIdx.x * kBlockRows + kRows * warp;
  Rounder round(books, first_row, descent.rows);

  bool block_changed = true;
  for (int pass = 0; pass < descent.passes && block_changed; ++pass) {
    bool warp_changed = false;
    for (int panel = 0; panel < descent.inputs; panel += kPanel) {
      // First the product with the errors of all inputs, then the rows of the panel once more, to go through it.
      const int products = (descent.inputs + kChunk - 1) / kChunk;
      const int end = products + (min(kPanel, descent.inputs - panel) + kChunk - 1) / kChunk;
      const auto start = [&](int chunk) {
        const bool product = chunk < products;
        chunks.start(chunk, product ? chunk * kChunk : panel + (chunk - products) * kChunk, panel, product);
      };
      const auto await = [&](int chunk) {
        if (chunk + 1 < end) {
          start(chunk + 1);
          wait_copies<1>();
        } else {
          wait_copies<0>();
        }
        __syncthreads();
      };
      int chunk = 0;
      start(chunk);
      PanelLane excess = {};
      for (; chunk < products; ++chunk) {
        await(chunk);
        chunks.multiply(chunk, excess);
        __syncthreads();
      }
      DescentPanel<MODE> state;
      state.load(descent, panel, first_row);
      for (; chunk < end; ++chunk) {
        await(chunk);
        for (int slot = 0; slot < kOwners; ++slot) {
          const int owner = (chunk - products) * kOwners + slot;
#pragma unroll
          for (int j = 0; j < kPositions; ++j) {
            const int position = panel + kPositions * owner + j;
            if (position >= descent.inputs) continue;
            if constexpr (MODE != Mode::kRelax) {
              if (books.groups > 1) round.enter(static_cast<int>(descent.order[position]) / books.group_size);
            }
            float coupling[kPositions];
            chunks.load(chunk, kPositions * slot + j, coupling);
            state.visit(round, descent.closer, owner, j, coupling, excess);
          }
        }
        __syncthreads();
      }
      state.store(descent, panel, first_row);
      warp_changed = warp_changed || state.changed;
      // The errors of this panel are copied for the next one by other threads.
      __syncthreads();
    }
    const bool any = __ballot_sync(kAllLanes, warp_changed) != 0;
    if (threadIdx.x == 0) changed_by_warp[warp] = any;
    __syncthreads();
    block_changed = false;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) block_changed = block_changed || changed_by_warp[other] != 0;
  }
}

template <Mode MODE, typename Rounder>
int run(const Descent& descent, const Books& books, void* stream) {
  const dim3 grid((descent.rows + kBlockRows - 1) / kBlockRows), block(kWarpLanes, kWarps);
  return launch(descend_rows<MODE, Rounder>, grid, block, stream, descent, books);
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_descend(const quantlab::Descent* descent, const quantlab::Books* books,
                                            int32_t device, void* stream) {
  using namespace quantlab;
  if (descent->rows == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  switch (static_cast<Mode>(descent->mode)) {
    case Mode::kDescend:
      return visit_rounder(*books, [&]<typename Rounder>() { return run<Mode::kDescend, Rounder>(*descent, *books, stream); });
    case Mode::kRound:
      return visit_rounder(*books, [&]<typename Rounder>() { return run<Mode::kRound, Rounder>(*descent, *books, stream); });
    case Mode::kRelax:
      return run<Mode::kRelax, NoRounder>(*descent, Books{}, stream);
  }
  return kUnsupported;
}
