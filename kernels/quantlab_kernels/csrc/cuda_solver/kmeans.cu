// One-dimensional k-means (`quantlab.solvers.kmeans`), a block of threads per row: starts, Lloyd's algorithm from each of
// them, and the best. Without a histogram one launch, with a histogram two.

#include <intrinsics.cuh>

#include "interface.h"
#include "panel.cuh"

namespace quantlab {
namespace {

constexpr int kMostLevels = kThreads;  // a thread per level
constexpr int kCapRounds = 8;          // as in kmeans.py
constexpr double kCompanding = 3.0;    // as in kmeans.py
constexpr int kWindow = 1024;          // cells of a histogram in shared memory
constexpr int kBatch = 2048;           // values whose cells are in shared memory

__device__ __forceinline__ int thread_of_block() { return threadIdx.y * kWarpLanes + threadIdx.x; }

// What threads of a block hand each other. Every function is called by all of them and begins and ends with a barrier
// where it needs one, so that calls may follow each other.
class Exchange {
 public:
  static constexpr int kDoubles = 2 * kThreads;

  __device__ __forceinline__ explicit Exchange(double* shared) : values_(shared), places_(shared + kThreads) {}

  __device__ __forceinline__ double sum(double value) {
    double total = 0.0;
    combine(sum_over_warp(value), [&](double part) { total += part; });
    return total;
  }

  __device__ __forceinline__ double largest(double value) {
#pragma unroll
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      value = fmax(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    double found = -INFINITY;
    combine(value, [&](double part) { found = fmax(found, part); });
    return found;
  }

  // The place of the largest value, the first of them.
  __device__ __forceinline__ int place_of_largest(double value, int place) {
    values_[thread_of_block()] = value, places_[thread_of_block()] = place;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      const int own = thread_of_block(), other = own + half;
      if (own < half && (values_[other] > values_[own] ||
                         (values_[other] == values_[own] && places_[other] < places_[own]))) {
        values_[own] = values_[other], places_[own] = places_[other];
      }
      __syncthreads();
    }
    const int found = static_cast<int>(places_[0]);
    __syncthreads();
    return found;
  }

  // merge(...merge(merge(first, value of thread 0), value of thread 1)...) over the threads before this one.
  template <typename Merge>
  __device__ __forceinline__ double before(double value, double first, Merge merge) {
    values_[thread_of_block()] = value;
    __syncthreads();
    double result = first;
    for (int other = 0; other < thread_of_block(); ++other) result = merge(result, values_[other]);
    __syncthreads();
    return result;
  }

  __device__ __forceinline__ bool any(bool vote) {
    return largest(vote ? 1.0 : 0.0) > 0;
  }

 private:
  template <typename Take>
  __device__ __forceinline__ void combine(double of_warp, Take take) {
    if (threadIdx.x == 0) values_[threadIdx.y] = of_warp;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) take(values_[warp]);
    __syncthreads();
  }

