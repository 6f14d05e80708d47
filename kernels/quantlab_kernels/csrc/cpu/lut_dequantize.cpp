// Tiles to dense weights in bfloat16, for batches so large that the matrix multiplication of PyTorch, which has the
// whole matrix at hand, wins. With other types the kernels that read tiles are faster for every batch.

#include "lut_interface.h"

#if defined(__AVX512BF16__)

#include "lut_decode.h"
#include "lut_memory.h"

namespace {

// Writes the weights of a tile row down as (rows, columns), without the padding of the columns.
struct WriteDense {
    uint16_t* weight;
    int64_t columns;
    uint16_t* at = nullptr;
    __mmask32 inside = 0;

    QUANTLAB_INLINE void fetch(int64_t vector) {
        const int64_t left = std::clamp<int64_t>(columns - vector * Brain::VALUES, 0, Brain::VALUES);
        inside = __mmask32((uint64_t(1) << left) - 1);
        at = weight + vector * Brain::VALUES;
    }

    QUANTLAB_INLINE void take(int row, Words weights) { Brain::store_some(at + row * columns, weights, inside); }
};

void add_outliers(const LutMatmul& op, int64_t row, uint16_t* weight) {
    for (int64_t entry = op.outlier_offsets[row]; entry < op.outlier_offsets[row + 1]; ++entry) {
        uint16_t& value = weight[op.outlier_columns[entry]];
        value = float_to_bfloat16(bfloat16_to_float(value) + read_scalar(op.outlier_values, entry, op.outlier_type));
    }
}

template <int BITS, bool GROUPED>
int32_t dequantize(const LutMatmul& op, int64_t first_row, int64_t rows, uint16_t* weight) {
    const Range all{0, divide_up(op.in_features, Block<BITS>::COLUMNS)};
    bool enough_memory = true;
#pragma omp parallel num_threads(op.threads) reduction(&& : enough_memory)
    {
        const auto tables = aligned_array<Brain::Table<BITS>>(TILE_ROWS * op.groups);
        enough_memory = bool(tables);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < divide_up(rows, TILE_ROWS); ++tile) {
            if (!enough_memory) continue;
            const int64_t row = first_row + tile * TILE_ROWS;
            uint16_t* target = weight + tile * TILE_ROWS * op.in_features;
            const uint32_t* codes = op.codes + row * all.last * Block<BITS>::WORDS;
            make_tables<Brain, BITS>(op, row, tables.get());
            WriteDense write{target, op.in_features};
            visit<Brain, BITS, GROUPED, TILE_ROWS>(op, tables.get(), codes, 0, all, write);
            for (int r = 0; op.outlier_offsets && r < TILE_ROWS && row + r < op.out_features; ++r)
                add_outliers(op, row + r, target + r * op.in_features);
        }
    }
    return enough_memory ? OK : OUT_OF_MEMORY;
}

template <int BITS>
int32_t dequantize_groups(const LutMatmul& op, int64_t first_row, int64_t rows, uint16_t* weight) {
    return op.groups > 1 ? dequantize<BITS, true>(op, first_row, rows, weight)
                         : dequantize<BITS, false>(op, first_row, rows, weight);
}

}  // namespace

#endif  // __AVX512BF16__

// Whether `quantlab_lut_dequantize` can be called: for weights in tiles and x in bfloat16.
QUANTLAB_EXPORT int32_t quantlab_lut_dequantizes() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// Rows of the weight with its outliers, in bfloat16: (rows, in_features). The first row is a multiple of 8, and
// `weight` has room for a multiple of 8 rows. Reads neither x nor bias.
QUANTLAB_EXPORT int32_t quantlab_lut_dequantize(const LutMatmul* op, int64_t first_row, int64_t rows, void* weight) {
#if defined(__AVX512BF16__)
    uint16_t* const target = static_cast<uint16_t*>(weight);
    if (op->bits == 2) return dequantize_groups<2>(*op, first_row, rows, target);
    if (op->bits == 3) return dequantize_groups<3>(*op, first_row, rows, target);
    if (op->bits == 4) return dequantize_groups<4>(*op, first_row, rows, target);
#else
    (void)op, (void)first_row, (void)rows, (void)weight;
#endif
    return NOT_TILED;
}
