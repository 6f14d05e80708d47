// Lloyd's algorithm on ordered values with prefix sums (`quantlab.solvers.kmeans`).
#include <algorithm>

#include "solver_vector.h"

namespace {

// One iteration for one row; whether a center moved.
bool move_centers(const double* values, const double* mass, const double* moment, int64_t size, int64_t levels,
                  double* centers) {
    bool moved = false;
    int64_t begin = 0;
    for (int64_t k = 0; k < levels; ++k) {
        // The midpoint to the next center, before that one moves.
        const double* end_of_row = values + size;
        const bool last = k + 1 == levels;
        const int64_t end =
            last ? size : std::upper_bound(values, end_of_row, (centers[k] + centers[k + 1]) / 2) - values;
        const double weight = mass[end] - mass[begin];
        if (weight > 0) {
            const double smallest = values[std::min(begin, size - 1)], largest = values[std::max<int64_t>(end - 1, 0)];
            const double mean = std::min(std::max((moment[end] - moment[begin]) / weight, smallest), largest);
            moved |= mean != centers[k];
            centers[k] = mean;
        }
        begin = end;
    }
    return moved;
}

}  // namespace

// Changes `centers` (rows, levels) in place. values: (rows, size), mass and moment: (rows, size + 1).
SOLVER_API void solver_lloyd(const double* values, const double* mass, const double* moment, int64_t rows, int64_t size,
                             int64_t levels, int64_t iterations, double* centers, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < iterations; ++i)
            if (!move_centers(values + row * size, mass + row * (size + 1), moment + row * (size + 1), size, levels,
                              centers + row * levels))
                break;
}
