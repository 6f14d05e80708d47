// What the codebook step needs beside the sums of the Hessian: sums by code, look-ups by code, and small systems.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"

namespace quantlab {
namespace {

// Sums in shared memory, one for every lane and level, 32 KiB.
constexpr int kLaneSums = 4096;
constexpr int kMostLevelsAtOnce = kLaneSums / kWarpLanes;

// A warp per row and repeat adds the values of its lanes apart, then over the lanes in a fixed order: no atomics.
__global__ void __launch_bounds__(kThreads)
    sum_by_code(const uint8_t* __restrict__ codes, const float* __restrict__ values, const int rows, const int repeats,
                const int inputs, const int levels, double* __restrict__ sums) {
  QUANTLAB_SHARED(double, shared, kLaneSums);
  const int lane = threadIdx.x;
  const int window = min(levels, kMostLevelsAtOnce);
  double* const own = shared + threadIdx.y * window * kWarpLanes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (item >= static_cast<int64_t>(rows) * repeats) return;
  const uint8_t* const row_codes = codes + item / repeats * inputs;
  const float* const item_values = values + item * inputs;
  for (int first = 0; first < levels; first += window) {
    for (int k = 0; k < window; ++k) own[k * kWarpLanes + lane] = 0.0;
    for (int input = lane; input < inputs; input += kWarpLanes) {
      const int k = row_codes[input] - first;
      if (k >= 0 && k < window) own[k * kWarpLanes + lane] += item_values[input];
    }
    for (int k = 0; k < window && first + k < levels; ++k) {
      const double total = sum_over_warp(own[k * kWarpLanes + lane]);
      if (lane == 0) sums[item * levels + first + k] = total;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    look_up(const uint8_t* __restrict__ codes, const T* __restrict__ table, const int inputs, const int levels,
            T* __restrict__ found) {
  const int row = blockIdx.x;
  const int thread = threadIdx.y * kWarpLanes + threadIdx.x;
  for (int input = thread; input < inputs; input += kThreads) {
    const size_t place = static_cast<size_t>(row) * inputs + input;
    found[place] = table[static_cast<size_t>(row) * levels + codes[place]];
  }
}

// A system of one row, in the memory of its warp. Lanes meet at every `__syncwarp`.
class System {
 public:
  __device__ __forceinline__ System(const float* gram, int levels, double* scratch, double* x)
      : gram_(gram), levels_(levels), matrix_(scratch), scale_(scratch + levels * levels), x_(x) {}

  // Solves for a unit diagonal by scaling and a ridge on it; false, with the right side kept, if that is indefinite.
  __device__ __forceinline__ bool solve(double ridge) {
    for (int k = threadIdx.x; k < levels_; k += kWarpLanes) {
      const double energy = gram_[k * levels_ + k];
      scale_[k] = energy > 0 ? 1 / sqrt(energy) : 0.0;
    }
    __syncwarp();
    for (int r = 0; r < levels_; ++r) {
      for (int c = threadIdx.x; c <= r; c += kWarpLanes) {
        const double diagonal = scale_[r] > 0 ? 1 + ridge : 1.0;
        matrix_[r * levels_ + c] = r == c ? diagonal : scale_[r] * gram_[r * levels_ + c] * scale_[c];
      }
    }
    __syncwarp();
    if (!factorise()) return false;
    for (int k = threadIdx.x; k < levels_; k += kWarpLanes) x_[k] *= scale_[k];
    __syncwarp();
    substitute();
    for (int k = threadIdx.x; k < levels_; k += kWarpLanes) x_[k] *= scale_[k];
    return true;
  }

 private:
  // The lower triangle becomes its Cholesky factor.
  __device__ __forceinline__ bool factorise() {
    for (int c = 0; c < levels_; ++c) {
      const double pivot = sqrt(matrix_[c * levels_ + c]);
      if (!(pivot > 0)) return false;
      __syncwarp();
      for (int r = c + threadIdx.x; r < levels_; r += kWarpLanes) matrix_[r * levels_ + c] /= pivot;
      __syncwarp();
      for (int r = c + 1 + threadIdx.x; r < levels_; r += kWarpLanes) {
        const double factor = matrix_[r * levels_ + c];
        for (int k = c + 1; k <= r; ++k) matrix_[r * levels_ + k] -= factor * matrix_[k * levels_ + c];
      }
      __syncwarp();
    }
    return true;
  }

  // x = (L L^T)^-1 x
  __device__ __forceinline__ void substitute() {
    for (int r = 0; r < levels_; ++r) {
      const double solved = x_[r] / matrix_[r * levels_ + r];
      __syncwarp();
      if (threadIdx.x == 0) x_[r] = solved;
      for (int k = r + 1 + threadIdx.x; k < levels_; k += kWarpLanes) x_[k] -= matrix_[k * levels_ + r] * solved;
      __syncwarp();
    }
    for (int r = levels_ - 1; r >= 0; --r) {
      const double solved = x_[r] / matrix_[r * levels_ + r];
      __syncwarp();
      if (threadIdx.x == 0) x_[r] = solved;
      for (int k = threadIdx.x; k < r; k += kWarpLanes) x_[k] -= matrix_[r * levels_ + k] * solved;
      __syncwarp();
    }
  }

  const float* gram_;
  int levels_;
  double* matrix_;
  double* scale_;
  double* x_;
};

// Left alone, the compiler would save registers and keep values in local memory around its divisions.
__global__ void __launch_bounds__(kThreads, 1)
    solve_rows(const float* __restrict__ gram, const int rows, const int levels, const double ridge,
               const double growth, const int attempts, double* solution, double* scratch,
               uint8_t* __restrict__ failed) {
  const int row = blockIdx.x * kWarps + threadIdx.y;
  if (row >= rows) return;
  const size_t size = levels;
  System system(gram + row * size * size, levels, scratch + row * size * (size + 1), solution + row * size);
  double strength = ridge;
  bool solved = false;
  for (int attempt = 0; attempt < attempts && !solved; ++attempt, strength *= growth) {
    solved = system.solve(strength);
    __syncwarp();
  }
  if (threadIdx.x == 0) failed[row] = !solved;
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_sums_by_code(const uint8_t* codes, const float* values, int32_t rows,
                                                 int32_t repeats, int32_t inputs, int32_t levels, double* sums,
                                                 int32_t device, void* stream) {
  using namespace quantlab;
  const int64_t items = static_cast<int64_t>(rows) * repeats;
  if (items == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  const int warps = levels > kMostLevelsAtOnce ? 1 : min(kWarps, kMostLevelsAtOnce / levels);
  const dim3 grid(static_cast<unsigned>((items + warps - 1) / warps)), block(kWarpLanes, warps);
  return launch(sum_by_code, grid, block, stream, codes, values, rows, repeats, inputs, levels, sums);
}

QUANTLAB_EXPORT int quantlab_solver_look_up(const uint8_t* codes, const void* table, int32_t rows, int32_t inputs,
                                            int32_t levels, int32_t element_bytes, void* found, int32_t device,
                                            void* stream) {
  using namespace quantlab;
  if (rows == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  const auto run = [&]<typename T>() {
    return launch(look_up<T>, dim3(rows), dim3(kWarpLanes, kWarps), stream, codes, static_cast<const T*>(table),
                  inputs, levels, static_cast<T*>(found));
  };
  if (element_bytes == 1) return run.template operator()<uint8_t>();
  if (element_bytes == 4) return run.template operator()<uint32_t>();
  return kUnsupported;
}

QUANTLAB_EXPORT int quantlab_solver_solve(const float* gram, int32_t rows, int32_t levels, double ridge, double growth,
                                          int32_t attempts, double* solution, double* scratch, uint8_t* failed,
                                          int32_t device, void* stream) {
  using namespace quantlab;
  if (rows == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return launch(solve_rows, dim3((rows + kWarps - 1) / kWarps), dim3(kWarpLanes, kWarps), stream, gram, rows, levels,
                ridge, growth, attempts, solution, scratch, failed);
}
