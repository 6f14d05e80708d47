// Lloyd's algorithm on ordered values with prefix sums (`quantlab.solvers.kmeans`): all iterations in one launch.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"

namespace quantlab {
namespace {

constexpr int kMostLevels = 256;

// How many of the ascending values are not above a limit.
__device__ __forceinline__ int upper_bound(const double* values, int size, double limit) {
  int begin = 0;
  while (size > 0) {
    const int half = size / 2;
    if (values[begin + half] <= limit) {
      begin += half + 1;
      size -= half + 1;
    } else {
      size = half;
    }
  }
  return begin;
}

// A warp per row, lanes over its levels. Left alone, the compiler would save registers and keep values in local memory
// around its divisions.
__global__ void __launch_bounds__(kThreads, 1)
    move_centers(const double* __restrict__ values, const double* __restrict__ mass, const double* __restrict__ moment,
                 const int rows, const int size, const int levels, const int iterations, double* centers) {
  QUANTLAB_SHARED(int, shared, kWarps * kMostLevels);
  int* const ends = shared + threadIdx.y * kMostLevels;  // of the clusters, in values
  const int row = blockIdx.x * kWarps + threadIdx.y;
  if (row >= rows) return;
  values += static_cast<size_t>(row) * size;
  mass += static_cast<size_t>(row) * (size + 1);
  moment += static_cast<size_t>(row) * (size + 1);
  centers += static_cast<size_t>(row) * levels;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    for (int k = threadIdx.x; k < levels; k += kWarpLanes) {
      ends[k] = k + 1 == levels ? size : upper_bound(values, size, (centers[k] + centers[k + 1]) / 2);
    }
    __syncwarp();
    bool moved = false;
    for (int k = threadIdx.x; k < levels; k += kWarpLanes) {
      const int begin = k == 0 ? 0 : ends[k - 1], end = ends[k];
      const double weight = mass[end] - mass[begin];
      if (!(weight > 0)) continue;
      const double smallest = values[min(begin, size - 1)], largest = values[max(end - 1, 0)];
      const double mean = fmin(fmax((moment[end] - moment[begin]) / weight, smallest), largest);
      moved = moved || mean != centers[k];
      centers[k] = mean;
    }
    if (__ballot_sync(kAllLanes, moved) == 0) return;
    __syncwarp();
  }
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_lloyd(const double* values, const double* mass, const double* moment, int32_t rows,
                                          int32_t size, int32_t levels, int32_t iterations, double* centers,
                                          int32_t device, void* stream) {
  using namespace quantlab;
  if (rows == 0 || size == 0) return 0;
  if (levels > kMostLevels) return kUnsupported;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return launch(move_centers, dim3((rows + kWarps - 1) / kWarps), dim3(kWarpLanes, kWarps), stream, values, mass, moment,
                rows, size, levels, iterations, centers);
}
