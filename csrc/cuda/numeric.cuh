// Loads, stores and reductions in float32 over the ABI's types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "quire.h"

namespace quire {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }

// `N` neighbouring elements that move as one load or store.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T elements[N];
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    return value;
}

// Calls `body` with a value of the C++ type that the (already checked) `dtype` names.
template <typename Body>
int with_dtype(int dtype, Body body) {
    switch (dtype) {
        case QUIRE_BFLOAT16: return body(__nv_bfloat16{});
        case QUIRE_FLOAT16: return body(__half{});
        default: return body(float{});
    }
}

}  // namespace quire
