// The multiplication of one tile of the weight, 16 rows by 64 columns, by a warp.
//
// The weight is operand A of the tensor core and x the operand B, so that up to eight tokens cost one instruction.
// Lane 4 g + t owns rows g and g + 8 and, in each half of the tile, the columns 8 t to 8 t + 7. That is not the order
// in which the instruction numbers its columns; but a sum may be taken in any order, as long as both operands agree.
// The gain: a lane reads its codes with one access, and x in runs of 16 bytes.
#pragma once

#include <intrinsics.cuh>

#include "lookup.cuh"
#include "weight.h"

namespace quantlab {

constexpr int kWarpLanes = 32;

__device__ __forceinline__ int lane_row() { return threadIdx.x >> 2; }
__device__ __forceinline__ int lane_quarter() { return threadIdx.x & 3; }

// What a lane needs of a tile from memory, loaded ahead of its use.
template <int BITS, Codebook CODEBOOK>
struct Fetched {
  uint32_t words[BITS];
};

template <int BITS>
struct Fetched<BITS, Codebook::kUniform> {
  uint32_t words[BITS];
  uint32_t grids[2][2];  // by half and row: scale and zero as two float16
};

// A block of 16 rows as a warp sees it.
template <typename T, int BITS, Codebook CODEBOOK>
class TileRows {
 public:
  using Tile = Fetched<BITS, CODEBOOK>;

  __device__ __forceinline__ TileRows(const Weight& weight, int row_block)
      : codes_(weight.codes + static_cast<size_t>(row_block) * tiles(weight) * kWarpLanes * BITS),
        groups_(weight.groups) {
    // Groups of a tiled weight are 32 columns times a power of two; a division would cost more than the lookup.
    group_shift_ = 31 - __clz(weight.k / weight.groups / kHalfColumns);
    constexpr int kGroupBytes = CODEBOOK == Codebook::kUniform ? sizeof(uint32_t) : Table<BITS>::kBytes;
    const size_t first_row = row_block * kTileRows + lane_row();
    first_tables_ = static_cast<const uint8_t*>(weight.tables) + first_row * groups_ * kGroupBytes;
    second_offset_ = 8 * groups_ * kGroupBytes;
    if constexpr (CODEBOOK == Codebook::kPerRow) load_tables(0);
  }

  static __device__ __forceinline__ int tiles(const Weight& weight) {
    return (weight.k + kTileColumns - 1) / kTileColumns;
  }

