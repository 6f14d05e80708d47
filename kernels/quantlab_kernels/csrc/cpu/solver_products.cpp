// sums += left^T right over tokens: what Hessians are means of (`quantlab.solvers.products`).
//
// Here lanes are columns of `left` and `right`. A stretch of tokens is packed into panels of LANES columns; the blocks
// of `sums` are then independent of each other. An entry is a sum of sums over CHUNK tokens each, in an order that does
// not depend on the number of threads.
#include <omp.h>

#include <cstring>

#include "solver_tile.h"

namespace solver {
namespace {

constexpr int64_t STRETCH = 4 * CHUNK;  // tokens that are packed at a time
constexpr int64_t PANEL = STRETCH * LANES;

// Panel c holds the columns from LANES * c, token by token; columns that do not exist are 0.
void pack(const float* matrix, int64_t tokens, int64_t columns, int64_t panel, float* packed) {
    const int64_t first = panel * LANES, width = std::min<int64_t>(LANES, columns - first);
    for (int64_t token = 0; token < tokens; ++token, packed += LANES) {
        std::memcpy(packed, matrix + token * columns + first, width * sizeof(float));
        std::memset(packed + width, 0, (LANES - width) * sizeof(float));
    }
}

// block[r][lane] += sum over tokens of left[token][r] * right[token][lane], for COUNT rows of the block.
template <int COUNT>
inline void add_rows(const float* left, const float* right, int64_t tokens, float* block) {
    for (int64_t lane = 0; lane < LANES; lane += STRIP) {
        Floats totals[COUNT][VECTORS] = {};
        for (int64_t token = 0; token < tokens; ++token) {
            Floats operand[VECTORS];
            for (int v = 0; v < VECTORS; ++v) operand[v] = load(right + token * LANES + lane + v * WIDTH);
            for (int r = 0; r < COUNT; ++r) {
                const Floats factor = splat(left[token * LANES + r]);
                for (int v = 0; v < VECTORS; ++v) totals[r][v] = multiply_add(factor, operand[v], totals[r][v]);
            }
        }
        for (int r = 0; r < COUNT; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                float* sum = block + r * LANES + lane + v * WIDTH;
                store(sum, load(sum) + totals[r][v]);
            }
    }
}

void multiply_panels(const float* left, const float* right, int64_t tokens, float* block) {
    std::memset(block, 0, LANES * LANES * sizeof(float));
    for (int64_t from = 0; from < tokens; from += CHUNK) {
        const int64_t count = std::min(CHUNK, tokens - from);
        const float *rows = left + from * LANES, *columns = right + from * LANES;
        int64_t r = 0;
        for (; r + ROWS <= LANES; r += ROWS) add_rows<ROWS>(rows + r, columns, count, block + r * LANES);
        for (; r < LANES; r += 2) add_rows<2>(rows + r, columns, count, block + r * LANES);
    }
}

// One block of `sums`, of which there is less at the right and lower edge.
void add_block(const float* block, int64_t i, int64_t c, int64_t left_columns, int64_t right_columns, float* sums) {
    const int64_t height = std::min<int64_t>(LANES, left_columns - i * LANES);
    const int64_t width = std::min<int64_t>(LANES, right_columns - c * LANES);
    for (int64_t r = 0; r < height; ++r) {
        float* row = sums + (i * LANES + r) * right_columns + c * LANES;
        for (int64_t lane = 0; lane < width; ++lane) row[lane] += block[r * LANES + lane];
    }
}

}  // namespace
}  // namespace solver

using namespace solver;

// Floats that the packed panels of a matrix with `columns` columns take.
SOLVER_API int64_t solver_product_scratch(int64_t columns) { return tile_count(columns) * PANEL; }

// left (tokens, left_columns), right (tokens, right_columns), sums (left_columns, right_columns). Where both are the same
// matrix, blocks below the diagonal are left alone.
SOLVER_API void solver_add_products(const float* left, const float* right, int64_t tokens, int64_t left_columns,
                                    int64_t right_columns, float* sums, float* scratch, int threads) {
    const bool symmetric = left == right;
    const int64_t rows = tile_count(left_columns), panels = tile_count(right_columns);
    float* packed_left = symmetric ? scratch : scratch + panels * PANEL;
    for (int64_t from = 0; from < tokens; from += STRETCH) {
        const int64_t count = std::min(STRETCH, tokens - from);
#pragma omp parallel num_threads(threads)
        {
            alignas(ALIGNMENT) float block[LANES * LANES];
#pragma omp for schedule(static)
            for (int64_t p = 0; p < panels + (symmetric ? 0 : rows); ++p) {
                if (p < panels)
                    pack(right + from * right_columns, count, right_columns, p, scratch + p * PANEL);
                else
                    pack(left + from * left_columns, count, left_columns, p - panels, scratch + p * PANEL);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t unit = 0; unit < rows * panels; ++unit) {
                const int64_t i = unit / panels, c = unit % panels;
                if (symmetric && i > c) continue;
                multiply_panels(packed_left + i * PANEL, scratch + c * PANEL, count, block);
                add_block(block, i, c, left_columns, right_columns, sums);
            }
        }
    }
}
