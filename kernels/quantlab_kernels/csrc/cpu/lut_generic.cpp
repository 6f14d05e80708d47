// y = x Wᵀ for W in bit planes: every width from 1 to 8 bits, every group size, every machine.
//
// A row of weights is decoded to float and multiplied with all samples. As in `lut_tiled.cpp`, an output is one sum
// over the columns in a fixed order of LANES partial sums, whatever the batch and the number of threads.

#include <array>

#include "lut_finish.h"
#include "lut_levels.h"
#include "lut_memory.h"

namespace {

constexpr int LANES = 16;
constexpr int SAMPLES = 4;              // that share the loads of a row
constexpr int64_t BATCH = 64;           // samples whose x is held as float at once
constexpr int64_t WORD_BITS = 32;
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 17;

// The eight bits of every byte as eight bytes.
constexpr std::array<uint64_t, 256> spread_bytes() {
    std::array<uint64_t, 256> table{};
    for (int byte = 0; byte < 256; ++byte)
        for (int bit = 0; bit < 8; ++bit) table[size_t(byte)] |= uint64_t(byte >> bit & 1) << 8 * bit;
    return table;
}

constexpr auto SPREAD = spread_bytes();

// The codes of one row, one per byte; what lies behind the last is zero.
void unpack_row(const LutMatmul& op, int64_t row, int64_t row_words, uint64_t* codes) {
    for (int64_t word = 0; word < row_words; ++word) {
        uint64_t eights[4] = {};
        for (int bit = 0; bit < op.bits; ++bit) {
            const uint32_t plane = op.codes[(bit * op.out_features + row) * row_words + word];
            for (int byte = 0; byte < 4; ++byte) eights[byte] |= SPREAD[plane >> 8 * byte & 255] << bit;
        }
        std::memcpy(codes + word * 4, eights, sizeof eights);
    }
}

// The weights of one row; what lies behind the last column stays as it is.
void decode_row(const LutMatmul& op, int64_t row, const uint8_t* codes, float* weights) {
    const int64_t group_size = op.in_features / op.groups, levels = int64_t(1) << op.bits;
    for (int64_t group = 0; group < op.groups; ++group, codes += group_size, weights += group_size) {
        if (group_size < levels) {
            for (int64_t column = 0; column < group_size; ++column)
                weights[column] = level_of(op, row, group, codes[column]);
            continue;
        }
        float table[256];
        for (int64_t code = 0; code < levels; ++code) table[code] = level_of(op, row, group, code);
        for (int64_t column = 0; column < group_size; ++column) weights[column] = table[codes[column]];
    }
}

template <int COUNT>
void multiply(const LutMatmul& op, const float* weights, const float* x, int64_t padded, int64_t row, int64_t sample) {
    float sums[COUNT][LANES] = {};
    for (int64_t column = 0; column < padded; column += LANES)
        for (int s = 0; s < COUNT; ++s)
            for (int lane = 0; lane < LANES; ++lane)
                sums[s][lane] += weights[column + lane] * x[s * padded + column + lane];
    for (int s = 0; s < COUNT; ++s) {
        for (int step = LANES / 2; step > 0; step /= 2)
            for (int lane = 0; lane < step; ++lane) sums[s][lane] += sums[s][lane + step];
        finish_output(op, row, sample + s, sums[s][0]);
    }
}

// The samples from `first` on: x is their `count` rows as float, padded with zeros.
void multiply_row(const LutMatmul& op, const float* weights, const float* x, int64_t padded, int64_t row, int64_t first,
                  int64_t count) {
    int64_t s = 0;
    for (; s + SAMPLES <= count; s += SAMPLES) multiply<SAMPLES>(op, weights, x + s * padded, padded, row, first + s);
    for (; s < count; ++s) multiply<1>(op, weights, x + s * padded, padded, row, first + s);
}

bool multiply_batch(const LutMatmul& op, int64_t first, int64_t count, float* x) {
    const int64_t row_words = (op.in_features + WORD_BITS - 1) / WORD_BITS, padded = row_words * WORD_BITS;
    const int64_t products = op.out_features * op.in_features * count;
    const int threads = int(std::clamp<int64_t>(products / PRODUCTS_PER_THREAD, 1, op.threads));
    bool enough_memory = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough_memory)
    {
#pragma omp for schedule(static)
        for (int64_t sample = 0; sample < count; ++sample)
            for (int64_t column = 0; column < padded; ++column) {
                const int64_t from = (first + sample) * op.in_features + column;
                x[sample * padded + column] = column < op.in_features ? read_scalar(op.x, from, op.x_type) : 0;
            }
        const auto codes = aligned_array<uint64_t>(padded / 8);
        const auto weights = aligned_array<float>(padded);
        enough_memory = codes && weights;
        if (enough_memory) std::fill(weights.get(), weights.get() + padded, 0.0f);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < op.out_features; ++row) {
            if (!enough_memory) continue;
            unpack_row(op, row, row_words, codes.get());
            decode_row(op, row, reinterpret_cast<const uint8_t*>(codes.get()), weights.get());
            multiply_row(op, weights.get(), x, padded, row, first, count);
        }
    }
    return enough_memory;
}

}  // namespace

// `codes` are bit planes (bits, out_features, ceil(in_features / 32)).
QUANTLAB_EXPORT int32_t quantlab_lut_matmul(const LutMatmul* op) {
    const int64_t padded = (op->in_features + WORD_BITS - 1) / WORD_BITS * WORD_BITS;
    const auto x = aligned_array<float>(std::min(op->batch, BATCH) * padded);
    if (!x) return OUT_OF_MEMORY;
    for (int64_t first = 0; first < op->batch; first += BATCH)
        if (!multiply_batch(*op, first, std::min(BATCH, op->batch - first), x.get())) return OUT_OF_MEMORY;
    return OK;
}
