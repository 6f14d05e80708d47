// One-dimensional k-means (`quantlab.solvers.kmeans`): starts, Lloyd's algorithm, and the best of them, row by row.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "solver_vector.h"

namespace solver {
namespace {

constexpr int CAP_ROUNDS = 8;        // as in kmeans.py
constexpr double COMPANDING = 3.0;   // as in kmeans.py

// Ascending values with their weights, and prefix sums of size + 1 entries.
struct Ordered {
    const double* values;
    const double* weights;
    const double* mass;
    const double* moment;
    int64_t size;
};

// Per value of a row.
struct Scratch {
    double* values;      // (size,), as are the others unless said otherwise
    double* weights;
    double* mass;        // (size + 1,)
    double* moment;      // (size + 1,)
    double* share;       // and distances
    double* cumulative;
    int64_t* distinct;
    double* centers;     // (levels,)
    int64_t* chosen;     // (levels,)

    static int64_t bytes(int64_t size, int64_t levels) { return 8 * (7 * size + 2 + 2 * levels) + ALIGNMENT; }

    Scratch(char* memory, int64_t size, int64_t levels) {
        double* next = reinterpret_cast<double*>(memory);
        const auto take = [&next](int64_t count) { return (next += count) - count; };
        values = take(size), weights = take(size), mass = take(size + 1), moment = take(size + 1);
        share = take(size), cumulative = take(size), centers = take(levels);
        distinct = reinterpret_cast<int64_t*>(take(size));
        chosen = reinterpret_cast<int64_t*>(take(levels));
    }
};

// The sum of term(0), ..., term(size - 1), in several parts, so that the loop becomes vector code.
template <typename Term>
inline double sum_of(int64_t size, Term term) {
    constexpr int PARTS = 16;
    double parts[PARTS] = {}, total = 0;
    int64_t j = 0;
    for (; j + PARTS <= size; j += PARTS)
        for (int part = 0; part < PARTS; ++part) parts[part] += term(j + part);
    for (; j < size; ++j) parts[0] += term(j);
    for (double part : parts) total += part;
    return total;
}

// x^(1/3) for x >= 0, by a guess from the exponent and Newton's method, so that a loop over it becomes vector code.
inline double cube_root(double x) {
    const double base = std::max(x, 1e-300);
    int64_t bits;
    std::memcpy(&bits, &base, sizeof bits);
    // A third of the upper half of the bits: exponent, and a piece of the mantissa.
    const uint32_t upper = static_cast<uint32_t>(static_cast<uint64_t>(bits) >> 32);
    bits = static_cast<int64_t>(static_cast<uint64_t>(upper / 3 + 715094163u) << 32);
    double root;
    std::memcpy(&root, &bits, sizeof root);
    for (int i = 0; i < 4; ++i) root = root - (root - base / (root * root)) / 3;
    return x > 0 ? root : 0;
}

void start_uniform(const Ordered& row, int64_t levels, double* centers) {
    const double lowest = row.values[0], highest = row.values[row.size - 1];
    for (int64_t k = 0; k < levels; ++k) centers[k] = lowest + (highest - lowest) * k / (levels - 1);
}

void start_companded(const Ordered& row, int64_t levels, Scratch& scratch, double* centers) {
    const int64_t gaps = row.size - 1;
    for (int64_t i = 0; i < gaps; ++i) {
        const double gap = row.values[i + 1] - row.values[i];
        scratch.share[i] = cube_root(gap * gap * ((row.weights[i] + row.weights[i + 1]) / 2));
    }
    for (int round = 0; round < CAP_ROUNDS; ++round) {
        const double total = sum_of(gaps, [&](int64_t i) { return scratch.share[i]; });
        for (int64_t i = 0; i < gaps; ++i) scratch.share[i] = std::min(scratch.share[i], total / levels);
    }
    scratch.cumulative[0] = 0, scratch.distinct[0] = 0;
    for (int64_t i = 0; i < gaps; ++i) {
        scratch.cumulative[i + 1] = scratch.cumulative[i] + scratch.share[i];
        scratch.distinct[i + 1] = scratch.distinct[i] + (row.values[i + 1] > row.values[i]);
    }
    double* cumulative_end = scratch.cumulative + row.size;
    int64_t* distinct_end = scratch.distinct + row.size;
    int64_t furthest = -levels;
    for (int64_t k = 0; k < levels; ++k) {
        const double part = (k + 0.5) / levels * scratch.cumulative[gaps];
        const int64_t at = std::lower_bound(scratch.cumulative, cumulative_end, part) - scratch.cumulative;
        furthest = std::max(furthest, scratch.distinct[std::min(at, gaps)] - k);
        const int64_t latest = scratch.distinct[gaps] + 1 - levels + k;
        const int64_t chosen = std::max<int64_t>(0, std::min(furthest + k, latest));
        centers[k] = row.values[std::lower_bound(scratch.distinct, distinct_end, chosen) - scratch.distinct];
    }
}

void start_greedy(const Ordered& row, int64_t levels, Scratch& scratch, double* centers) {
    double* distance = scratch.share;
    int64_t costliest = std::max_element(row.weights, row.weights + row.size) - row.weights;
    std::fill(distance, distance + row.size, HUGE_VAL);
    for (int64_t k = 0; k < levels; ++k) {
        const double center = centers[k] = row.values[costliest];
        double* cost = scratch.cumulative;
        for (int64_t i = 0; i < row.size; ++i) {
            const double offset = row.values[i] - center;
            distance[i] = std::min(distance[i], offset * offset);
            cost[i] = row.weights[i] * distance[i];
        }
        costliest = std::max_element(cost, cost + row.size) - cost;
    }
    std::sort(centers, centers + levels);
}

// One iteration; whether a center moved.
bool move_centers(const Ordered& row, int64_t levels, double* centers) {
    bool moved = false;
    int64_t begin = 0;
    for (int64_t k = 0; k < levels; ++k) {
        // The midpoint to the next center, before that one moves.
        const bool last = k + 1 == levels;
        const double* end_of_row = row.values + row.size;
        const int64_t end =
            last ? row.size
                 : std::upper_bound(row.values, end_of_row, (centers[k] + centers[k + 1]) / 2) - row.values;
        const double weight = row.mass[end] - row.mass[begin];
        if (weight > 0) {
            const double smallest = row.values[std::min(begin, row.size - 1)];
            const double largest = row.values[std::max<int64_t>(end - 1, 0)];
            // The difference of prefix sums is rounded relative to the whole sum, which a light cluster may not survive.
            const double mean = std::min(std::max((row.moment[end] - row.moment[begin]) / weight, smallest), largest);
            moved |= mean != centers[k];
            centers[k] = mean;
        }
        begin = end;
    }
    return moved;
}

double squared_error(const Ordered& row, int64_t levels, const double* centers) {
    double total = 0;
    int64_t i = 0;
    for (int64_t k = 0; k < levels; ++k) {
        const bool last = k + 1 == levels;
        const double edge = last ? HUGE_VAL : (centers[k] + centers[k + 1]) / 2;
        for (; i < row.size && (last || row.values[i] <= edge); ++i) {
            const double offset = row.values[i] - centers[k];
            total += offset * offset * row.weights[i];
        }
    }
    return total;
}

// The best of Lloyd's algorithm from all starts.
void cluster(const Ordered& row, int64_t levels, int64_t iterations, bool greedy, Scratch& scratch, double* best) {
    double least = HUGE_VAL, *centers = scratch.centers;
    for (int start = 0; start < (greedy ? 3 : 2); ++start) {
        if (start == 0) start_companded(row, levels, scratch, centers);
        if (start == 1) start_uniform(row, levels, centers);
        if (start == 2) start_greedy(row, levels, scratch, centers);
        for (int64_t i = 0; i < iterations && move_centers(row, levels, centers); ++i) {}
        const double error = squared_error(row, levels, centers);
        if (start == 0 || error < least) {
            least = error;
            std::copy(centers, centers + levels, best);
        }
    }
}

// The means and total weights of the cells of a histogram, ascending, with prefix sums; an empty cell repeats a
// neighbour's value. `weights` may be null.
void fill_cells(const float* values, const float* weights, int64_t size, int64_t cells, Scratch& scratch) {
    const double middle = sum_of(size, [values](int64_t j) { return double(values[j]); }) / size;
    const double squares = sum_of(size, [=](int64_t j) { return (values[j] - middle) * (values[j] - middle); });
    const double spread = std::sqrt(squares / (size - 1)), unit = COMPANDING * (spread > 0 ? spread : 1);
    float heaviest = 0;
    for (int64_t j = 0; weights != nullptr && j < size; ++j) heaviest = std::max(heaviest, weights[j]);
    std::fill(scratch.weights, scratch.weights + cells, 0.0);
    std::fill(scratch.values, scratch.values + cells, 0.0);
    constexpr int64_t PART = 512;
    int32_t cell[PART];
    for (int64_t first = 0; first < size; first += PART) {
        const int64_t count = std::min(PART, size - first);
        for (int64_t j = 0; j < count; ++j) {
            const double centred = (values[first + j] - middle) / unit;
            const double place = (centred / (1 + std::fabs(centred)) + 1) * (cells / 2.0);
            cell[j] = std::min(static_cast<int32_t>(place), static_cast<int32_t>(cells - 1));
        }
        for (int64_t j = 0; j < count; ++j) {
            const double weight = heaviest > 0 ? weights[first + j] / heaviest : 1.0f;
            scratch.weights[cell[j]] += weight;
            scratch.values[cell[j]] += weight * values[first + j];
        }
    }
    double last = -HUGE_VAL;
    int64_t leading = 0;
    scratch.mass[0] = scratch.moment[0] = 0;
    for (int64_t c = 0; c < cells; ++c) {
        if (scratch.weights[c] > 0) last = std::max(last, scratch.values[c] / scratch.weights[c]);
        else if (last == -HUGE_VAL) ++leading;
        scratch.values[c] = last;
    }
    std::fill(scratch.values, scratch.values + leading, leading < cells ? scratch.values[leading] : 0.0);
    for (int64_t c = 0; c < cells; ++c) {
        scratch.mass[c + 1] = scratch.mass[c] + scratch.weights[c];
        scratch.moment[c + 1] = scratch.moment[c] + scratch.weights[c] * scratch.values[c];
    }
}

}  // namespace
}  // namespace solver

