// One level of a codebook, in the precision of x.

#pragma once

#include "lut_numbers.h"

namespace {

inline float level_of(const LutMatmul& op, int64_t row, int64_t group, int64_t code) {
    const int64_t book = row * op.groups + group;
    if (!op.zero) return rounded_to(read_scalar(op.codebook, (book << op.bits) + code, op.codebook_type), op.x_type);
    const float scale = read_scalar(op.codebook, book, op.codebook_type);
    return rounded_to((float(code) - read_scalar(op.zero, book, op.codebook_type)) * scale, op.x_type);
}

}  // namespace
