// y = x Wᵀ for W in tiles.
//
// Every output is one sum over the columns in a fixed order, in LANES partial sums that are added at the end. The
// order depends neither on the batch nor on the number of threads, so a sample has the same result, bit for bit,
// alone and among others. A few samples take each weight from the codes to the product in registers; more share a
// panel of decoded weights.
//
// x is repacked once per call into the order of the codes, in batches of up to PANEL_SAMPLES: vectors of VALUES
// numbers, each for all samples of the batch, padded with zeros. What padding codes select thus meets zeros.

#include "lut_interface.h"

#if defined(__AVX2__)

#include <cmath>

#include "lut_decode.h"
#include "lut_finish.h"
#include "lut_levels.h"
#include "lut_memory.h"

namespace {

constexpr bool WIDE = LANES == 16;
constexpr int DIRECT_SAMPLES = WIDE ? 4 : 2;
constexpr int PANEL_ROWS = 4;                     // of a panel that are multiplied at once
constexpr int PANEL_SAMPLES = WIDE ? 6 : 3;       // PANEL_ROWS * PANEL_SAMPLES sums fit in the registers
constexpr int64_t PACKED_BYTES = 1 << 20;         // of x at once: what a core can keep close
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 19;  // below, waking a thread costs more than it brings
constexpr int64_t PANEL_BYTES = 16 << 10;         // of decoded weights at once: half of the first cache

// How many rows multiply their codes with so many samples at once: as many as registers hold the sums of.
constexpr int direct_rows(int samples) { return WIDE ? (samples <= 2 ? 8 : 4) : 4 / samples; }

// Multiplies with the samples of a packed batch.
template <class P, int ROWS, int SAMPLES>
struct Multiply {
    const typename P::Value* x;
    Floats sums[ROWS][SAMPLES];
    typename P::Vector vectors[SAMPLES];

    QUANTLAB_INLINE explicit Multiply(const typename P::Value* packed) : x(packed) {
#pragma GCC unroll 8
        for (auto& row : sums)
#pragma GCC unroll 8
            for (auto& sum : row) sum = no_floats();
    }

    QUANTLAB_INLINE void resume(const Floats* saved) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int s = 0; s < SAMPLES; ++s) sums[r][s] = saved[r * SAMPLES + s];
    }

    QUANTLAB_INLINE void save(Floats* saved) const {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int s = 0; s < SAMPLES; ++s) saved[r * SAMPLES + s] = sums[r][s];
    }

    QUANTLAB_INLINE void fetch(int64_t vector) {
#pragma GCC unroll 8
        for (int s = 0; s < SAMPLES; ++s) {
            vectors[s] = P::load(x + (vector * SAMPLES + s) * P::VALUES);
            // Without this the compiler reloads x for every row and spills the sums instead.
            if constexpr (SAMPLES > 2) asm("" : "+v"(vectors[s]));
        }
    }

    QUANTLAB_INLINE void take(int row, typename P::Vector weights) {
        if constexpr (SAMPLES > 2) asm("" : "+v"(weights));
#pragma GCC unroll 8
        for (int s = 0; s < SAMPLES; ++s) sums[row][s] = P::multiply_add(sums[row][s], weights, vectors[s]);
    }
};

// Writes the weights down: (vectors, rows, VALUES).
template <class P>
struct Write {
    typename P::Value* panel;

    QUANTLAB_INLINE void fetch(int64_t) {}
    QUANTLAB_INLINE void take(int, typename P::Vector weights) {
        P::store(panel, weights);
        panel += P::VALUES;
    }
};

// Where the samples of one packed batch are.
struct Batch {
    int64_t first_sample;
    int width;
    int64_t offset;  // of its values in the packed buffer
};

// body(width of the batch) with a compile-time argument.
template <int MOST, class Body>
void with_width(const Batch& batch, Body&& body) {
    unrolled<MOST>([&](auto constant) {
        constexpr auto width = std::integral_constant<int, constant() + 1>();
        if (batch.width == width()) body(width);
    });
}

