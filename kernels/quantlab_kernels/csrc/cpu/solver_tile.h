// Tiles: LANES rows of a matrix, stored input by input, with the lanes of an input side by side.
#pragma once

#include <algorithm>
#include <cstring>

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

template <typename T>
constexpr int SIDE = sizeof(T) == 1 ? 16 : WIDTH;  // of the squares that are transposed at a time

template <typename T>
using Side __attribute__((vector_size(SIDE<T> * sizeof(T)), may_alias)) = T;

// Rows of a square become its columns: each round interleaves the first half of the rows with the second.
template <typename T>
inline void transpose(Side<T>* rows) {
    using Places = decltype(rows[0] < rows[0]);
    Places low, high;
    for (int i = 0; i < SIDE<T>; ++i) {
        low[i] = i / 2 + i % 2 * SIDE<T>;
        high[i] = low[i] + SIDE<T> / 2;
    }
    for (int round = 1; round < SIDE<T>; round *= 2) {
        Side<T> mixed[SIDE<T>];
        for (int i = 0; i < SIDE<T> / 2; ++i) {
            mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + SIDE<T> / 2], low);
            mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + SIDE<T> / 2], high);
        }
        for (int i = 0; i < SIDE<T>; ++i) rows[i] = mixed[i];
    }
}

inline int64_t place_of(const int64_t* places, int64_t input) { return places == nullptr ? input : places[input]; }

// tile[places[j]][lane] = matrix[row of lane][j]; lanes without a row are 0. Without places, j itself.
template <typename T, typename Stored>
void load_tile(const T* matrix, TileRows rows, const int64_t* places, Stored* tile) {
    using StoredSide __attribute__((vector_size(SIDE<T> * sizeof(Stored)), may_alias)) = Stored;
    const int64_t whole = rows.inputs / SIDE<T> * SIDE<T>;
    for (int64_t begin = 0; begin < LANES; begin += SIDE<T>) {
        const T* source = matrix + (rows.first + begin) * rows.inputs;
        const int64_t squares = begin + SIDE<T> <= rows.count ? whole : 0;
        for (int64_t j = 0; j < squares; j += SIDE<T>) {
            Side<T> square[SIDE<T>];
            for (int i = 0; i < SIDE<T>; ++i) std::memcpy(square + i, source + i * rows.inputs + j, sizeof *square);
            transpose<T>(square);
            for (int i = 0; i < SIDE<T>; ++i)
                *reinterpret_cast<StoredSide*>(tile + place_of(places, j + i) * LANES + begin) =
                    __builtin_convertvector(square[i], StoredSide);
        }
        for (int64_t j = squares; j < rows.inputs; ++j)
            for (int64_t lane = begin; lane < begin + SIDE<T>; ++lane)
                tile[place_of(places, j) * LANES + lane] =
                    lane < rows.count ? source[(lane - begin) * rows.inputs + j] : T(0);
    }
}

// The reverse: matrix[row of lane][j] = tile[places[j]][lane].
template <typename T>
void store_tile(const T* tile, TileRows rows, const int64_t* places, T* matrix) {
    const int64_t whole = rows.inputs / SIDE<T> * SIDE<T>;
    for (int64_t begin = 0; begin < rows.count; begin += SIDE<T>) {
        T* target = matrix + (rows.first + begin) * rows.inputs;
        const int64_t lanes = std::min<int64_t>(SIDE<T>, rows.count - begin);
        for (int64_t j = 0; j < whole; j += SIDE<T>) {
            Side<T> square[SIDE<T>];
            for (int i = 0; i < SIDE<T>; ++i)
                square[i] = *reinterpret_cast<const Side<T>*>(tile + place_of(places, j + i) * LANES + begin);
            transpose<T>(square);
            for (int64_t lane = 0; lane < lanes; ++lane)
                std::memcpy(target + lane * rows.inputs + j, square + lane, sizeof *square);
        }
        for (int64_t j = whole; j < rows.inputs; ++j)
            for (int64_t lane = 0; lane < lanes; ++lane)
                target[lane * rows.inputs + j] = tile[place_of(places, j) * LANES + begin + lane];
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
        for (; r + 4 <= count; r += 4) accumulate_rows<4>(rows + r, tile, from, to, sums + r * LANES);
        for (; r + 2 <= count; r += 2) accumulate_rows<2>(rows + r, tile, from, to, sums + r * LANES);
        if (r < count) accumulate_rows<1>(rows + r, tile, from, to, sums + r * LANES);
    }
}

}  // namespace solver
