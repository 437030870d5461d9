// silu(gate) * up: one thread for each pack of 16 bytes of the result.
#include "host.h"
#include "numeric.cuh"

namespace quire {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    silu_and_mul_kernel(const T* __restrict__ gate_up, T* __restrict__ out, int64_t row_stride, int64_t num_packs,
                        int dim) {
    using Pack = Vector<T, N>;
    const int packs_per_row = dim / N;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_packs; i += step) {
        const T* gate_row = gate_up + i / packs_per_row * row_stride;
        const int column = static_cast<int>(i % packs_per_row) * N;
        const Pack gate = *reinterpret_cast<const Pack*>(gate_row + column);
        const Pack up = *reinterpret_cast<const Pack*>(gate_row + dim + column);
        Pack result;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float g = to_float(gate.elements[j]);
            result.elements[j] = from_float<T>(g / (1.0f + expf(-g)) * to_float(up.elements[j]));
        }
        *reinterpret_cast<Pack*>(out + i * N) = result;
    }
}

template <typename T, int N>
int launch(const QuireSiluAndMulParams& p) {
    constexpr int64_t kMaxCtas = 1 << 16;  // beyond this many a thread takes several packs
    const int64_t num_packs = static_cast<int64_t>(p.num_rows) * (p.dim / N);
    const int64_t ctas = ceil_div(num_packs, kThreads);
    silu_and_mul_kernel<T, N>
        <<<static_cast<unsigned>(ctas < kMaxCtas ? ctas : kMaxCtas), kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
            static_cast<const T*>(p.gate_up), static_cast<T*>(p.out), p.gate_up_row_stride, num_packs, p.dim);
    return check_launch("silu_and_mul");
}

}  // namespace
}  // namespace quire

int quire_silu_and_mul(const QuireSiluAndMulParams* params) {
    using namespace quire;
    if (int status = check_params(params, "silu_and_mul")) return status;
    const QuireSiluAndMulParams& p = *params;
    QUIRE_REQUIRE_DTYPE("silu_and_mul", "dtype", p.dtype);
    QUIRE_REQUIRE(p.num_rows >= 0 && p.dim >= 1, "silu_and_mul: num_rows=%d, dim=%d must be at least 0 and 1",
                  p.num_rows, p.dim);
    if (p.num_rows == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.gate_up != nullptr && p.out != nullptr, "silu_and_mul: gate_up or out is null");
    return with_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kPack = 16 / sizeof(T);
        const bool packed = p.dim % kPack == 0 && p.gate_up_row_stride % kPack == 0 && is_aligned(p.gate_up, 16) &&
                            is_aligned(p.out, 16);
        return packed ? launch<T, kPack>(p) : launch<T, 1>(p);
    });
}
