// Coordinate descent (`quantlab.solvers.descent`) and the product with a symmetric matrix that it is built on.
//
// The product e H of a block of inputs is formed when the pass arrives there; changes within the block are added as the
// pass goes through it.
#include <omp.h>

#include <cstring>

#include "solver_rounding.h"

namespace solver {
namespace {

enum Mode { DESCEND = 0, ROUND = 1, RELAX = 2 };

struct Descent {
    const float* weight;            // (rows, inputs), not read to relax
    const float* hessian;           // (inputs, inputs)
    const int64_t* order;           // the input visited first, second, ...
    const float* inverse_diagonal;  // (inputs,), 0 for dead inputs
    int64_t rows;
    int64_t inputs;
    int64_t sweeps;
    int64_t mode;
    float closer;  // a new level must be nearer than the present one by this factor
};

// One tile in the course of its passes, input by input in natural order.
struct Tile {
    float* weight;
    float* error;
    uint8_t* codes;
    double* gain;  // (LANES,): how far the loss fell
    bool changed;
};

constexpr int64_t TILE_BYTES_PER_INPUT = LANES * (2 * sizeof(float) + 1);

// What one input's errors become; change[lane] is by how much.
void settle(const Descent& descent, const Rounder* round, int64_t input, const float* excess, Tile& tile, float* change,
            float* gains) {
    alignas(ALIGNMENT) float wanted[LANES], target[LANES], level[LANES];
    alignas(ALIGNMENT) uint8_t candidates[LANES];
    const float* weight = tile.weight + input * LANES;
    float* errors = tile.error + input * LANES;
    uint8_t* codes = tile.codes + input * LANES;
    const Floats inverse = splat(descent.inverse_diagonal[input]);
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
        store(wanted + lane, load(errors + lane) - load(excess + lane) * inverse);
        if (descent.mode != RELAX) store(target + lane, load(weight + lane) - load(wanted + lane));
    }
    if (descent.mode != RELAX) (*round)(input, target, candidates, level);
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
        const Floats present = load(errors + lane), best = load(wanted + lane);
        Floats settled = best;
        if (descent.mode != RELAX) {
            const Floats candidate = load(weight + lane) - load(level + lane);
            const Floats before = absolute(present - best), after = absolute(candidate - best);
            const auto better = descent.mode == ROUND ? before == before : after < splat(descent.closer) * before;
            settled = better ? candidate : present;
            store(gains + lane, load(gains + lane) + (better ? before * before - after * after : Floats{}));
            Bytes& code = *reinterpret_cast<Bytes*>(codes + lane);
            const Bytes taken = __builtin_convertvector(better, Bytes);
            const Bytes merged = (*reinterpret_cast<Bytes*>(candidates + lane) & taken) | (code & ~taken);
            for (int i = 0; i < WIDTH; ++i) tile.changed |= better[i] != 0;
            code = merged;
        }
        store(change + lane, settled - present);
        store(errors + lane, settled);
    }
}

// Visit the inputs order[start], ..., order[end - 1] of a tile.
void visit_block(const Descent& descent, const Rounder* round, int64_t start, int64_t end, Tile& tile) {
    alignas(ALIGNMENT) float excess[BLOCK * LANES] = {}, changes[BLOCK * LANES], gains[LANES];
    const int64_t count = end - start;
    const float* rows[BLOCK];
    for (int64_t i = 0; i < count; ++i) rows[i] = descent.hessian + descent.order[start + i] * descent.inputs;
    accumulate(rows, count, tile.error, 0, descent.inputs, excess);
    for (int64_t i = 0; i < count; ++i) {
        float coupling[BLOCK];
        const float* coupled = coupling;
        for (int64_t k = 0; k < i; ++k) coupling[k] = rows[i][descent.order[start + k]];
        accumulate_rows<1>(&coupled, changes, 0, i, excess + i * LANES);
        const int64_t input = descent.order[start + i];
        std::memset(gains, 0, sizeof gains);
        settle(descent, round, input, excess + i * LANES, tile, changes + i * LANES, gains);
        const double diagonal = rows[i][input];
        for (int64_t lane = 0; lane < LANES; ++lane) tile.gain[lane] += diagonal * gains[lane];
    }
}

void descend_tile(const Descent& descent, const Codebooks* books, int64_t index, char* scratch, uint8_t* codes,
                  float* error, double* gain) {
    const TileRows rows(index, descent.rows, descent.inputs);
    double gains[LANES] = {};
    float* memory = reinterpret_cast<float*>(scratch);
    Tile tile{memory, memory + descent.inputs * LANES, nullptr, gains, true};
    tile.codes = reinterpret_cast<uint8_t*>(tile.error + descent.inputs * LANES);
    load_tile(error, rows, nullptr, tile.error);
    if (descent.mode != RELAX) load_tile(descent.weight, rows, nullptr, tile.weight);
    if (descent.mode == DESCEND) load_tile(codes, rows, nullptr, tile.codes);
    const Rounder round(books == nullptr ? Codebooks{} : *books, index);
    for (int64_t sweep = 0; sweep < descent.sweeps && tile.changed; ++sweep) {
        tile.changed = false;
        for (int64_t start = 0; start < descent.inputs; start += BLOCK)
            visit_block(descent, &round, start, std::min(start + BLOCK, descent.inputs), tile);
    }
    store_tile(tile.error, rows, nullptr, error);
    if (descent.mode != RELAX) store_tile(tile.codes, rows, nullptr, codes);
    std::copy(gains, gains + rows.count, gain + rows.first);
}

