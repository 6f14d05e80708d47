// The plain C interface: a prepared weight and the functions that Python loads with ctypes.
//
// n, k and m are out_features, in_features and the number of tokens; y = x Wᵀ + bias is (m, n).
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantlab {

// Rows and columns of the weight that one warp multiplies at a time.
constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;
// Half a tile is the finest piece of a row that may have a codebook of its own.
constexpr int kHalfColumns = kTileColumns / 2;
// A vector access covers eight 16-bit elements; rows of x and of the dequantized weight are padded to that.
constexpr int kVectorColumns = 8;

enum class Codebook : int32_t {
  kPerRow = 0,    // one table per row, held in registers
  kPerGroup = 1,  // one table per row and group, loaded as the columns pass
  kUniform = 2,   // scale and zero per row and group: level q is (q - zero) * scale
  kPlanes = 3,    // canonical bit planes of any width and group; can only be dequantized
};

enum class Element : int32_t { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };

// Mirrored field by field by `Weight` in quantlab_kernels/cuda_library.py; cuda_layout.py makes the layouts.
struct Weight {
  const uint32_t* codes;           // tiles (ceil(n / 16), ceil(k / 64), 32 * bits) or planes (bits, n, ceil(k / 32))
  const void* tables;              // kPerRow, kPerGroup: bytes (n up to 16, groups, low and high byte, levels);
                                   // kUniform: half (n up to 16, groups, scale and zero); kPlanes: element (n, groups, levels)
  const int32_t* outlier_offsets;  // (n + 1), or null without outliers
  const int32_t* outlier_columns;
  const void* outlier_values;      // outlier_element, added to the levels
  int32_t n;
  int32_t k;
  int32_t bits;
  int32_t groups;                  // codebooks per row
  int32_t codebook;                // Codebook
  int32_t element;                 // Element of x, y, bias and of the tables
  int32_t outlier_element;         // kFloat16 or kFloat32
};

// The answer of a function that does not implement the combination it was asked for. Others: 0, or a cudaError_t.
constexpr int kUnsupported = -1;

// The largest m of the two multiplying kernels.
constexpr int kSmallTokens = 16;
constexpr int kStagedTokens = 64;
constexpr int kStagedUniformTokens = 32;
constexpr int kMaxWarps = 16;

// One call: everything beside the weight.
struct Product {
  const void* x;     // (m, x_stride), 16-byte aligned, zero from column k to the next multiple of 8
  int64_t x_stride;  // elements, a multiple of 8
  const void* bias;  // (n) or null
  void* y;           // (m, n), contiguous
  int32_t tokens;
  int32_t warps;     // of a block of the small kernel, 1 to kMaxWarps
};

int launch_small(const Weight& weight, const Product& product, void* stream);
int launch_staged(const Weight& weight, const Product& product, void* stream);
int launch_dequantize(const Weight& weight, void* dense, int64_t stride, int first_row, int rows, void* stream);

}  // namespace quantlab

#define QUANTLAB_EXPORT extern "C" __attribute__((visibility("default")))

// y = x Wᵀ + bias for up to kStagedTokens tokens.
QUANTLAB_EXPORT int quantlab_cuda_matmul(const quantlab::Weight* weight, const void* x, int64_t x_stride,
                                         const void* bias, void* y, int32_t tokens, int32_t warps, int32_t device,
                                         void* stream);

// Rows first_row to first_row + rows of the weight, with outliers, into (rows, stride); first_row is a multiple of 16.
// Columns from k to the next multiple of 8 receive arbitrary values.
QUANTLAB_EXPORT int quantlab_cuda_dequantize(const quantlab::Weight* weight, void* dense, int64_t stride,
                                             int32_t first_row, int32_t rows, int32_t device, void* stream);

// Whether the library can work with the driver.
QUANTLAB_EXPORT int quantlab_cuda_probe();

// What a positive status means.
QUANTLAB_EXPORT const char* quantlab_cuda_error(int status);