  double* values_;
  double* places_;
};

// How many of the ascending values are below a limit, or, if `equal` says so, not above it.
template <typename T>
__device__ __forceinline__ int count_below(const T* values, int size, T limit, bool equal) {
  int begin = 0;
  while (size > 0) {
    const int half = size / 2;
    const T value = values[begin + half];
    if (value < limit || (equal && value == limit)) {
      begin += half + 1;
      size -= half + 1;
    } else {
      size = half;
    }
  }
  return begin;
}

// One row: ascending values with their weights, prefix sums of size + 1 entries, and memory of `size` entries each.
struct Ordered {
  const double* values;
  const double* weights;
  const double* mass;
  const double* moment;
  double* share;  // or distances
  double* cumulative;
  int* distinct;
  int size;
};

// Levels in shared memory.
struct Levels {
  double* centers;
  double* best;
  double* sorted;
  int* ends;
  int count;
};

__device__ __forceinline__ void start_uniform(const Ordered& row, const Levels& levels) {
  const double lowest = row.values[0], highest = row.values[row.size - 1];
  const int k = thread_of_block();
  if (k < levels.count) levels.centers[k] = lowest + (highest - lowest) * k / (levels.count - 1);
  __syncthreads();
}

// Quantiles of the cube root of the density, moved apart to distinct values.
__device__ __forceinline__ void start_companded(const Ordered& row, const Levels& levels, Exchange& exchange) {
  const int thread = thread_of_block(), gaps = row.size - 1;
  for (int i = thread; i < gaps; i += kThreads) {
    const double gap = row.values[i + 1] - row.values[i];
    row.share[i] = cbrt(gap * gap * ((row.weights[i] + row.weights[i + 1]) / 2));
  }
  for (int round = 0; round < kCapRounds; ++round) {
    double part = 0.0;
    for (int i = thread; i < gaps; i += kThreads) part += row.share[i];
    const double most = exchange.sum(part) / levels.count;
    for (int i = thread; i < gaps; i += kThreads) row.share[i] = fmin(row.share[i], most);
  }
  __syncthreads();

  // Prefix sums: every thread those of a run of gaps, from where the threads before it end.
  const int run = (gaps + kThreads - 1) / kThreads;
  const int begin = min(thread * run, gaps), end = min(begin + run, gaps);
  double share = 0.0, distinct = 0.0;
  for (int i = begin; i < end; ++i) {
    share += row.share[i];
    distinct += row.values[i + 1] > row.values[i];
  }
  const auto add = [](double a, double b) { return a + b; };
  share = exchange.before(share, 0.0, add);
  distinct = exchange.before(distinct, 0.0, add);
  if (thread == 0) row.cumulative[0] = 0.0, row.distinct[0] = 0;
  for (int i = begin; i < end; ++i) {
    row.cumulative[i + 1] = share += row.share[i];
    row.distinct[i + 1] = static_cast<int>(distinct += row.values[i + 1] > row.values[i]);
  }
  __syncthreads();

  double chosen = -INFINITY;  // less the level, so that it may not descend
  if (thread < levels.count) {
    const double part = (thread + 0.5) / levels.count * row.cumulative[gaps];
    chosen = row.distinct[min(count_below(row.cumulative, row.size, part, false), gaps)] - thread;
  }
  const auto larger = [](double a, double b) { return fmax(a, b); };
  chosen = fmax(exchange.before(chosen, -INFINITY, larger), chosen) + thread;
  if (thread < levels.count) {
    const int latest = row.distinct[gaps] + 1 - levels.count + thread;
    const int place = max(0, min(static_cast<int>(chosen), latest));
    levels.centers[thread] = row.values[count_below(row.distinct, row.size, place, false)];
  }
  __syncthreads();
}

// One level after the other at the value whose error costs most by then.
__device__ __forceinline__ void start_greedy(const Ordered& row, const Levels& levels, Exchange& exchange) {
  const int thread = thread_of_block();
  for (int k = 0; k < levels.count; ++k) {
    double most = -1.0;
    int place = row.size;
    for (int i = thread; i < row.size; i += kThreads) {
      double cost = row.weights[i];
      if (k > 0) {
        const double offset = row.values[i] - levels.sorted[k - 1];
        row.share[i] = k == 1 ? offset * offset : fmin(row.share[i], offset * offset);
        cost *= row.share[i];
      }
      if (cost > most) most = cost, place = i;
    }
    const int costliest = exchange.place_of_largest(most, place);
    if (thread == 0) levels.sorted[k] = row.values[costliest];
    __syncthreads();
  }
  if (thread < levels.count) {
    const double own = levels.sorted[thread];
    int rank = 0;
    for (int k = 0; k < levels.count; ++k) {
      rank += levels.sorted[k] < own || (levels.sorted[k] == own && k < thread);
    }
    levels.centers[rank] = own;
  }
  __syncthreads();
}

// Lloyd's algorithm, until nothing changes or the iterations end.
__device__ __forceinline__ void move_centers(const Ordered& row, const Levels& levels, int iterations,
                                             Exchange& exchange) {
  const int k = thread_of_block();
  bool moved = true;
  for (int iteration = 0; iteration < iterations && moved; ++iteration) {
    if (k < levels.count) {
      const bool last = k + 1 == levels.count;
      levels.ends[k] =
          last ? row.size
               : count_below(row.values, row.size, (levels.centers[k] + levels.centers[k + 1]) / 2, true);
    }
    __syncthreads();
    moved = false;
    if (k < levels.count) {
      const int begin = k == 0 ? 0 : levels.ends[k - 1], end = levels.ends[k];
      const double weight = row.mass[end] - row.mass[begin];
      if (weight > 0) {
        // The difference of prefix sums is rounded relative to the whole sum, which a light cluster may not survive.
        const double smallest = row.values[min(begin, row.size - 1)], largest = row.values[max(end - 1, 0)];
        const double mean = fmin(fmax((row.moment[end] - row.moment[begin]) / weight, smallest), largest);
        moved = mean != levels.centers[k];
        levels.centers[k] = mean;
      }
    }
    moved = exchange.any(moved);
  }
}

__device__ __forceinline__ double squared_error(const Ordered& row, const Levels& levels, Exchange& exchange) {
  double total = 0.0;
  for (int i = thread_of_block(); i < row.size; i += kThreads) {
    // The level nearest to the value: as many midpoints are below it.
    int begin = 0, size = levels.count - 1;
    while (size > 0) {
      const int half = size / 2, k = begin + half;
      if ((levels.centers[k] + levels.centers[k + 1]) / 2 < row.values[i]) {
        begin += half + 1;
        size -= half + 1;
      } else {
        size = half;
      }
    }
    const double offset = row.values[i] - levels.centers[begin];
    total += offset * offset * row.weights[i];
  }
  return exchange.sum(total);
}

// Four blocks per multiprocessor: most of the time, threads wait for memory or for each other.
constexpr int kBlocksAimedAt = 4;

__global__ void __launch_bounds__(kThreads, kBlocksAimedAt) cluster_rows(const Cluster cluster) {
  QUANTLAB_SHARED(double, exchanged, Exchange::kDoubles);
  QUANTLAB_SHARED(double, centers, kMostLevels);
  QUANTLAB_SHARED(double, best, kMostLevels);
  QUANTLAB_SHARED(double, sorted, kMostLevels);
  QUANTLAB_SHARED(int, ends, kMostLevels);
  Exchange exchange(exchanged);
  const int thread = thread_of_block();
  const size_t values = static_cast<size_t>(blockIdx.x) * cluster.size, sums = values + blockIdx.x;
  const Ordered row{cluster.values + values,   cluster.weights + values, cluster.mass + sums,
                    cluster.moment + sums,     cluster.share + values,   cluster.cumulative + values,
                    cluster.distinct + values, cluster.size};
  const Levels levels{centers, best, sorted, ends, cluster.levels};
  double least = INFINITY;
  for (int start = 0; start < (cluster.greedy ? 3 : 2); ++start) {
    if (start == 0) start_companded(row, levels, exchange);
    if (start == 1) start_uniform(row, levels);
    if (start == 2) start_greedy(row, levels, exchange);
    move_centers(row, levels, cluster.iterations, exchange);
    const double error = squared_error(row, levels, exchange);
    if (start == 0 || error < least) {
      least = error;
      if (thread < levels.count) levels.best[thread] = levels.centers[thread];
    }
    __syncthreads();
  }
  if (thread < levels.count) {
    cluster.centers[static_cast<size_t>(blockIdx.x) * levels.count + thread] = levels.best[thread];
  }
}

// A histogram of every row: the means of its cells, ascending, their weights and prefix sums. An empty cell repeats a
// neighbour's value. Every cell belongs to one thread, which adds its values in their order.
__global__ void __launch_bounds__(kThreads, kBlocksAimedAt)
    fill_cells(const float* __restrict__ values, const float* __restrict__ weights, const int64_t weight_stride,
               const int size, const int cells, double* __restrict__ means, double* __restrict__ masses,
               double* __restrict__ mass, double* __restrict__ moment) {
  QUANTLAB_SHARED(double, exchanged, Exchange::kDoubles);
  QUANTLAB_SHARED(double, window_mass, kWindow);
  QUANTLAB_SHARED(double, window_moment, kWindow);
  QUANTLAB_SHARED(int, batch_cell, kBatch);
  Exchange exchange(exchanged);
  const int thread = thread_of_block();
  values += static_cast<size_t>(blockIdx.x) * size;
  if (weights != nullptr) weights += blockIdx.x * weight_stride;
  means += static_cast<size_t>(blockIdx.x) * cells;
  masses += static_cast<size_t>(blockIdx.x) * cells;
  mass += static_cast<size_t>(blockIdx.x) * (cells + 1);
  moment += static_cast<size_t>(blockIdx.x) * (cells + 1);

  double part = 0.0;
  for (int i = thread; i < size; i += kThreads) part += values[i];
  const double middle = exchange.sum(part) / size;
  part = 0.0;
  for (int i = thread; i < size; i += kThreads) part += (values[i] - middle) * (values[i] - middle);
  const double spread = sqrt(exchange.sum(part) / (size - 1));
  part = 0.0;
  for (int i = thread; weights != nullptr && i < size; i += kThreads) part = fmax(part, static_cast<double>(weights[i]));
  const float heaviest = static_cast<float>(exchange.largest(part));
  // Cells widen towards the tails, so that far values share cells among themselves only and take none from the rest.
  const double unit = kCompanding * (spread > 0 ? spread : 1.0);

  for (int window = 0; window < cells; window += kWindow) {
    for (int cell = thread; cell < kWindow; cell += kThreads) window_mass[cell] = window_moment[cell] = 0.0;
    for (int first = 0; first < size; first += kBatch) {
      const int count = min(kBatch, size - first);
      __syncthreads();
      for (int i = thread; i < count; i += kThreads) {
        const double centred = (values[first + i] - middle) / unit;
        const double place = (centred / (1 + fabs(centred)) + 1) * (cells / 2.0);
        batch_cell[i] = min(static_cast<int>(place), cells - 1) - window;
      }
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        const unsigned cell = batch_cell[i];  // huge if it is one of a window before
        if (cell >= kWindow || cell % kThreads != static_cast<unsigned>(thread)) continue;
        const double weight = heaviest > 0 ? weights[first + i] / heaviest : 1.f;
        window_mass[cell] += weight;
        window_moment[cell] += weight * values[first + i];
      }
    }
    for (int cell = thread; cell < kWindow && window + cell < cells; cell += kThreads) {
      masses[window + cell] = window_mass[cell];
      means[window + cell] = window_moment[cell];
    }
  }
  __syncthreads();

