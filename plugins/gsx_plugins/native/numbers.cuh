// Element types as numbers, and rounding to them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace gsx {

__device__ inline float asFloat(float value) { return value; }
__device__ inline float asFloat(__half value) { return __half2float(value); }
__device__ inline float asFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T>
__device__ T rounded(float value);
template <>
__device__ inline float rounded<float>(float value) {
    return value;
}
template <>
__device__ inline __half rounded<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

}  // namespace gsx
