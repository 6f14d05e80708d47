// The instructions of the GPU that C++ has no words for, one named wrapper each, and the way kernels are launched.
//
// The kernels contain no conditional compilation. The tests compile the same sources for the host by putting a
// folder with another intrinsics.cuh in front of this one; both files offer the same names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Static shared memory, aligned for vector access.
#define QUANTLAB_SHARED(type, name, count) __shared__ __align__(16) type name[count]

namespace quantlab {

// Byte permutation: nibble i of the selector picks byte i of the result from the eight bytes of (b, a); its top bit
// replicates the sign of that byte instead. `__byte_perm` would mask that bit away.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// mask ? a : b for every bit, as one LOP3 (truth table 0xCA).
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(result) : "r"(mask), "r"(a), "r"(b));
  return result;
}

// Loads of data that is read once: past L1, which is left to x.
__device__ __forceinline__ uint32_t load_once(const uint32_t* address) {
  uint32_t value;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ uint2 load_once(const uint2* address) {
  uint2 value;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address));
  return value;
}

__device__ __forceinline__ uint4 load_once(const uint4* address) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// Copies 16 bytes to shared memory in the background, or writes zeros if not valid; the address must be readable
// in name only. Past L1 (.cg): x lives in L2.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the latest groups of copies of this thread are still under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// sums += A B for A (16, 16) by rows and B (16, 8) by columns. Lane 4 g + t holds rows g and g + 8 of A, column g of
// B, and rows g and g + 8, columns 2 t and 2 t + 1, of the sums. Volatile, since all lanes must arrive at it: the compiler
// must not move it into a branch that some of them take.
template <typename T>
__device__ __forceinline__ void multiply_accumulate(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                    uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_accumulate<__half>(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_accumulate<__nv_bfloat16>(float (&sums)[4], uint32_t a0, uint32_t a1,
                                                                   uint32_t a2, uint32_t a3, uint32_t b0,
                                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

// Makes a device the current one for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    changed_ = status_ == cudaSuccess && previous_ != device;
    if (changed_) status_ = cudaSetDevice(device);
    if (status_ != cudaSuccess) cudaGetLastError();  // or the next launch would report it once more
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return static_cast<int>(status_); }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

// Whether the driver is new enough for the runtime that this library is linked with, and everything else is in order.
inline int probe() {
  int device;
  const cudaError_t status = cudaGetDevice(&device);
  cudaGetLastError();
  return static_cast<int>(status);
}

inline const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace quantlab
