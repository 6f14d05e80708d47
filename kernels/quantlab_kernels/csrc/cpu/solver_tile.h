// Tiles: LANES rows of a matrix, stored input by input, with the lanes of an input side by side.
#pragma once

#include <algorithm>

#include "solver_vector.h"

namespace solver {

constexpr int64_t BLOCK = 24;   // inputs that are settled between two products; a multiple of ROWS
constexpr int64_t CHUNK = 64;   // inputs of a product whose lanes stay in the first-level cache, 16 KiB

inline int64_t tile_count(int64_t rows) { return (rows + LANES - 1) / LANES; }

// The rows of a matrix (rows, inputs) that belong to one tile.
struct TileRows {
    int64_t first;
    int64_t count;
    int64_t inputs;

    TileRows(int64_t tile, int64_t rows, int64_t inputs_)
        : first(tile * LANES), count(std::min<int64_t>(LANES, rows - tile * LANES)), inputs(inputs_) {}
};

// tile[p][lane] = matrix[row of lane][order[p]]; lanes without a row are 0. Without an order, p itself.
template <typename T>
void load_tile(const T* matrix, TileRows rows, const int64_t* order, T* tile) {
    constexpr int64_t NEAR = 16;  // rows at a time, so that their cache lines last until they are used up
    for (int64_t begin = 0; begin < LANES; begin += NEAR) {
        const int64_t end = std::min(begin + NEAR, rows.count);
        const T* source = matrix + (rows.first + begin) * rows.inputs;
        for (int64_t p = 0; p < rows.inputs; ++p) {
            const int64_t input = order == nullptr ? p : order[p];
            T* target = tile + p * LANES + begin;
            for (int64_t lane = begin; lane < begin + NEAR; ++lane, ++target)
                *target = lane < end ? source[(lane - begin) * rows.inputs + input] : T(0);
        }
    }
}

// The reverse: matrix[row of lane][order[p]] = tile[p][lane] for `count` positions p from `begin`.
template <typename T>
void store_tile(const T* tile, TileRows rows, const int64_t* order, int64_t begin, int64_t count, T* matrix) {
    for (int64_t lane = 0; lane < rows.count; ++lane) {
        T* target = matrix + (rows.first + lane) * rows.inputs;
        for (int64_t p = begin; p < begin + count; ++p) target[order == nullptr ? p : order[p]] = tile[p * LANES + lane];
    }
}

// sums[r][lane] += sum over u in [begin, end) of rows[r][u] * tile[u][lane]
template <int COUNT>
inline void accumulate_rows(const float* const* rows, const float* tile, int64_t begin, int64_t end, float* sums) {
    for (int64_t lane = 0; lane < LANES; lane += STRIP) {
        Floats totals[COUNT][VECTORS] = {};
        for (int64_t u = begin; u < end; ++u) {
            Floats operand[VECTORS];
            for (int v = 0; v < VECTORS; ++v) operand[v] = load(tile + u * LANES + lane + v * WIDTH);
            for (int r = 0; r < COUNT; ++r) {
                const Floats factor = splat(rows[r][u]);
                for (int v = 0; v < VECTORS; ++v) totals[r][v] = multiply_add(factor, operand[v], totals[r][v]);
            }
        }
        for (int r = 0; r < COUNT; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                float* sum = sums + r * LANES + lane + v * WIDTH;
                store(sum, load(sum) + totals[r][v]);
            }
    }
}

// The same for any number of rows. An entry of `sums` is a sum of sums over CHUNK inputs each, whatever `count` is.
inline void accumulate(const float* const* rows, int64_t count, const float* tile, int64_t begin, int64_t end,
                       float* sums) {
    for (int64_t from = begin; from < end; from += CHUNK) {
        const int64_t to = std::min(from + CHUNK, end);
        int64_t r = 0;
        for (; r + ROWS <= count; r += ROWS) accumulate_rows<ROWS>(rows + r, tile, from, to, sums + r * LANES);
        for (; r + 2 <= count; r += 2) accumulate_rows<2>(rows + r, tile, from, to, sums + r * LANES);
        if (r < count) accumulate_rows<1>(rows + r, tile, from, to, sums + r * LANES);
    }
}

}  // namespace solver
