// The triangular sweep (`quantlab.solvers.sweep`): every target is the weight plus the feedback of all errors behind it.
#include <omp.h>

#include <cstring>
#include <vector>

#include "solver_rounding.h"

namespace solver {
namespace {

struct Sweep {
    const float* weight;     // (rows, inputs)
    const int64_t* columns;  // position in the factor -> input
    const float* feedback;   // (inputs, inputs), transposed: row p holds what the errors of positions > p do to target p
    const float* energy;     // (inputs,), by position: what the squared distance from target to level counts in the loss
    const float* shift;      // (inputs,), by position: what the squared error counts in the loss
    int64_t rows;
    int64_t inputs;
};

// targets[p - start][lane]: the weights of a block, shifted by all errors behind the block.
void block_targets(const Sweep& sweep, const float* tile, int64_t start, int64_t end, float* targets) {
    const float* rows[BLOCK];
    for (int64_t from = start; from < end; from += BLOCK) {
        const int64_t count = std::min(BLOCK, end - from);
        for (int64_t r = 0; r < count; ++r) rows[r] = sweep.feedback + (from + r) * sweep.inputs;
        float* sums = targets + (from - start) * LANES;
        std::memcpy(sums, tile + from * LANES, count * LANES * sizeof(float));
        accumulate(rows, count, tile, end, sweep.inputs, sums);
    }
}

// Round a block from its last position to its first. In `tile`, errors take the place of weights.
void round_block(const Sweep& sweep, const Rounder& round, int64_t start, int64_t end, float* targets, float* tile,
                 uint8_t* codes, double* loss) {
    alignas(ALIGNMENT) float level[LANES], total[LANES] = {};
    for (int64_t p = end - 1; p >= start; --p) {
        float* target = targets + (p - start) * LANES;
        const float* feedback = sweep.feedback + p * sweep.inputs;
        accumulate_rows<1>(&feedback, tile, p + 1, end, target);
        round(sweep.columns[p], target, codes + (p - start) * LANES, level);
        const Floats energy = splat(sweep.energy[p]), shift = splat(sweep.shift[p]);
        float* weights = tile + p * LANES;
        for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
            const Floats distance = load(target + lane) - load(level + lane);
            const Floats error = load(weights + lane) - load(level + lane);
            store(weights + lane, error);
            store(total + lane, load(total + lane) + (energy * distance * distance + shift * error * error));
        }
    }
    for (int64_t lane = 0; lane < LANES; ++lane) loss[lane] += total[lane];
}

// Input -> position in the factor.
std::vector<int64_t> places_of(const Sweep& sweep) {
    std::vector<int64_t> places(sweep.inputs);
    for (int64_t p = 0; p < sweep.inputs; ++p) places[sweep.columns[p]] = p;
    return places;
}

constexpr int64_t TILE_BYTES_PER_INPUT = LANES * (2 * sizeof(float) + 1);

void sweep_tile(const Sweep& sweep, const int64_t* places, const Codebooks& books, int64_t index, char* scratch,
                uint8_t* codes, float* error, double* loss, float* targets) {
    const TileRows rows(index, sweep.rows, sweep.inputs);
    const Rounder round(books, index);
    float* tile = reinterpret_cast<float*>(scratch);
    float* rounded = tile + sweep.inputs * LANES;
    uint8_t* chosen = reinterpret_cast<uint8_t*>(rounded + sweep.inputs * LANES);
    alignas(ALIGNMENT) float block[BLOCK * LANES];
    double total[LANES] = {};
    load_tile(sweep.weight, rows, places, tile);
    for (int64_t end = sweep.inputs; end > 0; end -= BLOCK) {
        const int64_t start = std::max<int64_t>(0, end - BLOCK);
        float* own = targets == nullptr ? block : rounded + start * LANES;
        block_targets(sweep, tile, start, end, own);
        round_block(sweep, round, start, end, own, tile, chosen + start * LANES, total);
    }
    store_tile(chosen, rows, places, codes);
    if (error != nullptr) store_tile(tile, rows, places, error);
    if (targets != nullptr) store_tile(rounded, rows, places, targets);
    std::copy(total, total + rows.count, loss + rows.first);
}

}  // namespace
}  // namespace solver

using namespace solver;

// Bytes of scratch memory for each thread of `solver_sweep`.
SOLVER_API int64_t solver_sweep_scratch(int64_t inputs) { return inputs * TILE_BYTES_PER_INPUT; }

// `error` and `targets` (rows, inputs) may be null.
SOLVER_API void solver_sweep(
    const Sweep* sweep, const Codebooks* books, uint8_t* codes, float* error, double* loss, float* targets,
    char* scratch, int threads) {
    const std::vector<int64_t> places = places_of(*sweep);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t t = 0; t < tile_count(sweep->rows); ++t)
        sweep_tile(*sweep, places.data(), *books, t,
                   scratch + omp_get_thread_num() * solver_sweep_scratch(sweep->inputs), codes, error, loss, targets);
}

// The same step by step, for callers that choose the codebook of a block when the sweep arrives there. `tiles` holds
// inputs * LANES floats for each tile, `targets` (end - start) * LANES.

SOLVER_API void solver_load_tiles(const Sweep* sweep, float* tiles, int threads) {
    const std::vector<int64_t> places = places_of(*sweep);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tile_count(sweep->rows); ++t)
        load_tile(sweep->weight, TileRows(t, sweep->rows, sweep->inputs), places.data(),
                  tiles + t * sweep->inputs * LANES);
}

SOLVER_API void solver_block_targets(const Sweep* sweep, int64_t start, int64_t end, const float* tiles, float* targets,
                                     int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tile_count(sweep->rows); ++t)
        block_targets(*sweep, tiles + t * sweep->inputs * LANES, start, end, targets + t * (end - start) * LANES);
}

// `chosen` holds (end - start) * LANES codes for each tile; `loss` is added to.
SOLVER_API void solver_round_block(const Sweep* sweep, const Codebooks* books, int64_t start, int64_t end, float* tiles,
                                   float* targets, uint8_t* chosen, uint8_t* codes, double* loss, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tile_count(sweep->rows); ++t) {
        const TileRows rows(t, sweep->rows, sweep->inputs);
        const int64_t block = t * (end - start) * LANES;
        double total[LANES] = {};
        round_block(*sweep, Rounder(*books, t), start, end, targets + block, tiles + t * sweep->inputs * LANES,
                    chosen + block, total);
        for (int64_t lane = 0; lane < rows.count; ++lane)
            for (int64_t p = start; p < end; ++p)
                codes[(rows.first + lane) * sweep->inputs + sweep->columns[p]] =
                    chosen[block + (p - start) * LANES + lane];
        for (int64_t lane = 0; lane < rows.count; ++lane) loss[rows.first + lane] += total[lane];
    }
}

SOLVER_API void solver_store_tiles(const Sweep* sweep, const float* tiles, float* error, int threads) {
    const std::vector<int64_t> places = places_of(*sweep);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < tile_count(sweep->rows); ++t)
        store_tile(tiles + t * sweep->inputs * LANES, TileRows(t, sweep->rows, sweep->inputs), places.data(), error);
}