template <class P, int BITS>
void pack_vectors(const LutMatmul& op, const Batch& batch, int64_t block, typename P::Value* packed) {
    using B = Block<BITS>;
    using O = Order<P, BITS>;
    typename P::Value* target = packed + batch.offset + block * B::COLUMNS * batch.width;
    const int64_t columns = std::min<int64_t>(B::COLUMNS, op.in_features - block * B::COLUMNS);
    for (int s = 0; s < batch.width; ++s) {
        typename P::Value values[B::COLUMNS] = {};
        const int64_t from = (batch.first_sample + s) * op.in_features + block * B::COLUMNS;
        if (P::VALUES == 2 * LANES || op.x_type == FLOAT32)
            std::memcpy(values, static_cast<const typename P::Value*>(op.x) + from, size_t(columns) * sizeof *values);
        else
            for (int64_t column = 0; column < columns; ++column)
                values[column] = typename P::Value(read_scalar(op.x, from + column, op.x_type));
        for (int half = 0; half < HALVES; ++half)
            unrolled<O::VECTORS>([&](auto constant) {
                constexpr int vector = decltype(constant)::value;
                const int64_t at = (half * O::VECTORS + vector) * batch.width + s;
                for (int lane = 0; lane < P::VALUES; ++lane)
                    target[at * P::VALUES + lane] = values[O::column(half, vector, lane)];
            });
    }
}

// The dense part of one output column by column. Padding multiplies level 0 with zero, which is not zero if that level
// is not finite.
template <int BITS>
float exact_sum(const LutMatmul& op, int64_t row, int64_t sample) {
    using B = Block<BITS>;
    const int64_t blocks = divide_up(op.in_features, B::COLUMNS), group_size = op.in_features / op.groups;
    const uint32_t* codes = op.codes + (row / TILE_ROWS * blocks * TILE_ROWS + row % TILE_ROWS) * B::WORDS;
    float sum = 0;
    for (int64_t column = 0; column < op.in_features; ++column) {
        const uint32_t* block = codes + column / B::COLUMNS * TILE_ROWS * B::WORDS;
        const int lane = int(column % SLICE), field = int(column % B::COLUMNS / SLICE);
        int code = 0;
        for (int bit = 0; bit < BITS; ++bit) {
            const Place at = place<BITS>(field, bit);
            const uint32_t word = block[at.vector * VECTOR_WORDS + lane / 2] >> 16 * (lane % 2);
            code |= int(word >> at.shift & 1) << bit;
        }
        const float x = read_scalar(op.x, sample * op.in_features + column, op.x_type);
        sum += level_of(op, row, column / group_size, code) * x;
    }
    return sum;
}

template <int BITS>
void finish(const LutMatmul& op, int64_t row, int64_t sample, float sum) {
    if (std::isnan(sum) && op.in_features % Block<BITS>::COLUMNS && !std::isfinite(level_of(op, row, op.groups - 1, 0)))
        sum = exact_sum<BITS>(op, row, sample);
    finish_output(op, row, sample, sum);
}

template <int BITS, int ROWS, int SAMPLES>
QUANTLAB_INLINE void finish_all(const LutMatmul& op, const Batch& batch, int64_t row,
                                const Floats (&sums)[ROWS][SAMPLES]) {
    float results[ROWS][SAMPLES];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int s = 0; s < SAMPLES; ++s) results[r][s] = sum_of(sums[r][s]);
    for (int r = 0; r < ROWS && row + r < op.out_features; ++r)
        for (int s = 0; s < SAMPLES; ++s) finish<BITS>(op, row + r, batch.first_sample + s, results[r][s]);
}

