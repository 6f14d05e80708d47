// Block descent (`quantlab.solvers.blocks`): new codes for a block of inputs at once, kept by the rows whose loss falls.
//
// For a block with Hessian H_BB = L L^T and coupling g = e_R H_RB to the other inputs, the sweep over w_B + g H_BB^-1 has
// the targets
//
//     v_j = w_j + q_j / L_jj^2 + sum_{u > j} e_u F_uj,       F = L / diag L,  F q = g,
//
// in terms of the errors e_u of the weight itself, so that the shifted weight is never formed.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "solver_cholesky.h"
#include "solver_rounding.h"

namespace solver {
namespace {

constexpr int64_t MAX_BLOCK = 64;  // as in solver.py

struct Blocks {
    const float* weight;    // (rows, inputs)
    const float* hessian;   // (inputs, inputs)
    const int64_t* order;   // the inputs of the first block, of the second, ...; within a block the last is rounded first
    const float* within;    // (blocks, size, size): H_BB
    const float* feedback;  // (blocks, size, size): F, unit lower triangular
    const float* upper;     // (blocks, size, size): F^T
    const float* precision; // (visited,), in the same order: 1 / L_jj^2
    int64_t rows;
    int64_t inputs;
    int64_t visited;  // inputs in `order`
    int64_t size;     // of all blocks but the last, which may be smaller
};

struct Tile {
    float* weight;
    float* error;
    uint8_t* codes;
};

// Per input of a block, all lanes.
struct Scratch {
    alignas(ALIGNMENT) float coupling[MAX_BLOCK * LANES];
    alignas(ALIGNMENT) float solved[MAX_BLOCK * LANES];
    alignas(ALIGNMENT) float before[MAX_BLOCK * LANES];
    alignas(ALIGNMENT) float after[MAX_BLOCK * LANES];
    alignas(ALIGNMENT) float slope[MAX_BLOCK * LANES];
    alignas(ALIGNMENT) uint8_t codes[MAX_BLOCK * LANES];
};

// sums += matrix times lanes, for a small matrix (size, size)
void accumulate_small(const float* matrix, int64_t size, int64_t count, const float* lanes, float* sums) {
    const float* rows[MAX_BLOCK];
    for (int64_t i = 0; i < count; ++i) rows[i] = matrix + i * size;
    accumulate(rows, count, lanes, 0, count, sums);
}

// coupling = H_B e - H_BB e_B, solved = F^-1 coupling
void couple(const Blocks& blocks, int64_t first, int64_t count, const Tile& tile, Scratch& scratch) {
    const float* rows[MAX_BLOCK];
    const int64_t* inputs = blocks.order + first;
    const float* feedback = blocks.feedback + first * blocks.size;
    for (int64_t i = 0; i < count; ++i) {
        rows[i] = blocks.hessian + inputs[i] * blocks.inputs;
        std::memcpy(scratch.before + i * LANES, tile.error + inputs[i] * LANES, LANES * sizeof(float));
    }
    std::memset(scratch.coupling, 0, sizeof scratch.coupling);
    std::memset(scratch.slope, 0, sizeof scratch.slope);
    accumulate(rows, count, tile.error, 0, blocks.inputs, scratch.coupling);
    accumulate_small(blocks.within + first * blocks.size, blocks.size, count, scratch.before, scratch.slope);
    for (int64_t i = 0; i < count; ++i) {
        alignas(ALIGNMENT) float known[LANES] = {};
        const float* row = feedback + i * blocks.size;
        accumulate_rows<1>(&row, scratch.solved, 0, i, known);
        for (int64_t lane = i * LANES; lane < (i + 1) * LANES; lane += WIDTH) {
            const Floats coupling = load(scratch.coupling + lane) - load(scratch.slope + lane);
            store(scratch.coupling + lane, coupling);
            store(scratch.solved + lane, coupling - load(known + lane - i * LANES));
        }
    }
}

// The sweep over the block: `after` and `codes`.
void decode(const Blocks& blocks, const Rounder& round, int64_t first, int64_t count, const Tile& tile,
            Scratch& scratch) {
    alignas(ALIGNMENT) float target[LANES], level[LANES];
    for (int64_t i = count - 1; i >= 0; --i) {
        const int64_t input = blocks.order[first + i];
        const float* weight = tile.weight + input * LANES;
        const Floats precision = splat(blocks.precision[first + i]);
        for (int64_t lane = 0; lane < LANES; lane += WIDTH)
            store(target + lane, load(weight + lane) + load(scratch.solved + i * LANES + lane) * precision);
        const float* row = blocks.upper + (first + i) * blocks.size;
        accumulate_rows<1>(&row, scratch.after, i + 1, count, target);
        round(input, target, scratch.codes + i * LANES, level);
        for (int64_t lane = 0; lane < LANES; lane += WIDTH)
            store(scratch.after + i * LANES + lane, load(weight + lane) - load(level + lane));
    }
}

// The difference of the two losses, from the difference of the errors so that nothing cancels:
// (after - before) (H_BB (after + before) + 2 coupling)^T
void compare(const Blocks& blocks, int64_t first, int64_t count, Scratch& scratch, float* change) {
    float* sums = scratch.solved;
    for (int64_t at = 0; at < count * LANES; at += WIDTH) {
        store(sums + at, load(scratch.after + at) + load(scratch.before + at));
        store(scratch.slope + at, 2 * load(scratch.coupling + at));
    }
    accumulate_small(blocks.within + first * blocks.size, blocks.size, count, sums, scratch.slope);
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
        Floats total{};
        for (int64_t at = lane; at < count * LANES; at += LANES)
            total += (load(scratch.after + at) - load(scratch.before + at)) * load(scratch.slope + at);
        store(change + lane, total);
    }
}

void visit_block(const Blocks& blocks, const Rounder& round, int64_t first, Tile& tile, double* gained) {
    Scratch scratch;
    alignas(ALIGNMENT) float change[LANES];
    const int64_t count = std::min(blocks.size, blocks.visited - first);
    couple(blocks, first, count, tile, scratch);
    decode(blocks, round, first, count, tile, scratch);
    compare(blocks, first, count, scratch, change);
    for (int64_t lane = 0; lane < LANES; ++lane) gained[lane] += std::min(change[lane], 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t target = blocks.order[first + i] * LANES;
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const bool better = change[lane] < 0;
            tile.error[target + lane] = better ? scratch.after[i * LANES + lane] : tile.error[target + lane];
            tile.codes[target + lane] = better ? scratch.codes[i * LANES + lane] : tile.codes[target + lane];
        }
    }
}