void multiply_tile(const float* matrix, const float* hessian, TileRows rows, float* tile, float* product) {
    const float* factors[BLOCK];
    float* sums = tile + rows.inputs * LANES;
    load_tile(matrix, rows, nullptr, tile);
    std::memset(sums, 0, rows.inputs * LANES * sizeof(float));
    for (int64_t start = 0; start < rows.inputs; start += BLOCK) {
        const int64_t count = std::min(BLOCK, rows.inputs - start);
        for (int64_t i = 0; i < count; ++i) factors[i] = hessian + (start + i) * rows.inputs;
        accumulate(factors, count, tile, 0, rows.inputs, sums + start * LANES);
    }
    store_tile(sums, rows, nullptr, product);
}

// total[lane] += the terms of e H e^T that belong to COUNT inputs from `first`: twice the coupling to all inputs before
// each, and its own. In double precision: where inputs are nearly dependent, large terms cancel.
template <int COUNT>
void measure_inputs(const double* tile, const float* hessian, int64_t inputs, int64_t first, double* total) {
    constexpr int64_t HALF = WIDTH / 2, LANES_AT_ONCE = VECTORS * HALF;
    for (int64_t lane = 0; lane < LANES; lane += LANES_AT_ONCE) {
        Doubles sums[COUNT][VECTORS] = {};
        for (int64_t u = 0; u < first; ++u) {
            Doubles operand[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                operand[v] = *reinterpret_cast<const Doubles*>(tile + u * LANES + lane + v * HALF);
            for (int r = 0; r < COUNT; ++r) {
                const Doubles entry = 2.0 * hessian[(first + r) * inputs + u] - Doubles{};
                for (int v = 0; v < VECTORS; ++v) sums[r][v] = multiply_add(entry, operand[v], sums[r][v]);
            }
        }
        for (int r = 0; r < COUNT; ++r) {
            const double* own = tile + (first + r) * LANES + lane;
            for (int s = 0; s <= r; ++s)
                for (int v = 0; v < VECTORS; ++v) {
                    const double factor = (s < r ? 2.0 : 1.0) * hessian[(first + r) * inputs + first + s];
                    const double* other = tile + (first + s) * LANES + lane + v * HALF;
                    sums[r][v] = multiply_add(factor - Doubles{}, *reinterpret_cast<const Doubles*>(other), sums[r][v]);
                }
            for (int v = 0; v < VECTORS; ++v) {
                Doubles& sum = *reinterpret_cast<Doubles*>(total + lane + v * HALF);
                sum = multiply_add(sums[r][v], *reinterpret_cast<const Doubles*>(own + v * HALF), sum);
            }
        }
    }
}

void measure_tile(const float* error, const float* hessian, TileRows rows, double* tile, double* loss) {
    alignas(ALIGNMENT) double total[LANES] = {};
    load_tile(error, rows, nullptr, tile);
    int64_t first = 0;
    for (; first + ROWS <= rows.inputs; first += ROWS) measure_inputs<ROWS>(tile, hessian, rows.inputs, first, total);
    for (; first < rows.inputs; ++first) measure_inputs<1>(tile, hessian, rows.inputs, first, total);
    std::copy(total, total + rows.count, loss + rows.first);
}

}  // namespace
}  // namespace solver

using namespace solver;

// Bytes of scratch memory for each thread of the functions below.
SOLVER_API int64_t solver_descent_scratch(int64_t inputs) {
    return (inputs * TILE_BYTES_PER_INPUT + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

// Changes `codes` and `error`, both (rows, inputs), in place. `books` may be null to relax.
SOLVER_API void solver_descend(const Descent* descent, const Codebooks* books, uint8_t* codes, float* error,
                               double* gain, char* scratch, int threads) {
    const int64_t scratch_bytes = solver_descent_scratch(descent->inputs);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t t = 0; t < tile_count(descent->rows); ++t)
        descend_tile(*descent, books, t, scratch + omp_get_thread_num() * scratch_bytes, codes, error, gain);
}

// product = matrix H, both (rows, inputs), for a symmetric H.
SOLVER_API void solver_multiply(const float* matrix, const float* hessian, int64_t rows, int64_t inputs, float* product,
                                char* scratch, int threads) {
    const int64_t scratch_bytes = solver_descent_scratch(inputs);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t t = 0; t < tile_count(rows); ++t)
        multiply_tile(matrix, hessian, TileRows(t, rows, inputs),
                      reinterpret_cast<float*>(scratch + omp_get_thread_num() * scratch_bytes), product);
}

// loss = the diagonal of error H error^T, (rows,).
SOLVER_API void solver_measure(const float* error, const float* hessian, int64_t rows, int64_t inputs, double* loss,
                               char* scratch, int threads) {
    const int64_t scratch_bytes = solver_descent_scratch(inputs);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t t = 0; t < tile_count(rows); ++t)
        measure_tile(error, hessian, TileRows(t, rows, inputs),
                     reinterpret_cast<double*>(scratch + omp_get_thread_num() * scratch_bytes), loss);
}
