// What the codebook step needs beside the Gram matrices: sums by code, look-ups by code, and small linear systems.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "solver_cholesky.h"

// sums[row][code] = sum of values[row][j] over inputs j with that code; (rows, levels)
SOLVER_API void solver_sums_by_code(const uint8_t* codes, const float* values, int64_t rows, int64_t inputs,
                                    int64_t levels, double* sums, int threads) {
    constexpr int64_t PARTS = 4;  // so that an addition need not wait for the one before it
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        double parts[PARTS][256];
        for (int64_t part = 0; part < PARTS; ++part) std::fill(parts[part], parts[part] + levels, 0.0);
        const uint8_t* row_codes = codes + row * inputs;
        const float* row_values = values + row * inputs;
        int64_t j = 0;
        for (; j + PARTS <= inputs; j += PARTS)
            for (int64_t part = 0; part < PARTS; ++part) parts[part][row_codes[j + part]] += row_values[j + part];
        for (; j < inputs; ++j) parts[0][row_codes[j]] += row_values[j];
        for (int64_t k = 0; k < levels; ++k)
            sums[row * levels + k] = (parts[0][k] + parts[1][k]) + (parts[2][k] + parts[3][k]);
    }
}

namespace {

template <typename T>
void look_up(const uint8_t* codes, const T* table, int64_t rows, int64_t inputs, int64_t levels, T* values,
             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = row * inputs; j < (row + 1) * inputs; ++j) values[j] = table[row * levels + codes[j]];
}

}  // namespace

// values[row][j] = table[row][codes[row][j]]; table: (rows, levels)
SOLVER_API void solver_select_levels(const uint8_t* codes, const float* table, int64_t rows, int64_t inputs,
                                     int64_t levels, float* values, int threads) {
    look_up(codes, table, rows, inputs, levels, values, threads);
}

SOLVER_API void solver_relabel(const uint8_t* codes, const uint8_t* table, int64_t rows, int64_t inputs, int64_t levels,
                               uint8_t* labels, int threads) {
    look_up(codes, table, rows, inputs, levels, labels, threads);
}

namespace {

// x = (L L^T)^-1 x
void solve_factored(const double* lower, int64_t size, double* x) {
    for (int64_t r = 0; r < size; ++r) {
        for (int64_t c = 0; c < r; ++c) x[r] -= lower[r * size + c] * x[c];
        x[r] /= lower[r * size + r];
    }
    for (int64_t r = size - 1; r >= 0; --r) {
        x[r] /= lower[r * size + r];
        for (int64_t c = 0; c < r; ++c) x[c] -= lower[r * size + c] * x[r];
    }
}

// Solve gram x = right for one row, with a unit diagonal by scaling and a ridge on it.
bool solve_row(const float* gram, int64_t size, double ridge, double* matrix, double* x) {
    double scale[256];
    for (int64_t k = 0; k < size; ++k) scale[k] = gram[k * size + k] > 0 ? 1 / std::sqrt(double(gram[k * size + k])) : 0;
    for (int64_t r = 0; r < size; ++r) {
        for (int64_t c = 0; c < r; ++c) matrix[r * size + c] = scale[r] * gram[r * size + c] * scale[c];
        matrix[r * size + r] = scale[r] > 0 ? 1 + ridge : 1;
    }
    if (!solver::factorise(matrix, size)) return false;
    for (int64_t k = 0; k < size; ++k) x[k] *= scale[k];
    solve_factored(matrix, size, x);
    for (int64_t k = 0; k < size; ++k) x[k] *= scale[k];
    return true;
}

}  // namespace

// Solve gram x = right for every row; `solution` (rows, levels) holds the right sides. Rows whose matrix is indefinite
// try a stronger ridge up to `attempts` times. Returns how many rows could not be solved. `scratch` holds levels^2
// doubles for each thread.
SOLVER_API int64_t solver_solve(const float* gram, int64_t rows, int64_t levels, double ridge, double growth,
                                int64_t attempts, double* solution, double* scratch, int threads) {
    int64_t failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : failed)
    for (int64_t row = 0; row < rows; ++row) {
        double strength = ridge;
        int64_t attempt = 0;
        double* matrix = scratch + omp_get_thread_num() * levels * levels;
        while (attempt < attempts &&
               !solve_row(gram + row * levels * levels, levels, strength, matrix, solution + row * levels)) {
            strength *= growth;
            ++attempt;
        }
        failed += attempt == attempts;
    }
    return failed;
}
