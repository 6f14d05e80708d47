// Bit planes to tiles and back. A word of a bit plane is one bit of one slice.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>

#include "lut_interface.h"
#include "lut_layout.h"

namespace {

template <int BITS>
void row_to_tiles(const uint32_t* planes, int64_t plane_words, int64_t row_words, uint32_t* tile) {
    using B = Block<BITS>;
    for (int64_t block = 0; block * B::SLICES < row_words; ++block, tile += TILE_ROWS * B::WORDS) {
        uint16_t lanes[B::VECTORS][32] = {};
        const int slices = int(std::min<int64_t>(B::SLICES, row_words - block * B::SLICES));
        for (int field = 0; field < slices; ++field)
            for (int bit = 0; bit < BITS; ++bit) {
                const uint32_t word = planes[bit * plane_words + block * B::SLICES + field];
                const Place at = place<BITS>(field, bit);
                for (int lane = 0; lane < 32; ++lane)
                    lanes[at.vector][lane] |= uint16_t((word >> lane & 1) << at.shift);
            }
        std::memcpy(tile, lanes, sizeof lanes);
    }
}

template <int BITS>
void row_from_tiles(const uint32_t* tile, int64_t plane_words, int64_t row_words, uint32_t* planes) {
    using B = Block<BITS>;
    for (int64_t block = 0; block * B::SLICES < row_words; ++block, tile += TILE_ROWS * B::WORDS) {
        uint16_t lanes[B::VECTORS][32];
        std::memcpy(lanes, tile, sizeof lanes);
        const int slices = int(std::min<int64_t>(B::SLICES, row_words - block * B::SLICES));
        for (int field = 0; field < slices; ++field)
            for (int bit = 0; bit < BITS; ++bit) {
                const Place at = place<BITS>(field, bit);
                uint32_t word = 0;
                for (int lane = 0; lane < 32; ++lane) word |= uint32_t(lanes[at.vector][lane] >> at.shift & 1) << lane;
                planes[bit * plane_words + block * B::SLICES + field] = word;
            }
    }
}

template <int BITS, bool TO_TILES>
void convert(uint32_t* planes, uint32_t* tiles, int64_t rows, int64_t columns, int threads) {
    using B = Block<BITS>;
    const int64_t row_words = divide_up(columns, 32), blocks = divide_up(columns, B::COLUMNS);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < divide_up(rows, TILE_ROWS) * TILE_ROWS; ++row) {
        uint32_t* tile = tiles + (row / TILE_ROWS * blocks * TILE_ROWS + row % TILE_ROWS) * B::WORDS;
        if (row >= rows) {
            if (TO_TILES)
                for (int64_t block = 0; block < blocks; ++block)
                    std::memset(tile + block * TILE_ROWS * B::WORDS, 0, B::WORDS * sizeof *tile);
        } else if (TO_TILES) {
            row_to_tiles<BITS>(planes + row * row_words, rows * row_words, row_words, tile);
        } else {
            row_from_tiles<BITS>(tile, rows * row_words, row_words, planes + row * row_words);
        }
    }
}

template <int BITS>
int64_t tile_words(int64_t rows, int64_t columns) {
    using B = Block<BITS>;
    return divide_up(rows, TILE_ROWS) * TILE_ROWS * divide_up(columns, B::COLUMNS) * B::WORDS;
}

// Large pages save the multiplication most of its address translations. Asked for only where a whole one fits inside
// the tiles, so that they occupy no more memory than before; where there are none, nothing is lost.
void ask_for_large_pages(uint32_t* tiles, int64_t words) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = uintptr_t(2) << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(tiles) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t last = reinterpret_cast<uintptr_t>(tiles + words) / PAGE * PAGE;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)tiles, (void)words;
#endif
}

template <bool TO_TILES>
int32_t convert_bits(uint32_t* planes, uint32_t* tiles, int64_t rows, int64_t columns, int32_t bits, int32_t threads) {
    if (bits == 2) convert<2, TO_TILES>(planes, tiles, rows, columns, threads);
    else if (bits == 3) convert<3, TO_TILES>(planes, tiles, rows, columns, threads);
    else if (bits == 4) convert<4, TO_TILES>(planes, tiles, rows, columns, threads);
    else return NOT_TILED;
    return OK;
}

}  // namespace

// Words of the tiles of a matrix.
QUANTLAB_EXPORT int64_t quantlab_lut_tile_words(int64_t rows, int64_t columns, int32_t bits) {
    if (bits == 2) return tile_words<2>(rows, columns);
    if (bits == 3) return tile_words<3>(rows, columns);
    if (bits == 4) return tile_words<4>(rows, columns);
    return 0;
}

QUANTLAB_EXPORT int32_t quantlab_lut_tile(uint32_t* planes, uint32_t* tiles, int64_t rows, int64_t columns,
                                          int32_t bits, int32_t threads) {
    ask_for_large_pages(tiles, quantlab_lut_tile_words(rows, columns, bits));
    return convert_bits<true>(planes, tiles, rows, columns, bits, threads);
}

QUANTLAB_EXPORT int32_t quantlab_lut_untile(uint32_t* planes, uint32_t* tiles, int64_t rows, int64_t columns,
                                            int32_t bits, int32_t threads) {
    return convert_bits<false>(planes, tiles, rows, columns, bits, threads);
}
