// What every kernel does with the dense part of an output: add outliers and bias in float, round once.

#pragma once

#include "lut_numbers.h"

namespace {

inline void finish_output(const LutMatmul& op, int64_t row, int64_t sample, float dense) {
    float result = dense;
    if (op.outlier_offsets) {
        float sparse = 0;
        for (int64_t entry = op.outlier_offsets[row]; entry < op.outlier_offsets[row + 1]; ++entry) {
            const float x = read_scalar(op.x, sample * op.in_features + op.outlier_columns[entry], op.x_type);
            sparse += read_scalar(op.outlier_values, entry, op.outlier_type) * x;
        }
        result += sparse;
    }
    if (op.bias) result += read_scalar(op.bias, row, op.x_type);
    write_scalar(op.y, sample * op.out_features + row, op.x_type, result);
}

}  // namespace