constexpr double SMALLEST_STEP = 1e-8;  // of the damping

// Where the factors of one block go, each (size, size) but the last; see `Blocks`.
struct BlockFactor {
    float* within;
    float* feedback;
    float* upper;
    float* precision;  // (size,)
};

// H_BB and its factors. While it is not positive definite with `damping` times its mean diagonal added, the damping is
// multiplied by ten from the smallest step on (as in cholesky.py), up to one; false if that is not enough.
bool factor_block(const float* hessian, int64_t inputs, const int64_t* block, int64_t count, int64_t size,
                  double damping, const BlockFactor& factor) {
    double lower[MAX_BLOCK * MAX_BLOCK], mean = 0;
    for (int64_t i = 0; i < count; ++i) mean += double(hessian[block[i] * inputs + block[i]]) / count;
    for (bool solved = false; !solved; damping = std::clamp(10 * damping, SMALLEST_STEP, 1.0)) {
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < count; ++j) {
                factor.within[i * size + j] = hessian[block[i] * inputs + block[j]];
                lower[i * count + j] = factor.within[i * size + j];
            }
            lower[i * count + i] += damping * mean;
        }
        solved = factorise(lower, count);
        if (!solved && damping >= 1) return false;
    }
    for (int64_t j = 0; j < count; ++j) {
        const double pivot = lower[j * count + j];
        factor.precision[j] = static_cast<float>(1 / (pivot * pivot));
        for (int64_t i = j; i < count; ++i) {
            const float entry = static_cast<float>(lower[i * count + j] / pivot);
            factor.feedback[i * size + j] = factor.upper[j * size + i] = entry;
        }
    }
    return true;
}

}  // namespace
}  // namespace solver

using namespace solver;

// Factor all blocks of `order` (visited,), each of `size` inputs but the last. The (blocks, size, size) arrays hold
// zeros. Returns how many blocks are not positive semi-definite.
SOLVER_API int64_t solver_factor_blocks(const float* hessian, int64_t inputs, const int64_t* order, int64_t visited,
                                        int64_t size, double damping, float* within, float* feedback, float* upper,
                                        float* precision, int threads) {
    int64_t failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : failed)
    for (int64_t first = 0; first < visited; first += size) {
        const int64_t at = first * size;
        const BlockFactor factor{within + at, feedback + at, upper + at, precision + first};
        failed += !factor_block(hessian, inputs, order + first, std::min(size, visited - first), size, damping, factor);
    }
    return failed;
}

// Bytes of scratch memory for each thread of `solver_descend_in_blocks`.
SOLVER_API int64_t solver_blocks_scratch(int64_t inputs) { return inputs * LANES * (2 * sizeof(float) + 1); }

// One pass. Changes `codes` and `error`, both (rows, inputs), in place; adds the change of each loss to `gained`.
SOLVER_API void solver_descend_in_blocks(const Blocks* blocks, const Codebooks* books, uint8_t* codes, float* error,
                                         double* gained, char* scratch, int threads) {
    const int64_t inputs = blocks->inputs;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t t = 0; t < tile_count(blocks->rows); ++t) {
        const TileRows rows(t, blocks->rows, inputs);
        float* memory = reinterpret_cast<float*>(scratch + omp_get_thread_num() * solver_blocks_scratch(inputs));
        Tile tile{memory, memory + inputs * LANES, reinterpret_cast<uint8_t*>(memory + 2 * inputs * LANES)};
        double total[LANES] = {};
        load_tile(blocks->weight, rows, nullptr, tile.weight);
        load_tile(error, rows, nullptr, tile.error);
        load_tile(codes, rows, nullptr, tile.codes);
        const Rounder round(*books, t);
        for (int64_t first = 0; first < blocks->visited; first += blocks->size)
            visit_block(*blocks, round, first, tile, total);
        store_tile(tile.error, rows, nullptr, error);
        store_tile(tile.codes, rows, nullptr, codes);
        for (int64_t lane = 0; lane < rows.count; ++lane) gained[rows.first + lane] += total[lane];
    }
}