  __device__ __forceinline__ Tile fetch(int tile) const {
    Tile fetched;
    const uint32_t* words = codes_ + static_cast<size_t>(tile) * kWarpLanes * BITS;
    if constexpr (BITS == 4) {
      const uint4 four = load_once(reinterpret_cast<const uint4*>(words) + threadIdx.x);
      fetched.words[0] = four.x, fetched.words[1] = four.y, fetched.words[2] = four.z, fetched.words[3] = four.w;
    } else if constexpr (BITS == 3) {
      // Three accesses of one word, each contiguous over the warp: three words in a row have no vector type.
#pragma unroll
      for (int word = 0; word < 3; ++word) fetched.words[word] = load_once(words + word * kWarpLanes + threadIdx.x);
    } else {
      const uint2 two = load_once(reinterpret_cast<const uint2*>(words) + threadIdx.x);
      fetched.words[0] = two.x, fetched.words[1] = two.y;
    }
    if constexpr (CODEBOOK == Codebook::kUniform) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1 && !group_ends_within_tile()) break;
#pragma unroll
        for (int row = 0; row < 2; ++row) fetched.grids[half][row] = load_grid(row, group(tile, half));
      }
    }
    return fetched;
  }

  // Eight levels of each of the two rows of this lane. The halves of a tile are to be decoded in order.
  __device__ __forceinline__ void decode(const Tile& fetched, int tile, int half, uint32_t (&levels)[2][4]) {
    if constexpr (CODEBOOK == Codebook::kPerGroup) {
      if (half == 0 || group_ends_within_tile()) load_tables(group(tile, half));
    } else if constexpr (CODEBOOK == Codebook::kUniform) {
      if (half == 0 || group_ends_within_tile()) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float2 grid = unpack_grid(fetched.grids[half][row]);
          tables_[row].template build<T>(grid.x, grid.y);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) tables_[row].look_up(nibbles<BITS>(fetched.words, half, row), levels[row]);
  }

  // sums += W xᵀ over a tile, for TOKEN_TILES times eight tokens. load_x(token_tile, half) gives the eight elements
  // of x at token 8 token_tile + g and columns 8 t to 8 t + 7 of the half.
  template <int TOKEN_TILES, typename LoadX>
  __device__ __forceinline__ void multiply(const Tile& fetched, int tile, float (&sums)[TOKEN_TILES][4],
                                           LoadX load_x) {
    if constexpr (CODEBOOK == Codebook::kUniform) {
      multiply_uniform<TOKEN_TILES>(fetched, sums, load_x);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t levels[2][4];
        decode(fetched, tile, half, levels);
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
          multiply_levels(levels, load_x(token_tile, half), sums[token_tile]);
        }
      }
    }
  }

 private:
  // With W = scale (c + center - zero), c the code less half the number of levels: multiply the whole numbers c and,
  // by a matrix of ones, the sums of x, both exact in float16 and bfloat16; scale once per group, in float32.
  template <int TOKEN_TILES, typename LoadX>
  __device__ __forceinline__ void multiply_uniform(const Tile& fetched, float (&sums)[TOKEN_TILES][4], LoadX load_x) {
    constexpr int kCenter = 1 << (BITS - 1);
    constexpr uint32_t kOnes = 0x10001u * encode_integer<T>(1);
    const Table<BITS> codes = Table<BITS>::template integers<T>(-kCenter);
    float products[TOKEN_TILES][4] = {};
    float x_sums[TOKEN_TILES][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t levels[2][4];
#pragma unroll
      for (int row = 0; row < 2; ++row) codes.look_up(nibbles<BITS>(fetched.words, half, row), levels[row]);
#pragma unroll
      for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
        const uint4 x = load_x(token_tile, half);
        multiply_levels(levels, x, products[token_tile]);
        multiply_accumulate<T>(x_sums[token_tile], kOnes, kOnes, kOnes, kOnes, x.x, x.y);
        multiply_accumulate<T>(x_sums[token_tile], kOnes, kOnes, kOnes, kOnes, x.z, x.w);
      }
      if (half == 0 && !group_ends_within_tile()) continue;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        // A select, since an index known at run time would send the array to memory.
        const bool own_grid = half == 1 && group_ends_within_tile();
        const float2 grid = unpack_grid(own_grid ? fetched.grids[1][row] : fetched.grids[0][row]);
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
#pragma unroll
          for (int i = 2 * row; i < 2 * row + 2; ++i) {
            const float offset = (static_cast<float>(kCenter) - grid.y) * x_sums[token_tile][i];
            sums[token_tile][i] += grid.x * (products[token_tile][i] + offset);
            products[token_tile][i] = x_sums[token_tile][i] = 0.f;
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply_levels(const uint32_t (&levels)[2][4], uint4 x, float (&sums)[4]) {
    multiply_accumulate<T>(sums, levels[0][0], levels[1][0], levels[0][1], levels[1][1], x.x, x.y);
    multiply_accumulate<T>(sums, levels[0][2], levels[1][2], levels[0][3], levels[1][3], x.z, x.w);
  }

  __device__ __forceinline__ bool group_ends_within_tile() const { return group_shift_ == 0; }

  // The group of half a tile. The last tile may reach beyond the last column, where x is zero.
  __device__ __forceinline__ int group(int tile, int half) const {
    return min((2 * tile + half) >> group_shift_, groups_ - 1);
  }

  __device__ __forceinline__ uint32_t load_grid(int row, int group) const {
    return load_once(reinterpret_cast<const uint32_t*>(first_tables_ + row * second_offset_) + group);
  }

  static __device__ __forceinline__ float2 unpack_grid(uint32_t grid) {
    return __half22float2(*reinterpret_cast<const __half2*>(&grid));
  }

  __device__ __forceinline__ void load_tables(int group) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      tables_[row].load(first_tables_ + row * second_offset_ + group * Table<BITS>::kBytes);
    }
  }

  const uint32_t* codes_;
  const uint8_t* first_tables_;  // of row g
  int second_offset_;            // bytes from there to those of row g + 8
  int groups_;
  int group_shift_;  // halves of tiles per group, as a power of two
  Table<BITS> tables_[2];
};

}  // namespace quantlab
