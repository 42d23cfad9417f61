// Converts the weights of one load to floats: elements of a row type, or codes of 8 bits.

#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "native/numbers.cuh"

namespace gsx {

// A code of 8 bits as a float: 4 exponent and 3 mantissa bits, no infinity.
struct E4m3 {
    uint8_t bits;
};
template <typename W>
constexpr bool kIsCode = std::is_same_v<W, int8_t> || std::is_same_v<W, E4m3>;

// Four INT8 codes. A GPU converts integers to floats at an eighth of the speed at which it adds floats. So code + 128 is put
// into the lowest byte of the float 2^23, where neighbouring floats are 1 apart; then 2^23 + 128 is subtracted.
__device__ inline void widenWord(uint32_t word, int8_t, float* out) {
    constexpr uint32_t kSignBits = 0x80808080u;  // adds 128 to each
    constexpr uint32_t kFloat = 0x4b000000u;     // 2^23
    constexpr float kOffset = 8388608.0f + 128.0f;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        out[i] = __fadd_rn(__uint_as_float(__byte_perm(word ^ kSignBits, kFloat, 0x7440u + i)), -kOffset);
    }
}

// Four E4M3 codes: exact in half precision.
__device__ inline void widenWord(uint32_t word, E4m3, float* out) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const auto codes = static_cast<__nv_fp8x2_storage_t>(word >> (16 * i) & 0xffffu);
        const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3);
        __half halves[2];
        memcpy(static_cast<void*>(halves), &pair, sizeof(pair));
        out[2 * i] = asFloat(halves[0]);
        out[2 * i + 1] = asFloat(halves[1]);
    }
}

// The elements of one load. (By value: from a reference, the compiler would load them byte by byte.)
template <typename W, typename Vector, int COUNT>
__device__ void widen(Vector held, float (&out)[COUNT]) {
    static_assert(sizeof(Vector) == COUNT * sizeof(W), "all of them");
    if constexpr (kIsCode<W>) {
        uint32_t words[COUNT / 4];
        memcpy(words, &held, sizeof(held));
#pragma unroll
        for (int i = 0; i < COUNT / 4; ++i) widenWord(words[i], W{}, out + 4 * i);
    } else {
        W elements[COUNT];
        memcpy(static_cast<void*>(elements), &held, sizeof(held));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) out[i] = asFloat(elements[i]);
    }
}

}  // namespace gsx
