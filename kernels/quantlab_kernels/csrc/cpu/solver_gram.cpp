// M = S H S^T of every row (`quantlab.solvers.codebook`), S being the one-hot matrix of the row's codes.
//
// H is symmetric, so its upper triangle with half the diagonal, U, is enough: M = Q + Q^T for Q = S U S^T. S U takes one
// addition per entry of U: the rows of U are gathered by code and summed in registers, PANEL columns at a time. For many
// output rows that happens on one panel while it lies in the cache. As every input has a code, the rows of S U add up to
// the column sums of U, so that those of the most frequent code need not be gathered.
#include <omp.h>

#include <cstring>

#include "solver_tile.h"

namespace solver {
namespace {

constexpr int PARTS = 4;
constexpr int64_t PANEL = PARTS * WIDTH;  // columns of U in a panel
constexpr int64_t PANEL_ROWS = 192;       // rows of U whose panel, at most 48 KiB, stays near the core; a multiple of PANEL
constexpr int64_t UNIT = 2;               // floats, so that processors can scale a stored place as they read it
constexpr int64_t MAX_GROUP = 64;         // output rows that share a panel
constexpr int64_t GROUP_FLOATS = 1 << 15;

int64_t panel_count(int64_t inputs) { return (inputs + PANEL - 1) / PANEL; }

// Panel c holds the columns from PANEL * c: their sums, and then rows 0, 1, ... up to its own diagonal.
int64_t panel_rows(int64_t panel, int64_t inputs) { return std::min(inputs, (panel + 1) * PANEL); }

int64_t panel_offset(int64_t panel) { return panel * (panel + 1) / 2 * PANEL * PANEL + panel * PANEL; }

void pack_panel(const float* hessian, int64_t inputs, int64_t panel, float* packed) {
    const int64_t first = panel * PANEL, width = std::min(PANEL, inputs - first);
    double sums[PANEL] = {};
    float* row = packed + PANEL;
    for (int64_t j = 0; j < panel_rows(panel, inputs); ++j, row += PANEL) {
        std::memset(row, 0, PANEL * sizeof(float));
        for (int64_t u = std::max<int64_t>(0, j - first); u < width; ++u) row[u] = hessian[j * inputs + first + u];
        if (j >= first) row[j - first] *= 0.5f;
        for (int64_t u = 0; u < PANEL; ++u) sums[u] += row[u];
    }
    std::copy(sums, sums + PANEL, packed);
}

// Output rows that share panels. Inputs are sorted by code, separately in every segment of PANEL_ROWS inputs.
struct Group {
    const uint8_t* codes;  // (rows, inputs)
    int64_t rows;
    int64_t inputs;
    int64_t levels;
    int64_t padded_levels;
    int64_t segments;
    int64_t panels;
    float* sums;        // (rows, padded_levels, PANEL)
    float* gram;        // (rows, levels, padded_levels): Q^T
    int32_t* starts;    // (rows, segments, levels + 1): where the inputs of a code begin in `sorted`
    int32_t* ends;      // (rows, panels, levels): where they end in the segment of a panel's diagonal, as far as that goes
    uint16_t* sorted;   // (rows, inputs): where an input's row of the panel begins in its segment, in UNIT floats
    uint8_t* frequent;  // (rows,): the code of most inputs

