// M = S H S^T of every row (`quantlab.solvers.codebook`), S being the one-hot matrix of the row's codes.
//
// H is symmetric, so its upper triangle with half the diagonal, U, is enough: M = Q + Q^T for Q = S U S^T. S U takes one
// addition per entry of U: the rows of U are gathered by code and summed in registers, PANEL columns at a time. For many
// output rows that happens on one panel while it lies in the cache.
#include <omp.h>

#include <cstring>

#include "solver_tile.h"

namespace solver {
namespace {

constexpr int64_t PANEL = 4 * WIDTH;    // columns of U in a panel
constexpr int64_t PANEL_ROWS = 192;     // rows of U whose panel, at most 48 KiB, stays near the core; a multiple of PANEL
constexpr int64_t UNIT = 2;             // floats, so that processors can scale a stored place as they read it
constexpr int64_t MAX_GROUP = 64;       // output rows that share a panel
constexpr int64_t GROUP_FLOATS = 1 << 15;

// Panel c holds the columns from PANEL * c of rows 0, 1, ... up to its own diagonal.
int64_t panel_rows(int64_t panel, int64_t inputs) { return std::min(inputs, (panel + 1) * PANEL); }

int64_t panel_offset(int64_t panel) { return panel * (panel + 1) / 2 * PANEL * PANEL; }

void pack_panel(const float* hessian, int64_t inputs, int64_t panel, float* packed) {
    const int64_t first = panel * PANEL, width = std::min(PANEL, inputs - first);
    for (int64_t j = 0; j < panel_rows(panel, inputs); ++j, packed += PANEL) {
        std::memset(packed, 0, PANEL * sizeof(float));
        for (int64_t u = std::max<int64_t>(0, j - first); u < width; ++u) packed[u] = hessian[j * inputs + first + u];
        if (j >= first) packed[j - first] *= 0.5f;
    }
}

// Output rows that share panels. Inputs are sorted by code, separately in every segment of PANEL_ROWS inputs.
struct Group {
    const uint8_t* codes;  // (rows, inputs)
    int64_t rows;
    int64_t inputs;
    int64_t levels;
    int64_t padded_levels;  // a multiple of WIDTH
    int64_t segments;
    float* sums;       // (rows, padded_levels, PANEL)
    float* gram;       // (rows, levels, padded_levels): Q^T
    int32_t* starts;   // (rows, segments, levels + 1): where the inputs of a code begin in `sorted`
    int32_t* ends;     // (rows, levels): the same in the segment of the diagonal, for inputs that it has not reached
    uint16_t* sorted;  // (rows, inputs): where an input's row of the panel begins in its segment, in UNIT floats