template <class P, int BITS, bool GROUPED, int SAMPLES>
void direct(const LutMatmul& op, int64_t first_row, const typename P::template Table<BITS>* tables,
            const uint32_t* tile_row, const Batch& batch, const typename P::Value* packed) {
    constexpr int ROWS = direct_rows(SAMPLES);
    const Range all{0, divide_up(op.in_features, Block<BITS>::COLUMNS)};
    for (int from = 0; from < TILE_ROWS; from += ROWS) {
        Multiply<P, ROWS, SAMPLES> product(packed + batch.offset);
        visit<P, BITS, GROUPED, ROWS>(op, tables, tile_row, from, all, product);
        finish_all<BITS>(op, batch, first_row + from, product.sums);
    }
}

// `panel` points at the first of PANEL_ROWS rows of a panel. Goes on with `sums` where the panel before ended.
template <class P, int SAMPLES>
void multiply_panel(const Batch& batch, int64_t first_vector, int64_t last_vector, const typename P::Value* panel,
                    const typename P::Value* packed, Floats* sums) {
    Multiply<P, PANEL_ROWS, SAMPLES> product(packed + batch.offset);
    if (first_vector > 0) product.resume(sums);
    for (int64_t vector = first_vector; vector < last_vector; ++vector, panel += TILE_ROWS * P::VALUES) {
        product.fetch(vector);
#pragma GCC unroll 8
        for (int r = 0; r < PANEL_ROWS; ++r) product.take(r, P::load(panel + r * P::VALUES));
    }
    product.save(sums);
}

// One pass over the weights for the samples of some packed batches.
template <class P, int BITS, bool GROUPED>
struct Pass {
    using Value = typename P::Value;
    using Table = typename P::template Table<BITS>;
    const LutMatmul& op;
    const Batch* batches;
    int count;
    Value* packed;
    int64_t blocks = divide_up(op.in_features, Block<BITS>::COLUMNS);
    int64_t panel_blocks = PANEL_BYTES / int64_t(sizeof(Value)) / TILE_ROWS / Block<BITS>::COLUMNS;
    static constexpr int64_t SUMS = TILE_ROWS * PANEL_SAMPLES;  // vectors of them per batch

    bool run(int threads) const {
        const int64_t tile_rows = divide_up(op.out_features, TILE_ROWS);
        bool enough_memory = true;
#pragma omp parallel num_threads(threads) reduction(&& : enough_memory)
        {
#pragma omp for collapse(2) schedule(static)
            for (int batch = 0; batch < count; ++batch)
                for (int64_t block = 0; block < blocks; ++block)
                    pack_vectors<P, BITS>(op, batches[batch], block, packed);
            const auto panel = aligned_array<Value>(TILE_ROWS * panel_blocks * Block<BITS>::COLUMNS);
            const auto sums = aligned_array<Floats>(is_direct() ? 0 : count * SUMS);
            const auto tables = aligned_array<Table>(TILE_ROWS * op.groups);
            enough_memory = panel && sums && tables;
#pragma omp for schedule(static)
            for (int64_t tile_row = 0; tile_row < tile_rows; ++tile_row) {
                if (!enough_memory) continue;
                make_tables<P, BITS>(op, tile_row * TILE_ROWS, tables.get());
                tile(tile_row * TILE_ROWS, tables.get(), panel.get(), sums.get());
            }
        }
        return enough_memory;
    }

    bool is_direct() const { return count == 1 && batches[0].width <= DIRECT_SAMPLES; }

    void tile(int64_t row, const Table* tables, Value* panel, Floats* sums) const {
        const uint32_t* codes = op.codes + row * blocks * Block<BITS>::WORDS;
        if (is_direct()) {
            with_width<DIRECT_SAMPLES>(batches[0], [&](auto width) {
                direct<P, BITS, GROUPED, width()>(op, row, tables, codes, batches[0], packed);
            });
            return;
        }
        for (Range range{0, 0}; range.first < blocks; range.first = range.last) {
            range.last = std::min(range.first + panel_blocks, blocks);
            Write<P> write{panel};
            visit<P, BITS, GROUPED, TILE_ROWS>(op, tables, codes, 0, range, write);
            for (int from = 0; from < TILE_ROWS; from += PANEL_ROWS)
                for (int index = 0; index < count; ++index)
                    multiply(batches[index], range, panel + from * P::VALUES, sums_at(sums, index, from));
        }
        for (int from = 0; from < TILE_ROWS; from += PANEL_ROWS)
            for (int index = 0; index < count; ++index)
                finish_panel(batches[index], row + from, sums_at(sums, index, from));
    }

