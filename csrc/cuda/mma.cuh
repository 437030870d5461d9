// Tensor-core instructions on 16-bit operands, for a whole warp (sm_80 and later).
//
// Lane l is (g, t) = (l / 4, l % 4). A matrix of 8 rows of 8 elements is one register a lane: lane (g, t) holds row g,
// columns 2t and 2t + 1, the lower column in the lower half. mma_16x8x16 multiplies A [16, 16] by B [16, 8]:
//
//   a0: rows 0-7,  k 0-7     a2: rows 0-7,  k 8-15      of A
//   a1: rows 8-15, k 0-7     a3: rows 8-15, k 8-15
//   b0: k 0-7     b1: k 8-15                            of B, transposed: lane (g, t) holds column g, k 2t and 2t + 1
//   c0, c1: row g, columns 2t and 2t + 1     c2, c3: row g + 8
#pragma once

#include "numeric.cuh"

namespace quire {

// Two neighbouring elements in one register, each rounded to nearest even.
template <typename Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    const Vector<Element, 2> pair{{from_float<Element>(low), from_float<Element>(high)}};
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Four matrices; lane l gives the address of row l % 8 of matrix l / 8: 16 bytes in shared memory.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
    const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(source)
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
    const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(source)
                 : "memory");
}

// A matrix in registers, transposed between the lanes.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t matrix) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

// c += a b, with the products of `Element` summed in float32.
template <typename Element>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                           uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to 2 ulp; 0 for -infinity and where the result would be subnormal, exactly 1 for 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

}  // namespace quire
