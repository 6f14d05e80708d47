// The twin of csrc/cuda/device/intrinsics.cuh for the host: the same names over fibers instead of PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#undef __global__
#undef __host__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (emulation::machine().current->thread)
#define gridDim (emulation::machine().grid_size)
#define blockIdx (emulation::machine().block_index)
#define blockDim (emulation::machine().block_size)
#define __syncthreads() emulation::wait_for_block()

#define QUANTLAB_SHARED(type, name, count) \
  type* const name = static_cast<type*>(emulation::declare_shared(sizeof(type) * (count)))

namespace quantlab {

using std::max;
using std::min;

inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(value); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <typename T>
T __shfl_sync(uint32_t, T value, int source) {
  T result;
  std::memcpy(&result, emulation::exchange(&value, sizeof value) + source * emulation::kSlotBytes, sizeof result);
  return result;
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  return __shfl_sync(mask, value, emulation::machine().current->lane ^ distance);
}

inline unsigned __ballot_sync(uint32_t, bool vote) {
  const char* const lanes = emulation::exchange(&vote, sizeof vote);
  unsigned votes = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) votes |= (lanes[lane * emulation::kSlotBytes] != 0) << lane;
  return votes;
}

inline void __syncwarp() { emulation::exchange(nullptr, 0); }

// PRMT in its default mode, as the PTX manual defines it.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 0xf;
    const uint32_t byte = bytes >> 8 * (nibble & 7) & 0xff;
    const uint32_t sign = byte & 0x80 ? 0xffu : 0u;
    result |= (nibble & 8 ? sign : byte) << 8 * i;
  }
  return result;
}

inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

template <typename Vector>
Vector load_once(const Vector* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Vector) != 0) emulation::fail(emulation::kMisaligned);
  Vector value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline void copy_async(void* shared, const void* global, bool valid) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (addresses % 16 != 0) emulation::fail(emulation::kMisaligned);
  emulation::copy_later(shared, valid ? global : nullptr);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int PENDING>
void wait_copies() {
  emulation::finish_copies(PENDING);
}

// The layout of the operands is that of the PTX manual for mma.m16n8k16 with 16-bit elements.
template <typename T>
void multiply_accumulate(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1) {
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  const int lane = emulation::machine().current->lane;
  const int group = lane / 4, in_group = lane % 4;
  const char* const lanes = emulation::exchange(mine, sizeof mine);
  const auto element = [&](int source, int operand, int half) {
    T value;
    std::memcpy(&value, lanes + source * emulation::kSlotBytes + 4 * operand + 2 * half, sizeof value);
    return static_cast<float>(value);
  };
  float a[2][16], b[2][16];
  for (int k = 0; k < 16; ++k) {
    const int source = k % 8 / 2, upper = k / 8, half = k % 2;
    for (int row = 0; row < 2; ++row) a[row][k] = element(4 * group + source, 2 * upper + row, half);
    for (int column = 0; column < 2; ++column) {
      b[column][k] = element(4 * (2 * in_group + column) + source, 4 + upper, half);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) sums[i] += a[i / 2][k] * b[i % 2][k];
  }
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, Arguments... arguments) {
  return emulation::run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, [=] { kernel(arguments...); });
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  int status() const { return 0; }
};

inline int probe() { return 0; }

inline const char* error_string(int status) {
  switch (status) {
    case emulation::kOutsideOfBuffer:
      return "an access outside of a guarded buffer";
    case emulation::kDeadlock:
      return "a barrier that some thread never reaches";
    case emulation::kTooMuchSharedMemory:
      return "more than 48 KiB of shared memory";
    case emulation::kTooManyThreads:
      return "no thread, or more than 1024, in a block";
    case emulation::kWrongGrid:
      return "an empty grid, or more than 65535 blocks in y or z";
    case emulation::kMisaligned:
      return "a misaligned vector access";
    default:
      return "unknown";
  }
}

}  // namespace quantlab
