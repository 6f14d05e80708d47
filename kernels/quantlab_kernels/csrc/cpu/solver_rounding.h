// Rounding of one input's targets, lane by lane, to the nearest level of a look-up table or of a uniform grid.
#pragma once

#include "solver_tile.h"

namespace solver {

// The codebooks of all rows. For tables: levels (tiles, groups, count, LANES), ascending, and the midpoints between
// neighbours (tiles, groups, count - 1, LANES). For grids: scale and zero, (tiles, groups, LANES), and no levels.
struct Codebooks {
    const float* levels;
    const float* midpoints;
    const float* scale;
    const float* zero;
    int64_t groups;
    int64_t group_size;
    int64_t count;
};

// A target halfway between two levels goes to the lower one.
inline void round_to_table(const Codebooks& books, int64_t group, const float* targets, uint8_t* codes, float* chosen) {
    const float* levels = books.levels + group * books.count * LANES;
    const float* midpoints = books.midpoints + group * (books.count - 1) * LANES;
    for (int64_t lane = 0; lane < LANES; lane += STRIP) {
        Floats target[VECTORS], level[VECTORS];
        Ints code[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            target[v] = load(targets + lane + v * WIDTH);
            level[v] = load(levels + lane + v * WIDTH);
            code[v] = Ints{};
        }
        for (int64_t k = 1; k < books.count; ++k)
            for (int v = 0; v < VECTORS; ++v) {
                const auto above = target[v] > load(midpoints + (k - 1) * LANES + lane + v * WIDTH);
                level[v] = above ? load(levels + k * LANES + lane + v * WIDTH) : level[v];
                code[v] = above ? code[v] + 1 : code[v];
            }
        for (int v = 0; v < VECTORS; ++v) {
            store(chosen + lane + v * WIDTH, level[v]);
            *reinterpret_cast<Bytes*>(codes + lane + v * WIDTH) = __builtin_convertvector(code[v], Bytes);
        }
    }
}

// Halves go to the even code, like torch.round: adding 2^23 leaves no bits behind the point.
inline void round_to_grid(const Codebooks& books, int64_t group, const float* targets, uint8_t* codes, float* chosen) {
    const Floats largest = splat(static_cast<float>(books.count - 1)), integers = splat(8388608.0f);
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
        const Floats scale = load(books.scale + group * LANES + lane), zero = load(books.zero + group * LANES + lane);
        Floats code = load(targets + lane) / scale + zero;
        code = code > 0 ? code : Floats{};
        code = code < largest ? code : largest;
        code = (code + integers) - integers;
        store(chosen + lane, (code - zero) * scale);
        *reinterpret_cast<Bytes*>(codes + lane) = __builtin_convertvector(__builtin_convertvector(code, Ints), Bytes);
    }
}

// The codebooks of one tile.
class Rounder {
public:
    Rounder(const Codebooks& books, int64_t tile) : books_(books) {
        const int64_t groups = tile * books.groups * LANES;
        if (books.levels != nullptr) {
            books_.levels += groups * books.count;
            books_.midpoints += groups * (books.count - 1);
        } else {
            books_.scale += groups;
            books_.zero += groups;
        }
    }

    void operator()(int64_t input, const float* targets, uint8_t* codes, float* chosen) const {
        const int64_t group = input / books_.group_size;
        if (books_.levels != nullptr)
            round_to_table(books_, group, targets, codes, chosen);
        else
            round_to_grid(books_, group, targets, codes, chosen);
    }

private:
    Codebooks books_;
};

}  // namespace solver
