// Vector operations of the tiled kernels with AVX-512. `lut_avx2.h` has the same ones for AVX2.

#pragma once

#include <immintrin.h>

#include "lut_layout.h"
#include "lut_numbers.h"

namespace {

using Floats = __m512;
using Sixteen = __m512;  // sixteen numbers for a codebook
using Words = __m512i;

constexpr int LANES = 16;
constexpr int HALVES = 1;  // registers that a vector of codes takes

// Without the assembly the compiler reads the words once more for every field. While their line is still on its way
// from memory, each of these reads waits for it.
inline Words load_words(const uint32_t* words) {
    Words loaded = _mm512_loadu_si512(words);
    asm("" : "+v"(loaded));
    return loaded;
}

inline Words shift_right(Words words, int count) { return _mm512_srli_epi32(words, unsigned(count)); }

// The sixteenth field of 3-bit codes from the highest bits of three vectors.
inline Words collect_high_bits(Words a, Words b, Words c) {
    const Words first = _mm512_srli_epi16(a, 15), second = _mm512_srli_epi16(b, 14), third = _mm512_srli_epi16(c, 13);
    constexpr int A_OR_B_AND_C = 0xF8;
    const Words two = _mm512_ternarylogic_epi32(first, second, _mm512_set1_epi16(2), A_OR_B_AND_C);
    return _mm512_ternarylogic_epi32(two, third, _mm512_set1_epi16(4), A_OR_B_AND_C);
}

// Sixteen numbers, those of the codebook repeated, in the precision of x.
template <int BITS>
Floats repeat(const float* levels) {
    if constexpr (BITS == 4) return _mm512_loadu_ps(levels);
    else if constexpr (BITS == 3) return _mm512_broadcast_f32x8(_mm256_loadu_ps(levels));
    else return _mm512_broadcast_f32x4(_mm_loadu_ps(levels));
}

template <int BITS>
Floats repeat(const uint16_t* halves) {
    if constexpr (BITS == 4) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    else if constexpr (BITS == 3)
        return _mm512_cvtph_ps(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
    else return _mm512_cvtph_ps(_mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(halves))));
}

inline Floats grid_levels(Floats codes, float zero, float scale) {
    return _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
}

inline Floats round_to_bfloat16(Floats values) {
    const Words bits = _mm512_castps_si512(values);
    const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Words rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const Words kept = _mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000)));
    return _mm512_mask_mov_ps(_mm512_castsi512_ps(kept), _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), values);
}

inline Floats round_to_float16(Floats values) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

// Products in float32.
struct Single {
    using Value = float;
    using Vector = Floats;
    static constexpr int VALUES = LANES;

    template <int BITS>
    struct Table {
        Floats entries;
    };

    template <int BITS>
    static Table<BITS> table(Floats levels) {
        return {levels};
    }

    // vpermps reads the low four bits of every word.
    template <int BITS>
    static Vector look_up(const Table<BITS>& table, Words codes, int shift) {
        return _mm512_permutexvar_ps(shift ? shift_right(codes, shift) : codes, table.entries);
    }

    static Vector load(const Value* values) { return _mm512_loadu_ps(values); }
    static void store(Value* values, Vector vector) { _mm512_storeu_ps(values, vector); }
    static Floats multiply_add(Floats sum, Vector weights, Vector x) { return _mm512_fmadd_ps(weights, x, sum); }
};

#ifdef __AVX512BF16__
#define QUANTLAB_BRAIN

// Products of bfloat16 numbers in pairs, sums in float32.
struct Brain {
    using Value = uint16_t;
    using Vector = Words;
    static constexpr int VALUES = 32;

    template <int BITS>
    struct Table {
        Words entries;
    };

    template <int BITS>
    static Table<BITS> table(Floats levels) {
        return {_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(levels)))};
    }

    // vpermw reads the low five bits of every half word; the table holds its entries at least twice.
    template <int BITS>
    static Vector look_up(const Table<BITS>& table, Words codes, int shift) {
        return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(codes, unsigned(shift)) : codes, table.entries);
    }

    static Vector load(const Value* values) { return _mm512_loadu_si512(values); }
    static void store(Value* values, Vector vector) { _mm512_storeu_si512(values, vector); }
    static void store_some(Value* values, Vector vector, __mmask32 some) {
        _mm512_mask_storeu_epi16(values, some, vector);
    }
    static Floats multiply_add(Floats sum, Vector weights, Vector x) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
    }
};
#endif

inline Floats no_floats() { return _mm512_setzero_ps(); }
inline float sum_of(Floats values) { return _mm512_reduce_add_ps(values); }

}  // namespace
