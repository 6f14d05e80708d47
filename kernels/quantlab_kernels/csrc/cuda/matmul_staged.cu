// y = x Wᵀ for 17 to 64 tokens: enough arithmetic that x must be read from shared memory.
//
// A block owns ROW_TILES times 16 rows. Its eight warps form ROW_TILES by kSplits: warps with the same row tile take
// different tiles of columns, and warps with the same columns share the piece of x that the block has staged. Copies
// of the next piece run while this one is multiplied.

#include <intrinsics.cuh>

#include "epilogue.cuh"
#include "tile.cuh"
#include "variants.cuh"
#include "weight.h"

namespace quantlab {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpLanes;

// Two pieces of x of (TOKENS, kSplits tiles) in shared memory.
template <typename T, int TOKENS, int SPLITS>
class StagedInput {
 public:
  static constexpr int kColumns = SPLITS * kTileColumns;
  // A quarter of a warp reads 64 bytes of two tokens at a time: this pitch, 64 modulo 128 bytes, puts them into
  // different banks.
  static constexpr int kPitch = kColumns + 32;
  static constexpr int kElements = 2 * TOKENS * kPitch;

  __device__ __forceinline__ StagedInput(T* shared, const T* x, int64_t x_stride, int tokens, int k)
      : shared_(shared), x_(x), x_stride_(x_stride), tokens_(tokens), k_(k) {}

  __device__ __forceinline__ void start(int piece) {
    constexpr int kVectors = kColumns / kVectorColumns;
    T* target = shared_ + (piece & 1) * TOKENS * kPitch;
    for (int vector = threadIdx.y * kWarpLanes + threadIdx.x; vector < TOKENS * kVectors; vector += kThreads) {
      const int token = vector / kVectors, offset = vector % kVectors * kVectorColumns;
      const int column = piece * kColumns + offset;
      const bool valid = token < tokens_ && column < k_;
      copy_async(target + token * kPitch + offset, valid ? x_ + token * x_stride_ + column : x_, valid);
    }
    commit_copies();
  }

  __device__ __forceinline__ uint4 load(int piece, int token, int offset) const {
    return *reinterpret_cast<const uint4*>(shared_ + ((piece & 1) * TOKENS + token) * kPitch + offset);
  }

 private:
  T* shared_;
  const T* x_;
  int64_t x_stride_;
  int tokens_;
  int k_;
};

template <typename T, int BITS, Codebook CODEBOOK, int TOKENS, int ROW_TILES>
__global__ void __launch_bounds__(kThreads)
    matmul_staged(const Weight weight, const T* __restrict__ x, const int64_t x_stride, const T* __restrict__ bias,
                  T* __restrict__ y, const int tokens) {
  using Rows = TileRows<T, BITS, CODEBOOK>;
  constexpr int kSplits = kWarps / ROW_TILES;
  constexpr int kBlockRows = ROW_TILES * kTileRows;
  using Input = StagedInput<T, TOKENS, kSplits>;
  // First the pieces of x, in the end the partial sums.
  constexpr int kInputBytes = Input::kElements * sizeof(T);
  constexpr int kPartialBytes = kWarps * TOKENS * kRowPitch * sizeof(float);
  QUANTLAB_SHARED(uint8_t, shared, kInputBytes > kPartialBytes ? kInputBytes : kPartialBytes);
  float* const partials = reinterpret_cast<float*>(shared);
  const int warp = threadIdx.y;
  const int row_tile = warp % ROW_TILES, split = warp / ROW_TILES;
  const int first_row = blockIdx.x * kBlockRows;
  const int tiles = Rows::tiles(weight);
  const int pieces = (tiles + kSplits - 1) / kSplits;

  // The last block may hold fewer row tiles; its other warps repeat the last one and store nothing.
  const int row_blocks = (weight.n + kTileRows - 1) / kTileRows;
  Rows rows(weight, min(static_cast<int>(blockIdx.x) * ROW_TILES + row_tile, row_blocks - 1));
  Input input(reinterpret_cast<T*>(shared), x, x_stride, tokens, weight.k);
  input.start(0);
  typename Rows::Tile next{};
  if (split < tiles) next = rows.fetch(split);

  float sums[TOKENS / 8][4] = {};
  for (int piece = 0; piece < pieces; ++piece) {
    const int tile = piece * kSplits + split;
    const typename Rows::Tile current = next;
    if (piece + 1 < pieces) {
      input.start(piece + 1);
      if (tile + kSplits < tiles) next = rows.fetch(tile + kSplits);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    if (tile < tiles) {
      rows.template multiply<TOKENS / 8>(current, tile, sums, [&](int token_tile, int half) {
        const int offset = split * kTileColumns + half * kHalfColumns + kVectorColumns * lane_quarter();
        return input.load(piece, 8 * token_tile + lane_row(), offset);
      });
    }
    __syncthreads();
  }

  store_partial<TOKENS>(sums, partials + warp * TOKENS * kRowPitch);
  __syncthreads();
  if (weight.outlier_offsets != nullptr) {
    // Into the partial sums of split 0: the warp of row tile r is warp r.
    for (int row = warp; row < kBlockRows && first_row + row < weight.n; row += kWarps) {
      float* const target = partials + row / kTileRows * TOKENS * kRowPitch + row % kTileRows;
      multiply_outliers<TOKENS>(weight, x, x_stride, tokens, first_row + row,
                                [&](int token, float sum) { target[token * kRowPitch] += sum; });
    }
    __syncthreads();
  }
  for (int element = warp * kWarpLanes + threadIdx.x; element < tokens * kBlockRows; element += kThreads) {
    const int token = element / kBlockRows, row = element % kBlockRows;
    if (first_row + row >= weight.n) continue;
    const float* const place = partials + row / kTileRows * TOKENS * kRowPitch + token * kRowPitch + row % kTileRows;
    float sum = 0.f;
#pragma unroll
    for (int other = 0; other < kSplits; ++other) sum += place[other * ROW_TILES * TOKENS * kRowPitch];
    store_result(weight, bias, y, token, first_row + row, sum);
  }
}

}  // namespace

int launch_staged(const Weight& weight, const Product& product, void* stream) {
  return visit_tiled(weight, [&]<typename T, int BITS, Codebook CODEBOOK>() {
    const auto run = [&](auto kernel, int row_tiles) {
      const int block_rows = row_tiles * kTileRows;
      const dim3 grid((weight.n + block_rows - 1) / block_rows), block(kWarpLanes, kWarps);
      return launch(kernel, grid, block, stream, weight, static_cast<const T*>(product.x), product.x_stride,
                    static_cast<const T*>(product.bias), static_cast<T*>(product.y), product.tokens);
    };
    // More tokens, more rows per block: the traffic of x from L2 is n / block_rows times its size.
    if (product.tokens <= kStagedUniformTokens) return run(matmul_staged<T, BITS, CODEBOOK, kStagedUniformTokens, 2>, 2);
    // A uniform codebook keeps three sets of sums; those of 64 tokens do not fit into registers.
    if constexpr (CODEBOOK == Codebook::kUniform) return kUnsupported;
    else return run(matmul_staged<T, BITS, CODEBOOK, kStagedTokens, 4>, 4);
  });
}

}  // namespace quantlab
