// y = x Wᵀ for up to 16 tokens: the time it takes to read the weight, or to look its levels up.
//
// A block owns 16 rows; its warps take the tiles of these rows in turn, each with the codebooks of all 16 rows in
// registers, and add up in shared memory at the end. x comes from L1 and L2: it is small, and every block wants it.

#include <intrinsics.cuh>

#include "epilogue.cuh"
#include "tile.cuh"
#include "variants.cuh"
#include "weight.h"

namespace quantlab {
namespace {

// Tiles of codes that a warp has under way. At 4 bits and 16 warps per multiprocessor, four are 32 KiB: above the
// product of bandwidth and latency of every supported device (about 25 KiB on the fastest). Codebooks by group need
// the registers of the fourth.
template <Codebook CODEBOOK>
constexpr int kTilesAhead = CODEBOOK == Codebook::kPerRow ? 4 : 3;

// Left alone (0), the compiler aims at two blocks of 16 warps per multiprocessor. With tables by group it would keep
// values in local memory to get there.
template <Codebook CODEBOOK>
constexpr int kBlocksAimedAt = CODEBOOK == Codebook::kPerGroup ? 1 : 0;

template <typename T, int BITS, Codebook CODEBOOK, int TOKENS>
__global__ void __launch_bounds__(kMaxWarps* kWarpLanes, kBlocksAimedAt<CODEBOOK>)
    matmul_small(const Weight weight, const T* __restrict__ x, const int64_t x_stride, const T* __restrict__ bias,
                 T* __restrict__ y, const int tokens) {
  using Rows = TileRows<T, BITS, CODEBOOK>;
  constexpr int kAhead = kTilesAhead<CODEBOOK>;
  QUANTLAB_SHARED(float, partials, kMaxWarps* TOKENS* kRowPitch);
  QUANTLAB_SHARED(float, corrections, TOKENS* kRowPitch);
  const int warp = threadIdx.y, warps = blockDim.y;
  const int first_row = blockIdx.x * kTileRows;
  const int tiles = Rows::tiles(weight);

  Rows rows(weight, blockIdx.x);
  typename Rows::Tile ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (warp + i * warps < tiles) ahead[i] = rows.fetch(warp + i * warps);
  }

  // The outliers first: their chain of dependent loads passes while the first tiles are on their way.
  if (weight.outlier_offsets != nullptr) {
    for (int row = warp; row < kTileRows && first_row + row < weight.n; row += warps) {
      multiply_outliers<TOKENS>(weight, x, x_stride, tokens, first_row + row,
                                [&](int token, float sum) { corrections[token * kRowPitch + row] = sum; });
    }
  }

  const T* x_lane = x + lane_row() * x_stride + kVectorColumns * lane_quarter();
  float sums[TOKENS / 8][4] = {};
  for (int first = warp; first < tiles; first += kAhead * warps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int tile = first + i * warps;
      if (tile >= tiles) break;
      const typename Rows::Tile current = ahead[i];
      const int next = tile + kAhead * warps;
      if (next < tiles) ahead[i] = rows.fetch(next);
      rows.template multiply<TOKENS / 8>(current, tile, sums, [&](int token_tile, int half) {
        const int column = tile * kTileColumns + half * kHalfColumns;
        const bool valid = 8 * token_tile + lane_row() < tokens && column + kVectorColumns * lane_quarter() < weight.k;
        if (!valid) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4*>(x_lane + 8 * token_tile * x_stride + column);
      });
    }
  }

  store_partial<TOKENS>(sums, partials + warp * TOKENS * kRowPitch);
  __syncthreads();
  for (int element = warp * kWarpLanes + threadIdx.x; element < tokens * kTileRows; element += warps * kWarpLanes) {
    const int token = element / kTileRows, row = element % kTileRows;
    if (first_row + row >= weight.n) continue;
    const int place = token * kRowPitch + row;
    float sum = weight.outlier_offsets != nullptr ? corrections[place] : 0.f;
    for (int other = 0; other < warps; ++other) sum += partials[other * TOKENS * kRowPitch + place];
    store_result(weight, bias, y, token, first_row + row, sum);
  }
}

}  // namespace

int launch_small(const Weight& weight, const Product& product, void* stream) {
  if (product.warps < 1 || product.warps > kMaxWarps) return kUnsupported;
  return visit_tiled(weight, [&]<typename T, int BITS, Codebook CODEBOOK>() {
    const auto kernel =
        product.tokens <= 8 ? matmul_small<T, BITS, CODEBOOK, 8> : matmul_small<T, BITS, CODEBOOK, kSmallTokens>;
    const dim3 grid((weight.n + kTileRows - 1) / kTileRows), block(kWarpLanes, product.warps);
    return launch(kernel, grid, block, stream, weight, static_cast<const T*>(product.x), product.x_stride,
                  static_cast<const T*>(product.bias), static_cast<T*>(product.y), product.tokens);
  });
}

}  // namespace quantlab
