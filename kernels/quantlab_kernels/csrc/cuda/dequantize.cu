// The dense weight, a few rows at a time, for products that cuBLAS does better and for codes of other widths.

#include <intrinsics.cuh>

#include "epilogue.cuh"
#include "tile.cuh"
#include "variants.cuh"
#include "weight.h"

namespace quantlab {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpLanes;

// A warp decodes a tile and writes 64 contiguous bytes of a row per access.
template <typename T, int BITS, Codebook CODEBOOK>
__global__ void __launch_bounds__(kThreads)
    dequantize_tiles(const Weight weight, T* __restrict__ dense, const int64_t stride, const int first_row,
                     const int rows) {
  const int tile = blockIdx.y * kWarps + threadIdx.y;
  using Rows = TileRows<T, BITS, CODEBOOK>;
  if (tile >= Rows::tiles(weight)) return;
  Rows block(weight, first_row / kTileRows + blockIdx.x);
  const typename Rows::Tile fetched = block.fetch(tile);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t levels[2][4];
    block.decode(fetched, tile, half, levels);
    const int column = tile * kTileColumns + half * kHalfColumns + kVectorColumns * lane_quarter();
    if (column >= weight.k) continue;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int target = blockIdx.x * kTileRows + lane_row() + 8 * row;
      if (target >= rows) continue;
      *reinterpret_cast<uint4*>(dense + target * stride + column) =
          make_uint4(levels[row][0], levels[row][1], levels[row][2], levels[row][3]);
    }
  }
}

// A warp reads one word of every plane and writes the 32 weights they hold, lane i that of bit i.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_planes(const Weight weight, T* __restrict__ dense, const int64_t stride, const int first_row) {
  const int words = (weight.k + kWarpLanes - 1) / kWarpLanes;
  const int word = blockIdx.y * kWarps + threadIdx.y;
  const int column = word * kWarpLanes + threadIdx.x;
  if (column >= weight.k) return;
  const size_t row = first_row + blockIdx.x;
  uint32_t code = 0;
  for (int plane = 0; plane < weight.bits; ++plane) {
    code |= (weight.codes[(plane * static_cast<size_t>(weight.n) + row) * words + word] >> threadIdx.x & 1u) << plane;
  }
  const size_t table = row * weight.groups + column / (weight.k / weight.groups);
  dense[blockIdx.x * stride + column] = static_cast<const T*>(weight.tables)[(table << weight.bits) + code];
}

// One thread per row: entries of the same column meet in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_outliers(const Weight weight, T* __restrict__ dense, const int64_t stride, const int first_row,
                 const int rows) {
  const int row = blockIdx.x * kThreads + threadIdx.y * kWarpLanes + threadIdx.x;
  if (row >= rows) return;
  const int end = weight.outlier_offsets[first_row + row + 1];
  for (int entry = weight.outlier_offsets[first_row + row]; entry < end; ++entry) {
    T& target = dense[row * stride + weight.outlier_columns[entry]];
    target = T(static_cast<float>(target) + outlier_value(weight, entry));
  }
}

constexpr dim3 kBlock(kWarpLanes, kWarps);

int blocks(int items, int items_per_block) { return (items + items_per_block - 1) / items_per_block; }

template <typename T>
int launch_planes(const Weight& weight, void* dense, int64_t stride, int first_row, int rows, void* stream) {
  const dim3 grid(rows, blocks(weight.k, kWarps * kWarpLanes));
  return launch(dequantize_planes<T>, grid, kBlock, stream, weight, static_cast<T*>(dense), stride, first_row);
}

template <typename T>
int launch_outliers(const Weight& weight, void* dense, int64_t stride, int first_row, int rows, void* stream) {
  return launch(add_outliers<T>, dim3(blocks(rows, kThreads)), kBlock, stream, weight, static_cast<T*>(dense), stride,
                first_row, rows);
}

template <typename Visit>
int visit_element(const Weight& weight, Visit visit) {
  switch (static_cast<Element>(weight.element)) {
    case Element::kFloat16:
      return visit.template operator()<__half>();
    case Element::kBfloat16:
      return visit.template operator()<__nv_bfloat16>();
    case Element::kFloat32:
      return visit.template operator()<float>();
  }
  return kUnsupported;
}

}  // namespace

int launch_dequantize(const Weight& weight, void* dense, int64_t stride, int first_row, int rows, void* stream) {
  if (rows == 0) return 0;
  int status;
  if (static_cast<Codebook>(weight.codebook) == Codebook::kPlanes) {
    status = visit_element(
        weight, [&]<typename T>() { return launch_planes<T>(weight, dense, stride, first_row, rows, stream); });
  } else {
    status = visit_tiled(weight, [&]<typename T, int BITS, Codebook CODEBOOK>() {
      const dim3 grid(blocks(rows, kTileRows), blocks(weight.k, kWarps * kTileColumns));
      return launch(dequantize_tiles<T, BITS, CODEBOOK>, grid, kBlock, stream, weight, static_cast<T*>(dense), stride,
                    first_row, rows);
    });
  }
  if (status != 0 || weight.outlier_offsets == nullptr) return status;
  return visit_element(
      weight, [&]<typename T>() { return launch_outliers<T>(weight, dense, stride, first_row, rows, stream); });
}

}  // namespace quantlab