  // Every thread takes a run of cells, from where the threads before it end.
  const int run = (cells + kThreads - 1) / kThreads;
  const int begin = min(thread * run, cells), end = min(begin + run, cells);
  double furthest = -INFINITY, smallest = INFINITY;
  for (int cell = begin; cell < end; ++cell) {
    if (masses[cell] > 0) furthest = fmax(furthest, means[cell] / masses[cell]);
    if (masses[cell] > 0) smallest = fmin(smallest, means[cell] / masses[cell]);
  }
  smallest = -exchange.largest(-smallest);
  furthest = exchange.before(furthest, smallest, [](double a, double b) { return fmax(a, b); });
  double weight = 0.0, product = 0.0;
  for (int cell = begin; cell < end; ++cell) {
    if (masses[cell] > 0) furthest = fmax(furthest, means[cell] / masses[cell]);
    means[cell] = furthest;
    weight += masses[cell];
    product += masses[cell] * furthest;
  }
  const auto add = [](double a, double b) { return a + b; };
  weight = exchange.before(weight, 0.0, add);
  product = exchange.before(product, 0.0, add);
  if (thread == 0) mass[0] = moment[0] = 0.0;
  for (int cell = begin; cell < end; ++cell) {
    mass[cell + 1] = weight += masses[cell];
    moment[cell + 1] = product += masses[cell] * means[cell];
  }
}

}  // namespace
}  // namespace quantlab

QUANTLAB_EXPORT int quantlab_solver_cluster(const quantlab::Cluster* cluster, int32_t device, void* stream) {
  using namespace quantlab;
  if (cluster->rows == 0) return 0;
  if (cluster->size < 1 || cluster->levels < 2 || cluster->levels > kMostLevels) return kUnsupported;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return launch(cluster_rows, dim3(cluster->rows), dim3(kWarpLanes, kWarps), stream, *cluster);
}

QUANTLAB_EXPORT int quantlab_solver_fill_cells(const float* values, const float* weights, int64_t weight_stride,
                                               int32_t rows, int32_t size, int32_t cells, double* means, double* masses,
                                               double* mass, double* moment, int32_t device, void* stream) {
  using namespace quantlab;
  if (rows == 0) return 0;
  if (size < 1 || cells < 1) return kUnsupported;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return launch(fill_cells, dim3(rows), dim3(kWarpLanes, kWarps), stream, values, weights, weight_stride, size, cells,
                means, masses, mass, moment);
}
