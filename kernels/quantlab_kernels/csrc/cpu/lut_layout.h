// Tiles: the layout of codes that the vector kernels of the CPU read, for codes of 2, 3 and 4 bits.
//
// Eight rows make a tile row: as many as the kernel works on at once. Along the columns it is cut into blocks of 256
// (2 bits), 512 (3 bits) or 128 codes (4 bits), and the blocks of its rows lie next to each other, so that the kernel
// reads one sequential stream. A block is one vector of 64 bytes, three with 3 bits, seen as 32 lanes of 16 bits.
// A slice is 32 neighbouring columns, one per lane: column 32 j + h of a block is field j of lane h.
// Fields lie side by side from the low bits of the lane. With 3 bits, a lane of each vector holds five fields,
// and the highest bits of the three vectors make the sixteenth.
// Rows and columns are padded with zeros.

#pragma once

#include <cstdint>

namespace {

constexpr int SLICE = 32;         // columns
constexpr int VECTOR_WORDS = 16;  // words of 32 bits in 64 bytes
constexpr int TILE_ROWS = 8;

template <int BITS>
struct Block {
    static constexpr int VECTORS = BITS == 3 ? 3 : 1;
    static constexpr int WORDS = VECTORS * VECTOR_WORDS;
    static constexpr int SLICES = BITS == 3 ? 16 : 16 / BITS;
    static constexpr int COLUMNS = SLICES * SLICE;
};

// Where bit `bit` of field `field` is.
struct Place {
    int vector, shift;
};

template <int BITS>
constexpr Place place(int field, int bit) {
    if (BITS != 3) return {0, BITS * field + bit};
    if (field == 15) return {bit, 15};
    return {field / 5, 3 * (field % 5) + bit};
}

constexpr int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

}  // namespace