using namespace solver;

// Bytes of scratch memory for each thread, for `size` values or cells.
SOLVER_API int64_t solver_kmeans_scratch(int64_t size, int64_t levels) { return Scratch::bytes(size, levels); }

// values and weights: (rows, size); mass and moment: (rows, size + 1); centers: (rows, levels).
SOLVER_API void solver_cluster(const double* values, const double* weights, const double* mass, const double* moment,
                               int64_t rows, int64_t size, int64_t levels, int64_t iterations, int greedy,
                               double* centers, char* scratch, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        Scratch own(scratch + omp_get_thread_num() * Scratch::bytes(size, levels), size, levels);
        const int64_t sums = row * (size + 1);
        const Ordered ordered{values + row * size, weights + row * size, mass + sums, moment + sums, size};
        cluster(ordered, levels, iterations, greedy, own, centers + row * levels);
    }
}

// The same for values in any order, (rows, size), by way of a histogram. `weights` are null or those of row r at
// weights + r * weight_stride.
SOLVER_API void solver_cluster_in_cells(const float* values, const float* weights, int64_t weight_stride, int64_t rows,
                                        int64_t size, int64_t cells, int64_t levels, int64_t iterations, int greedy,
                                        double* centers, char* scratch, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        Scratch own(scratch + omp_get_thread_num() * Scratch::bytes(cells, levels), cells, levels);
        const float* row_weights = weights == nullptr ? nullptr : weights + row * weight_stride;
        fill_cells(values + row * size, row_weights, size, cells, own);
        cluster({own.values, own.weights, own.mass, own.moment, cells}, levels, iterations, greedy, own,
                centers + row * levels);
    }
}
