// Scalar conversions between float and the two 16-bit types, rounding to nearest even.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "lut_interface.h"

namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bfloat16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // keep NaN a NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__F16C__)
inline float float16_to_float(uint16_t half) { return _cvtsh_ss(half); }
#else
inline float float16_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Scaling by 2**112 moves the exponent to its new bias and makes denormal numbers normal.
    return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000)));
}
#endif

inline uint16_t float_to_float16(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    // Below the smallest normal number the addition of 0.5 rounds at the right place by itself.
    if (magnitude < 0x38800000) return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float read_scalar(const void* values, int64_t index, int32_t type) {
    if (type == FLOAT32) return static_cast<const float*>(values)[index];
    const uint16_t bits = static_cast<const uint16_t*>(values)[index];
    return type == FLOAT16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

inline void write_scalar(void* values, int64_t index, int32_t type, float value) {
    if (type == FLOAT32) static_cast<float*>(values)[index] = value;
    else static_cast<uint16_t*>(values)[index] = type == FLOAT16 ? float_to_float16(value) : float_to_bfloat16(value);
}

// The value as the type would store it.
inline float rounded_to(float value, int32_t type) {
    if (type == FLOAT32) return value;
    return type == FLOAT16 ? float16_to_float(float_to_float16(value)) : bfloat16_to_float(float_to_bfloat16(value));
}

}  // namespace
