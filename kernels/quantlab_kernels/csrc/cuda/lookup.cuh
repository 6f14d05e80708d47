// Codes to levels without touching memory: a table of 16-bit levels lives in registers as two planes of bytes, and a
// byte permutation looks up four codes at a time in each plane. The bytes are opaque, so one code serves float16 and
// bfloat16.
#pragma once

#include <intrinsics.cuh>

namespace quantlab {

// Eight codes travel as the nibbles of a word, with zeros above the code.
//
// A lane holds 32 codes of a tile as BITS words. Half h, row r (0: row g, 1: row g + 8 of the tile) is
//   4 bits: word 2 h + r.
//   3 bits: the low three bits of the nibbles of word 2 h + r. The fourth word does not exist: bit b of its codes is
//           the spare top bit of the nibbles of word b. True 3 bits per weight, at three instructions for the fourth.
//   2 bits: bits 2 r and 2 r + 1 of the nibbles of word h.
template <int BITS>
__device__ __forceinline__ uint32_t nibbles(const uint32_t (&words)[BITS], int half, int row) {
  if constexpr (BITS == 4) {
    return words[2 * half + row];
  } else if constexpr (BITS == 3) {
    if (half == 1 && row == 1) {
      return (words[0] >> 3 & 0x11111111u) | (words[1] >> 2 & 0x22222222u) | (words[2] >> 1 & 0x44444444u);
    }
    return words[2 * half + row] & 0x77777777u;
  } else {
    static_assert(BITS == 2);
    return words[half] >> 2 * row & 0x33333333u;
  }
}

// Small whole numbers in the two formats, at compile time: the conversions of the CUDA headers are not constant.
template <typename T>
struct Format;
template <>
struct Format<__half> {
  static constexpr int kMantissaBits = 10, kExponentBias = 15;
};
template <>
struct Format<__nv_bfloat16> {
  static constexpr int kMantissaBits = 7, kExponentBias = 127;
};

template <typename T>
__device__ constexpr uint32_t encode_integer(int value) {
  if (value == 0) return 0;
  const uint32_t magnitude = value < 0 ? -value : value;
  int exponent = 0;
  while (magnitude >> (exponent + 1)) ++exponent;
  constexpr int kMantissaBits = Format<T>::kMantissaBits;
  const uint32_t fraction = (magnitude << kMantissaBits >> exponent) - (1u << kMantissaBits);
  const uint32_t biased = exponent + Format<T>::kExponentBias;
  return (value < 0 ? 0x8000u : 0u) | biased << kMantissaBits | fraction;
}

// The levels of one row: four of them per word, low bytes and high bytes apart.
template <int BITS>
struct Table {
  static constexpr int kWords = (1 << BITS) / 4;
  static constexpr int kBytes = 2 << BITS;  // in memory: the low bytes of all levels, then the high bytes

  uint32_t low[kWords];
  uint32_t high[kWords];

  __device__ __forceinline__ void load(const uint8_t* bytes) {
    if constexpr (BITS == 4) {
      const uint4 first = *reinterpret_cast<const uint4*>(bytes);
      const uint4 second = *reinterpret_cast<const uint4*>(bytes + 16);
      low[0] = first.x, low[1] = first.y, low[2] = first.z, low[3] = first.w;
      high[0] = second.x, high[1] = second.y, high[2] = second.z, high[3] = second.w;
    } else if constexpr (BITS == 3) {
      const uint4 both = *reinterpret_cast<const uint4*>(bytes);
      low[0] = both.x, low[1] = both.y, high[0] = both.z, high[1] = both.w;
    } else {
      const uint2 both = *reinterpret_cast<const uint2*>(bytes);
      low[0] = both.x, high[0] = both.y;
    }
  }

  // The levels (q - zero) * scale, rounded once.
  template <typename T>
  __device__ __forceinline__ void build(float scale, float zero) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      uint32_t pairs[2];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float code = static_cast<float>(4 * word + 2 * pair);
        pairs[pair] = pack<T>((code - zero) * scale, (code + 1.f - zero) * scale);
      }
      low[word] = permute_bytes(pairs[0], pairs[1], 0x6420);
      high[word] = permute_bytes(pairs[0], pairs[1], 0x7531);
    }
  }

  // The levels first, first + 1, ...: constants, so that they need not live in registers.
  template <typename T>
  static __device__ __forceinline__ Table integers(const int first) {
    Table table;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      table.low[word] = table.high[word] = 0;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const uint32_t level = encode_integer<T>(first + 4 * word + byte);
        table.low[word] |= (level & 0xff) << 8 * byte;
        table.high[word] |= (level >> 8) << 8 * byte;
      }
    }
    return table;
  }

  // Eight codes to eight levels, as four packed pairs in the order of the codes.
  __device__ __forceinline__ void look_up(uint32_t codes, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      const uint32_t low_bytes = look_up_bytes(low, codes, four);
      const uint32_t high_bytes = look_up_bytes(high, codes, four);
      pairs[2 * four] = permute_bytes(low_bytes, high_bytes, 0x5140);
      pairs[2 * four + 1] = permute_bytes(low_bytes, high_bytes, 0x7362);
    }
  }

 private:
  template <typename T>
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    alignas(4) const T halves[2] = {T(first), T(second)};
    return *reinterpret_cast<const uint32_t*>(halves);
  }

  // One byte plane for codes 4 four to 4 four + 3.
  static __device__ __forceinline__ uint32_t look_up_bytes(const uint32_t (&plane)[kWords], uint32_t codes, int four) {
    const uint32_t selector = codes >> 16 * four;
    if constexpr (BITS == 2) {
      return permute_bytes(plane[0], plane[0], selector);
    } else if constexpr (BITS == 3) {
      return permute_bytes(plane[0], plane[1], selector);
    } else {
      // A permutation reaches eight bytes: look up in both halves of the table and choose by the top bit of the code,
      // spread over its byte by the sign mode of the permutation. Shifted left by four, every other top bit becomes
      // the sign of a byte. The selectors themselves must not ask for that mode.
      const uint32_t top_bits = permute_bytes(codes << 4, codes, four == 0 ? 0xD9C8u : 0xFBEAu);
      const uint32_t low_three = selector & 0x77777777u;
      return select_bits(top_bits, permute_bytes(plane[2], plane[3], low_three),
                         permute_bytes(plane[0], plane[1], low_three));
    }
  }
};

}  // namespace quantlab