    static Floats* sums_at(Floats* sums, int batch, int from) { return sums + batch * SUMS + from * PANEL_SAMPLES; }

    void multiply(const Batch& batch, Range range, const Value* panel, Floats* sums) const {
        constexpr int64_t PER_BLOCK = HALVES * Order<P, BITS>::VECTORS;
        const int64_t first = range.first * PER_BLOCK, last = range.last * PER_BLOCK;
        with_width<PANEL_SAMPLES>(
            batch, [&](auto width) { multiply_panel<P, width()>(batch, first, last, panel, packed, sums); });
    }

    void finish_panel(const Batch& batch, int64_t row, const Floats* sums) const {
        for (int r = 0; r < PANEL_ROWS && row + r < op.out_features; ++r)
            for (int s = 0; s < batch.width; ++s)
                finish<BITS>(op, row + r, batch.first_sample + s, sum_of(sums[r * batch.width + s]));
    }
};

template <class P, int BITS>
int32_t multiply_all(const LutMatmul& op) {
    constexpr int MAX_BATCHES = 64;
    const int64_t row_values = divide_up(op.in_features, Block<BITS>::COLUMNS) * Block<BITS>::COLUMNS;
    const int64_t row_bytes = row_values * int64_t(sizeof(typename P::Value));
    const int64_t at_once = std::clamp<int64_t>(PACKED_BYTES / row_bytes, PANEL_SAMPLES, MAX_BATCHES * PANEL_SAMPLES);
    const int64_t passes = divide_up(op.batch, at_once);
    const auto packed = aligned_array<typename P::Value>((op.batch / passes + 1) * row_values);
    if (!packed) return OUT_OF_MEMORY;
    for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t first = op.batch * pass / passes, samples = op.batch * (pass + 1) / passes - first;
        Batch batches[MAX_BATCHES];
        const int count = int(divide_up(samples, PANEL_SAMPLES));
        for (int64_t index = 0; index < count; ++index) {
            const int64_t from = samples * index / count, to = samples * (index + 1) / count;
            batches[index] = {first + from, int(to - from), from * row_values};
        }
        const int64_t products = op.out_features * op.in_features * samples;
        const int threads = int(std::clamp<int64_t>(products / PRODUCTS_PER_THREAD, 1, op.threads));
        const bool grouped = op.groups > 1;
        const bool done = grouped ? Pass<P, BITS, true>{op, batches, count, packed.get()}.run(threads)
                                  : Pass<P, BITS, false>{op, batches, count, packed.get()}.run(threads);
        if (!done) return OUT_OF_MEMORY;
    }
    return OK;
}

template <int BITS>
int32_t multiply_type(const LutMatmul& op) {
#ifdef QUANTLAB_BRAIN
    if (op.x_type == BFLOAT16) return multiply_all<Brain, BITS>(op);
#endif
    return multiply_all<Single, BITS>(op);
}

}  // namespace

#endif  // __AVX2__

// Whether this build reads tiles. Codebooks must cover a whole row or a multiple of 32 columns.
QUANTLAB_EXPORT int32_t quantlab_lut_reads_tiles() {
#if defined(__AVX2__)
    return 1;
#else
    return 0;
#endif
}

// `codes` are tiles as `quantlab_lut_tile` makes them.
QUANTLAB_EXPORT int32_t quantlab_lut_tiled_matmul(const LutMatmul* op) {
#if defined(__AVX2__)
    if (op->groups > 1 && op->in_features / op->groups % SLICE) return NOT_TILED;
    if (op->bits == 2) return multiply_type<2>(*op);
    if (op->bits == 3) return multiply_type<3>(*op);
    if (op->bits == 4) return multiply_type<4>(*op);
#else
    (void)op;
#endif
    return NOT_TILED;
}
