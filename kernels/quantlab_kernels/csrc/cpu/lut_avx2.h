// Vector operations of the tiled kernels with AVX2, FMA and F16C. `lut_avx512.h` has the same ones for AVX-512.

#pragma once

#include <immintrin.h>

#include "lut_layout.h"
#include "lut_numbers.h"

namespace {

// Sixteen numbers for a codebook, eight for everything else.
struct Sixteen {
    __m256 low, high;
};

using Floats = __m256;
using Words = __m256i;

constexpr int LANES = 8;
constexpr int HALVES = 2;  // registers that a vector of codes takes

inline Words load_words(const uint32_t* words) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)); }

// The sixteenth field of 3-bit codes from the highest bits of three vectors.
inline Words collect_high_bits(Words a, Words b, Words c) {
    const Words second = _mm256_and_si256(_mm256_srli_epi16(b, 14), _mm256_set1_epi16(2));
    const Words third = _mm256_and_si256(_mm256_srli_epi16(c, 13), _mm256_set1_epi16(4));
    return _mm256_or_si256(_mm256_srli_epi16(a, 15), _mm256_or_si256(second, third));
}

// Sixteen numbers, those of the codebook repeated, in the precision of x.
template <int BITS>
Sixteen repeat(const float* levels) {
    if constexpr (BITS == 4) return {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)};
    const __m128* four = reinterpret_cast<const __m128*>(levels);
    const __m256 eight = BITS == 3 ? _mm256_loadu_ps(levels) : _mm256_broadcast_ps(four);
    return {eight, eight};
}

template <int BITS>
Sixteen repeat(const uint16_t* halves) {
    const __m128i* source = reinterpret_cast<const __m128i*>(halves);
    if constexpr (BITS == 4)
        return {_mm256_cvtph_ps(_mm_loadu_si128(source)), _mm256_cvtph_ps(_mm_loadu_si128(source + 1))};
    const __m128i four = _mm_loadl_epi64(source);
    const __m256 eight = _mm256_cvtph_ps(BITS == 3 ? _mm_loadu_si128(source) : _mm_unpacklo_epi64(four, four));
    return {eight, eight};
}

inline Sixteen grid_levels(Sixteen codes, float zero, float scale) {
    const __m256 shift = _mm256_set1_ps(zero), factor = _mm256_set1_ps(scale);
    const __m256 low = _mm256_sub_ps(codes.low, shift), high = _mm256_sub_ps(codes.high, shift);
    return {_mm256_mul_ps(low, factor), _mm256_mul_ps(high, factor)};
}

inline Floats round_to_bfloat16(Floats values) {
    const Words bits = _mm256_castps_si256(values);
    const Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Words rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const Floats kept = _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(int(0xffff0000))));
    return _mm256_blendv_ps(kept, values, _mm256_cmp_ps(values, values, _CMP_UNORD_Q));
}

inline Sixteen round_to_bfloat16(Sixteen values) {
    return {round_to_bfloat16(values.low), round_to_bfloat16(values.high)};
}

inline Floats round_to_float16(Floats values) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

inline Sixteen round_to_float16(Sixteen values) {
    return {round_to_float16(values.low), round_to_float16(values.high)};
}

// Products in float32.
struct Single {
    using Value = float;
    using Vector = Floats;
    static constexpr int VALUES = LANES;

    template <int BITS>
    struct Table {
        Sixteen entries;
    };

    template <int BITS>
    static Table<BITS> table(Sixteen levels) {
        return {levels};
    }

    // vpermps reads the low three bits of every word; the fourth, moved to the sign, selects the half.
    template <int BITS>
    static Vector look_up(const Table<BITS>& table, Words codes, int shift) {
        const Words low_bits = shift ? _mm256_srli_epi32(codes, shift) : codes;
        const Floats low = _mm256_permutevar8x32_ps(table.entries.low, low_bits);
        if constexpr (BITS != 4) return low;
        const Floats high = _mm256_permutevar8x32_ps(table.entries.high, low_bits);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - shift)));
    }

    static Vector load(const Value* values) { return _mm256_loadu_ps(values); }
    static void store(Value* values, Vector vector) { _mm256_storeu_ps(values, vector); }
    static Floats multiply_add(Floats sum, Vector weights, Vector x) { return _mm256_fmadd_ps(weights, x, sum); }
};

inline Floats no_floats() { return _mm256_setzero_ps(); }

inline float sum_of(Floats values) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