    const uint8_t* row_codes(int64_t row) const { return codes + row * inputs; }
    const int32_t* row_starts(int64_t row, int64_t segment) const {
        return starts + (row * segments + segment) * (levels + 1);
    }
};

void sort_by_code(const Group& group, int64_t row) {
    const uint8_t* codes = group.row_codes(row);
    int32_t next[257];
    for (int64_t segment = 0; segment < group.segments; ++segment) {
        const int64_t first = segment * PANEL_ROWS, last = std::min(first + PANEL_ROWS, group.inputs);
        std::memset(next, 0, sizeof next);
        for (int64_t j = first; j < last; ++j) ++next[codes[j] + 1];
        next[0] = static_cast<int32_t>(first);
        for (int64_t k = 0; k < group.levels; ++k) next[k + 1] += next[k];
        int32_t* starts = group.starts + (row * group.segments + segment) * (group.levels + 1);
        std::copy(next, next + group.levels + 1, starts);
        uint16_t* sorted = group.sorted + row * group.inputs;
        for (int64_t j = first; j < last; ++j) sorted[next[codes[j]]++] = static_cast<uint16_t>((j - first) * (PANEL / UNIT));
    }
}

// sums[column] += the sum of the listed rows of a panel
inline void add_rows(const float* panel, const uint16_t* begin, const uint16_t* end, float* sums) {
    constexpr int PARTS = PANEL / WIDTH;
    Floats even[PARTS] = {}, odd[PARTS] = {};
    const uint16_t* j = begin;
    for (; j + 2 <= end; j += 2)
        for (int part = 0; part < PARTS; ++part) {
            even[part] += load(panel + j[0] * UNIT + part * WIDTH);
            odd[part] += load(panel + j[1] * UNIT + part * WIDTH);
        }
    if (j < end)
        for (int part = 0; part < PARTS; ++part) even[part] += load(panel + j[0] * UNIT + part * WIDTH);
    for (int part = 0; part < PARTS; ++part)
        store(sums + part * WIDTH, load(sums + part * WIDTH) + (even[part] + odd[part]));
}

// A transposition of WIDTH vectors: bit after bit, it exchanges the bit of the vector's index with that of the lane's.
template <int BIT>
inline void transpose_bit(Floats* rows) {
    Ints low, high;
    for (int lane = 0; lane < WIDTH; ++lane) {
        low[lane] = lane & BIT ? WIDTH + lane - BIT : lane;
        high[lane] = lane & BIT ? WIDTH + lane : lane + BIT;
    }
    for (int i = 0; i < WIDTH; ++i) {
        if (i & BIT) continue;
        const Floats first = rows[i], second = rows[i + BIT];
        rows[i] = __builtin_shuffle(first, second, low);
        rows[i + BIT] = __builtin_shuffle(first, second, high);
    }
}

inline void transpose(Floats* rows) {
    transpose_bit<1>(rows);
    transpose_bit<2>(rows);
    if constexpr (WIDTH > 4) transpose_bit<4>(rows);
    if constexpr (WIDTH > 8) transpose_bit<8>(rows);
}

// Q^T[code of column] += the column of S U, for the columns of one panel.
void collect_columns(const Group& group, int64_t row, int64_t panel) {
    const int64_t first = panel * PANEL, width = std::min(PANEL, group.inputs - first);
    const uint8_t* codes = group.row_codes(row) + first;
    const float* sums = group.sums + row * group.padded_levels * PANEL;
    float* gram = group.gram + row * group.levels * group.padded_levels;
    for (int64_t level = 0; level < group.padded_levels; level += WIDTH)
        for (int64_t from = 0; from < width; from += WIDTH) {
            Floats columns[WIDTH];
            for (int k = 0; k < WIDTH; ++k) columns[k] = load(sums + (level + k) * PANEL + from);
            transpose(columns);
            for (int u = 0; u < std::min<int64_t>(WIDTH, width - from); ++u) {
                float* target = gram + codes[from + u] * group.padded_levels + level;
                store(target, load(target) + columns[u]);
            }
        }
}

void add_panel(const Group& group, int64_t panel, const float* packed) {
    const int64_t diagonal_segment = panel * PANEL / PANEL_ROWS;
    std::memset(group.sums, 0, group.rows * group.padded_levels * PANEL * sizeof(float));
    for (int64_t segment = 0; segment <= diagonal_segment; ++segment) {
        const float* rows = packed + segment * PANEL_ROWS * PANEL;
        for (int64_t row = 0; row < group.rows; ++row) {
            int32_t* ends = group.ends + row * group.levels;
            const int32_t* starts = group.row_starts(row, segment);
            if (segment == diagonal_segment) {
                if (panel * PANEL % PANEL_ROWS == 0) std::copy(starts, starts + group.levels, ends);
                for (int64_t j = panel * PANEL; j < panel_rows(panel, group.inputs); ++j) ++ends[group.row_codes(row)[j]];
            }
            const uint16_t* sorted = group.sorted + row * group.inputs;
            float* sums = group.sums + row * group.padded_levels * PANEL;
            for (int64_t k = 0; k < group.levels; ++k) {
                const int32_t end = segment == diagonal_segment ? ends[k] : starts[k + 1];
                add_rows(rows, sorted + starts[k], sorted + end, sums + k * PANEL);
            }
        }
    }
    for (int64_t row = 0; row < group.rows; ++row) collect_columns(group, row, panel);
}

int64_t padded(int64_t levels) { return (levels + WIDTH - 1) / WIDTH * WIDTH; }

int64_t group_rows(int64_t levels) {
    return std::max<int64_t>(1, std::min(MAX_GROUP, GROUP_FLOATS / (levels * padded(levels))));
}

int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// A group of the largest size, in memory of its own; `next` is set behind that memory.
Group make_group(int64_t inputs, int64_t levels, char* memory, char** next) {
    const int64_t rows = group_rows(levels), segments = (inputs + PANEL_ROWS - 1) / PANEL_ROWS;
    Group group{};
    group.inputs = inputs, group.levels = levels, group.padded_levels = padded(levels), group.segments = segments;
    const auto take = [&memory](int64_t bytes) {
        char* taken = memory;
        memory += aligned(bytes);
        return taken;
    };
    group.sums = reinterpret_cast<float*>(take(rows * padded(levels) * PANEL * 4));
    group.gram = reinterpret_cast<float*>(take(rows * levels * padded(levels) * 4));
    group.starts = reinterpret_cast<int32_t*>(take(rows * segments * (levels + 1) * 4));
    group.ends = reinterpret_cast<int32_t*>(take(rows * levels * 4));
    group.sorted = reinterpret_cast<uint16_t*>(take(rows * inputs * 2));
    *next = memory;
    return group;
}

void group_gram(Group group, const float* packed, float* gram) {
    std::memset(group.gram, 0, group.rows * group.levels * group.padded_levels * sizeof(float));
    for (int64_t row = 0; row < group.rows; ++row) sort_by_code(group, row);
    for (int64_t panel = 0; panel * PANEL < group.inputs; ++panel)
        add_panel(group, panel, packed + panel_offset(panel));
    for (int64_t row = 0; row < group.rows; ++row) {
        const float* half = group.gram + row * group.levels * group.padded_levels;
        for (int64_t a = 0; a < group.levels; ++a)
            for (int64_t b = 0; b < group.levels; ++b)
                *gram++ = half[a * group.padded_levels + b] + half[b * group.padded_levels + a];
    }
}

}  // namespace
}  // namespace solver

