// Kernels with one mistake each, which the emulation must notice.

#include <intrinsics.cuh>

namespace {

constexpr int kThreads = 64;

__global__ void forget_barrier(int* result) {
  QUANTLAB_SHARED(int, shared, kThreads);
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  result[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

__global__ void forget_wait(int* result, const int* source) {
  QUANTLAB_SHARED(int, shared, 4 * kThreads);
  quantlab::copy_async(shared + 4 * threadIdx.x, source, true);
  quantlab::commit_copies();
  quantlab::wait_copies<1>();
  result[threadIdx.x] = shared[4 * threadIdx.x];
}

__global__ void skip_barrier(int* result) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  result[threadIdx.x] = 0;
}

__global__ void declare_too_much(int* result) {
  QUANTLAB_SHARED(int, shared, 12289);
  result[threadIdx.x] = shared[0];
}

__global__ void load_misaligned(int* result) {
  result[threadIdx.x] = static_cast<int>(quantlab::load_once(reinterpret_cast<const uint4*>(result + 1)).x);
}

__global__ void dereference_misaligned(int* result) {
  const int4 four = *reinterpret_cast<const int4*>(result + 1);
  result[threadIdx.x] = four.x + four.y + four.z + four.w;
}

}  // namespace

// Result holds 64 numbers, source 4.
extern "C" __attribute__((visibility("default"))) int emulation_run_faulty(int fault, int* result, const int* source) {
  const dim3 grid(1), block(kThreads);
  switch (fault) {
    case 0:
      return quantlab::launch(forget_barrier, grid, block, nullptr, result);
    case 1:
      return quantlab::launch(forget_wait, grid, block, nullptr, result, source);
    case 2:
      return quantlab::launch(skip_barrier, grid, block, nullptr, result);
    case 3:
      return quantlab::launch(declare_too_much, grid, block, nullptr, result);
    case 4:
      return quantlab::launch(load_misaligned, grid, block, nullptr, result);
    case 5:
      return quantlab::launch(dereference_misaligned, grid, block, nullptr, result);
    case 6:
      return quantlab::launch(load_misaligned, dim3(1, 65536), block, nullptr, result);
    default:
      return -1;
  }
}