    const uint8_t* row_codes(int64_t row) const { return codes + row * inputs; }
    int32_t* row_starts(int64_t row, int64_t segment) const {
        return starts + (row * segments + segment) * (levels + 1);
    }
    // The codes but the most frequent one, for i in [0, levels - 1).
    int64_t other_code(int64_t row, int64_t i) const { return i + (i >= frequent[row]); }
    int32_t* row_ends(int64_t row, int64_t panel) const { return ends + (row * panels + panel) * levels; }
};

void sort_by_code(const Group& group, int64_t row) {
    const uint8_t* codes = group.row_codes(row);
    uint16_t* sorted = group.sorted + row * group.inputs;
    int32_t next[257], counts[256] = {};
    for (int64_t segment = 0; segment < group.segments; ++segment) {
        const int64_t first = segment * PANEL_ROWS, last = std::min(first + PANEL_ROWS, group.inputs);
        std::memset(next, 0, sizeof next);
        for (int64_t j = first; j < last; ++j) ++next[codes[j] + 1];
        for (int64_t k = 0; k < group.levels; ++k) counts[k] += next[k + 1];
        next[0] = static_cast<int32_t>(first);
        for (int64_t k = 0; k < group.levels; ++k) next[k + 1] += next[k];
        std::copy(next, next + group.levels + 1, group.row_starts(row, segment));
        for (int64_t j = first; j < last;) {
            const int64_t panel = j / PANEL, end = panel_rows(panel, group.inputs);
            for (; j < end; ++j) sorted[next[codes[j]]++] = static_cast<uint16_t>((j - first) * (PANEL / UNIT));
            std::copy(next, next + group.levels, group.row_ends(row, panel));
        }
    }
    group.frequent[row] = static_cast<uint8_t>(std::max_element(counts, counts + group.levels) - counts);
}

// The sum of the listed rows of a panel, with what `sums` holds unless they are the FIRST.
template <bool FIRST>
inline void add_rows(const float* panel, const uint16_t* begin, const uint16_t* end, float* sums) {
    Floats total[PARTS];
    for (int part = 0; part < PARTS; ++part) total[part] = FIRST ? Floats{} : load(sums + part * WIDTH);
    for (const uint16_t* j = begin; j < end; ++j)
        for (int part = 0; part < PARTS; ++part) total[part] += load(panel + *j * UNIT + part * WIDTH);
    for (int part = 0; part < PARTS; ++part) store(sums + part * WIDTH, total[part]);
}

// Those of all codes but the most frequent.
template <bool FIRST>
void add_segment(const Group& group, int64_t row, const float* panel, const int32_t* starts, const int32_t* ends) {
    const uint16_t* sorted = group.sorted + row * group.inputs;
    float* sums = group.sums + row * group.padded_levels * PANEL;
    for (int64_t i = 0; i + 1 < group.levels; ++i) {
        const int64_t k = group.other_code(row, i);
        add_rows<FIRST>(panel, sorted + starts[k], sorted + ends[k], sums + k * PANEL);
    }
}

// The sums of the most frequent code: those of all inputs without the others.
void add_frequent(const Group& group, int64_t row, const float* column_sums) {
    float* sums = group.sums + row * group.padded_levels * PANEL;
    Floats rest[PARTS];
    for (int part = 0; part < PARTS; ++part) rest[part] = load(column_sums + part * WIDTH);
    for (int64_t i = 0; i + 1 < group.levels; ++i)
        for (int part = 0; part < PARTS; ++part)
            rest[part] -= load(sums + group.other_code(row, i) * PANEL + part * WIDTH);
    for (int part = 0; part < PARTS; ++part) store(sums + group.frequent[row] * PANEL + part * WIDTH, rest[part]);
}

constexpr int64_t HALF = WIDTH / 2;

int64_t padded(int64_t levels) { return levels <= HALF ? HALF : (levels + WIDTH - 1) / WIDTH * WIDTH; }

// Q^T[code of column] += the column of S U, for the columns of one panel.
void collect_columns(const Group& group, int64_t row, int64_t panel) {
    const int64_t first = panel * PANEL, width = std::min(PANEL, group.inputs - first);
    const uint8_t* codes = group.row_codes(row) + first;
    const float* sums = group.sums + row * group.padded_levels * PANEL;
    float* gram = group.gram + row * group.levels * group.padded_levels;
    Floats square[WIDTH];
    if (group.padded_levels == HALF) {  // a square holds two pieces of all levels, one behind the other
        typedef float Halves __attribute__((vector_size(4 * HALF), may_alias));
        for (int64_t from = 0; from < width; from += 2 * WIDTH) {
            for (int k = 0; k < WIDTH; ++k) square[k] = load(sums + k % HALF * PANEL + from + k / HALF * WIDTH);
            transpose<float>(square);
            for (int64_t u = from; u < std::min(from + 2 * WIDTH, width); ++u) {
                const int64_t piece = (u - from) / WIDTH;
                const Halves* column = reinterpret_cast<const Halves*>(square + (u - from) % WIDTH) + piece;
                *reinterpret_cast<Halves*>(gram + codes[u] * HALF) += *column;
            }
        }
        return;
    }
    for (int64_t level = 0; level < group.padded_levels; level += WIDTH)
        for (int64_t from = 0; from < width; from += WIDTH) {
            for (int k = 0; k < WIDTH; ++k) square[k] = load(sums + (level + k) * PANEL + from);
            transpose<float>(square);
            for (int u = 0; u < std::min<int64_t>(WIDTH, width - from); ++u) {
                float* target = gram + codes[from + u] * group.padded_levels + level;
                store(target, load(target) + square[u]);
            }
        }
}

void add_panel(const Group& group, int64_t panel, const float* packed) {
    const int64_t own_segment = panel * PANEL / PANEL_ROWS;
    for (int64_t segment = 0; segment <= own_segment; ++segment) {
        const float* rows = packed + PANEL + segment * PANEL_ROWS * PANEL;
        for (int64_t row = 0; row < group.rows; ++row) {
            const int32_t* starts = group.row_starts(row, segment);
            const int32_t* ends = segment == own_segment ? group.row_ends(row, panel) : starts + 1;
            if (segment == 0)
                add_segment<true>(group, row, rows, starts, ends);
            else
                add_segment<false>(group, row, rows, starts, ends);
            if (segment == own_segment) {
                add_frequent(group, row, packed);
                collect_columns(group, row, panel);
            }
        }
    }
}

int64_t group_rows(int64_t levels) {
    return std::max<int64_t>(1, std::min(MAX_GROUP, GROUP_FLOATS / (levels * padded(levels))));
}

int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// A group of the largest size, in memory of its own; `next` is set behind that memory.
Group make_group(int64_t inputs, int64_t levels, char* memory, char** next) {
    const int64_t rows = group_rows(levels), segments = (inputs + PANEL_ROWS - 1) / PANEL_ROWS;
    Group group{};
    group.panels = panel_count(inputs);
    group.inputs = inputs, group.levels = levels, group.padded_levels = padded(levels), group.segments = segments;
    const auto take = [&memory](int64_t bytes) {
        char* taken = memory;
        memory += aligned(bytes);
        return taken;
    };
    group.sums = reinterpret_cast<float*>(take(rows * padded(levels) * PANEL * 4));
    group.gram = reinterpret_cast<float*>(take(rows * levels * padded(levels) * 4));
    group.starts = reinterpret_cast<int32_t*>(take(rows * segments * (levels + 1) * 4));
    group.ends = reinterpret_cast<int32_t*>(take(rows * group.panels * levels * 4));
    group.sorted = reinterpret_cast<uint16_t*>(take(rows * inputs * 2));
    group.frequent = reinterpret_cast<uint8_t*>(take(rows));
    *next = memory;
    return group;
}

void group_gram(Group group, const float* packed, float* gram) {
    std::memset(group.sums, 0, group.rows * group.padded_levels * PANEL * sizeof(float));  // of levels that only pad
    std::memset(group.gram, 0, group.rows * group.levels * group.padded_levels * sizeof(float));
    for (int64_t row = 0; row < group.rows; ++row) sort_by_code(group, row);
    for (int64_t panel = 0; panel < group.panels; ++panel)
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
SOLVER_API int64_t solver_triangle_floats(int64_t inputs) { return panel_offset(panel_count(inputs)); }

SOLVER_API void solver_pack_triangle(const float* hessian, int64_t inputs, float* packed, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t panel = 0; panel < panel_count(inputs); ++panel)
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
