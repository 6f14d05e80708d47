// The C interface of the CPU kernels of `quantlab::lut_matmul`. `cpu.py` mirrors it.

#pragma once

#include <cstdint>

#define QUANTLAB_EXPORT extern "C" __attribute__((visibility("default")))

enum ScalarType : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// y = x Wᵀ + bias, all arrays contiguous. Pointers without a meaning in a call are null.
struct LutMatmul {
    const void* x;                   // (batch, in_features) of x_type
    void* y;                         // (batch, out_features) of x_type
    const uint32_t* codes;           // bit planes or tiles, see the two functions that read them
    const void* codebook;            // (out_features, groups, levels), or the scale (out_features, groups)
    const void* zero;                // (out_features, groups) if the codebook is a scale
    const void* bias;                // (out_features) of x_type
    const int32_t* outlier_offsets;  // (out_features + 1)
    const int32_t* outlier_columns;  // (count)
    const void* outlier_values;      // (count) of outlier_type
    int64_t batch, in_features, out_features, groups;
    int32_t bits;
    int32_t x_type;
    int32_t codebook_type;  // FLOAT32 or FLOAT16, of zero, too
    int32_t outlier_type;   // FLOAT32 or FLOAT16
    int32_t threads;
};

enum Status : int32_t { OK = 0, OUT_OF_MEMORY = 1, NOT_TILED = 2 };
