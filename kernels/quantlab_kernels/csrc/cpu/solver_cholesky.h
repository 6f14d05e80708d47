// The Cholesky factor of a small matrix.
#pragma once

#include <cmath>

#include "solver_vector.h"

namespace solver {

// Turn the lower triangle of a matrix (size, size) into its Cholesky factor; false if it is not positive definite.
inline bool factorise(double* matrix, int64_t size) {
    double column[256];
    for (int64_t c = 0; c < size; ++c) {
        const double pivot = std::sqrt(matrix[c * size + c]);
        if (!(pivot > 0)) return false;
        for (int64_t r = c; r < size; ++r) column[r] = matrix[r * size + c] /= pivot;
        for (int64_t r = c + 1; r < size; ++r)
            for (int64_t k = c + 1; k <= r; ++k) matrix[r * size + k] -= column[r] * column[k];
    }
    return true;
}

}  // namespace solver