using namespace solver;

// Floats of the packed triangle.
SOLVER_API int64_t solver_triangle_floats(int64_t inputs) { return panel_offset((inputs + PANEL - 1) / PANEL); }

SOLVER_API void solver_pack_triangle(const float* hessian, int64_t inputs, float* packed, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t panel = 0; panel < (inputs + PANEL - 1) / PANEL; ++panel)
        pack_panel(hessian, inputs, panel, packed + panel_offset(panel));
}

// Bytes of scratch memory for each thread of `solver_gram`.
SOLVER_API int64_t solver_gram_scratch(int64_t inputs, int64_t levels) {
    char* end;
    make_group(inputs, levels, nullptr, &end);
    return end - static_cast<char*>(nullptr);
}

// gram: (rows, levels, levels)
SOLVER_API void solver_gram(const uint8_t* codes, const float* packed, int64_t rows, int64_t inputs, int64_t levels,
                            float* gram, char* scratch, int threads) {
    const int64_t per_group = group_rows(levels), scratch_bytes = solver_gram_scratch(inputs, levels);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t first = 0; first < rows; first += per_group) {
        char* end;
        Group group = make_group(inputs, levels, scratch + omp_get_thread_num() * scratch_bytes, &end);
        group.codes = codes + first * inputs;
        group.rows = std::min(per_group, rows - first);
        group_gram(group, packed, gram + first * levels * levels);
    }
}
