// Vectors of float, as wide as the instruction set that this file is compiled for.
//
// All code of the solver works on *lanes*: one lane is one output row, and a tile is LANES rows side by side. A lane
// goes through the same operations whatever its neighbours are, so no result depends on how rows share tiles or
// threads.
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define SOLVER_API extern "C" __attribute__((visibility("default")))

namespace solver {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int VECTORS = 4;  // worked on at a time: with ROWS rows, accumulators fill most of the registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int WIDTH = 8;
constexpr int VECTORS = 2;
#else
constexpr int WIDTH = 4;
constexpr int VECTORS = 2;
#endif

constexpr int LANES = 64;
constexpr int ROWS = 6;
constexpr int STRIP = VECTORS * WIDTH;  // lanes that registers hold at a time
constexpr int ALIGNMENT = 64;

typedef float Floats __attribute__((vector_size(4 * WIDTH), may_alias));
typedef double Doubles __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH), may_alias));

inline Floats load(const float* source) { return *reinterpret_cast<const Floats*>(source); }

inline void store(float* target, Floats values) { *reinterpret_cast<Floats*>(target) = values; }

inline Floats splat(float value) { return value - Floats{}; }

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}

inline Floats absolute(Floats values) { return values < 0 ? -values : values; }

}  // namespace solver
