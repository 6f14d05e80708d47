// Decoding tiles in vector registers.

#pragma once

#include <algorithm>
#include <utility>

#include "lut_interface.h"
#if defined(__AVX512F__)
#include "lut_avx512.h"
#else
#include "lut_avx2.h"
#endif

#define QUANTLAB_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t PREFETCH_WORDS = 8192 / 4;  // ahead of the codes in use

template <class Body, int... INDICES>
QUANTLAB_INLINE void repeat_body(Body&& body, std::integer_sequence<int, INDICES...>) {
    (body(std::integral_constant<int, INDICES>()), ...);
}

// body(0), body(1), ... with compile-time arguments.
template <int COUNT, class Body>
QUANTLAB_INLINE void unrolled(Body&& body) {
    repeat_body(body, std::make_integer_sequence<int, COUNT>());
}

// A block is read in HALVES parts, as wide as a register, each of `VECTORS` vectors. `Single` takes two columns from
// each word of codes, one vector for the lower and one for the upper halves of the words.
template <class P, int BITS>
struct Order {
    static constexpr bool PAIRS = P::VALUES == LANES;
    static constexpr int VECTORS = Block<BITS>::COLUMNS / P::VALUES / HALVES;
    static constexpr int slice(int vector) { return vector / (PAIRS ? 2 : 1); }
    static constexpr int upper(int vector) { return PAIRS ? vector % 2 : 0; }
    // The column, within the block, of lane `lane`.
    static constexpr int column(int half, int vector, int lane) {
        const int in_slice = PAIRS ? half * 2 * LANES + 2 * lane + upper(vector) : lane;
        return slice(vector) * SLICE + in_slice;
    }
};

// Whether the code of the field is scattered over all vectors of a block.
constexpr bool is_scattered(int bits, int field) { return bits == 3 && field == 15; }

// Load the words with the codes of a field, unless they are those of the field before.
template <int BITS, int FIELD, int ROWS>
QUANTLAB_INLINE void load_field(const uint32_t* part, Words (&codes)[ROWS]) {
    constexpr Place at = place<BITS>(FIELD, 0);
    if constexpr (is_scattered(BITS, FIELD)) {
        // Read again from the first cache: words of all vectors and rows do not fit in the registers, and without the
        // assembly the compiler would try.
        asm("" : "+r"(part));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r, part += Block<BITS>::WORDS)
            codes[r] = collect_high_bits(load_words(part), load_words(part + VECTOR_WORDS),
                                         load_words(part + 2 * VECTOR_WORDS));
    } else if constexpr (FIELD == 0 || at.vector != place<BITS>(FIELD - 1, 0).vector) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) codes[r] = load_words(part + r * Block<BITS>::WORDS + at.vector * VECTOR_WORDS);
    }
}

template <class P, int BITS, int VECTOR>
QUANTLAB_INLINE typename P::Vector decode(const typename P::template Table<BITS>& table, Words codes) {
    constexpr int field = Order<P, BITS>::slice(VECTOR), upper = 16 * Order<P, BITS>::upper(VECTOR);
    constexpr int shift = is_scattered(BITS, field) ? 0 : place<BITS>(field, 0).shift;
    return P::template look_up<BITS>(table, codes, shift + upper);
}

// One codebook as the kernel reads it, in the precision of x.
template <class P, int BITS>
QUANTLAB_INLINE typename P::template Table<BITS> make_table(const LutMatmul& op, int64_t row, int64_t group) {
    static constexpr float CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t book = row * op.groups + group;
    Sixteen levels;
    if (op.zero) {
        const float zero = read_scalar(op.zero, book, op.codebook_type);
        levels = grid_levels(repeat<BITS>(CODES), zero, read_scalar(op.codebook, book, op.codebook_type));
    } else if (op.codebook_type == FLOAT32) {
        levels = repeat<BITS>(static_cast<const float*>(op.codebook) + (book << BITS));
    } else {
        levels = repeat<BITS>(static_cast<const uint16_t*>(op.codebook) + (book << BITS));
    }
    if (op.x_type == BFLOAT16 && P::VALUES == LANES) levels = round_to_bfloat16(levels);
    if (op.x_type == FLOAT16) levels = round_to_float16(levels);
    return P::template table<BITS>(levels);
}

// All codebooks of one tile row: (groups, rows of the tile). Rows of padding repeat the last one.
template <class P, int BITS>
void make_tables(const LutMatmul& op, int64_t first_row, typename P::template Table<BITS>* tables) {
    for (int64_t r = 0; r < TILE_ROWS; ++r) {
        const int64_t row = std::min(first_row + r, op.out_features - 1);
        for (int64_t group = 0; group < op.groups; ++group)
            tables[group * TILE_ROWS + r] = make_table<P, BITS>(op, row, group);
    }
}

// Blocks of columns.
struct Range {
    int64_t first, last;
};

// Decode ROWS rows of a tile row from row `from`, and give every vector of weights to the sink, in order of columns.
template <class P, int BITS, bool GROUPED, int ROWS, class Sink>
QUANTLAB_INLINE void visit(const LutMatmul& op, const typename P::template Table<BITS>* tables,
                           const uint32_t* tile_row, int from, Range blocks, Sink& sink) {
    using B = Block<BITS>;
    using O = Order<P, BITS>;
    const int64_t slices_per_group = op.in_features / op.groups / SLICE;
    const auto* const last_group = tables + (op.groups - 1) * TILE_ROWS;
    int64_t next_slice = slices_per_group;
    if constexpr (GROUPED) {
        const int64_t group = std::min(blocks.first * B::SLICES / slices_per_group, op.groups - 1);
        next_slice += group * slices_per_group;
        tables += group * TILE_ROWS;
    }
    typename P::template Table<BITS> current[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) current[r] = tables[from + r];
    const uint32_t* block = tile_row + (blocks.first * TILE_ROWS + from) * B::WORDS;
    for (int64_t index = blocks.first; index < blocks.last; ++index, block += TILE_ROWS * B::WORDS) {
        if (from == 0)  // for all rows: whoever decodes the others comes next
#pragma GCC unroll 8
            for (int line = 0; line < TILE_ROWS * B::VECTORS; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(block + PREFETCH_WORDS + line * VECTOR_WORDS), _MM_HINT_T0);
        const auto* const first_group = tables;
        const int64_t first_next = next_slice;
        for (int half = 0; half < HALVES; ++half) {
            if (GROUPED && half > 0) {  // the same slices once more
                tables = first_group;
                next_slice = first_next;
            }
            Words codes[ROWS];
            unrolled<O::VECTORS>([&](auto constant) __attribute__((always_inline)) {
                constexpr int vector = decltype(constant)::value;
                if constexpr (O::upper(vector) == 0)
                    load_field<BITS, O::slice(vector)>(block + half * LANES, codes);
                if constexpr (GROUPED && O::upper(vector) == 0) {
                    if (index * B::SLICES + O::slice(vector) == next_slice && tables != last_group) {
                        tables += TILE_ROWS;
                        next_slice += slices_per_group;
                    }
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; ++r) current[r] = tables[from + r];
                }
                sink.fetch((index * HALVES + half) * O::VECTORS + vector);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) sink.take(r, decode<P, BITS, vector>(current[r], codes[r]));
            });
        }
    }
}

}  // namespace
