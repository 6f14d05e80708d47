// The exported functions.

#include <intrinsics.cuh>

#include "weight.h"

using quantlab::DeviceGuard;
using quantlab::Product;
using quantlab::Weight;

QUANTLAB_EXPORT int quantlab_cuda_matmul(const Weight* weight, const void* x, int64_t x_stride, const void* bias,
                                         void* y, int32_t tokens, int32_t warps, int32_t device, void* stream) {
  if (tokens == 0 || weight->n == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  const Product product{x, x_stride, bias, y, tokens, warps};
  if (tokens <= quantlab::kSmallTokens) return quantlab::launch_small(*weight, product, stream);
  if (tokens <= quantlab::kStagedTokens) return quantlab::launch_staged(*weight, product, stream);
  return quantlab::kUnsupported;
}

QUANTLAB_EXPORT int quantlab_cuda_dequantize(const Weight* weight, void* dense, int64_t stride, int32_t first_row,
                                             int32_t rows, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return quantlab::launch_dequantize(*weight, dense, stride, first_row, rows, stream);
}

QUANTLAB_EXPORT int quantlab_cuda_probe() { return quantlab::probe(); }

QUANTLAB_EXPORT const char* quantlab_cuda_error(int status) { return quantlab::error_string(status); }
