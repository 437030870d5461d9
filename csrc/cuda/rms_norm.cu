// RMSNorm, alone and after a residual addition: one CTA for each row of one group.
//
// A CTA reads its row twice; the second time it comes from L1. Each thread meets the same elements both times, so that
// the sum into `residual` needs no barrier of its own.
#include "host.h"
#include "numeric.cuh"

namespace quire {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

// The sum over all threads of the CTA, in an order that depends on blockDim.x alone.
__device__ float block_sum(float value) {
    __shared__ float partial[kMaxWarps];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    value = warp_sum(value);
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_sum(lane < blockDim.x / kWarpSize ? partial[lane] : 0.0f);
}

template <typename T, int N, bool kAddResidual>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(const T* __restrict__ x, T* residual, const T* __restrict__ weight, T* __restrict__ out,
                    int64_t x_row_stride, int64_t x_group_stride, int64_t residual_row_stride, int num_groups, int dim,
                    float eps) {
    using Pack = Vector<T, N>;
    const int64_t row = blockIdx.x / num_groups, group = blockIdx.x % num_groups;
    const T* source = x + row * x_row_stride + group * x_group_stride;
    T* sum_row = kAddResidual ? residual + row * residual_row_stride : nullptr;

    float squares = 0.0f;
    for (int i = threadIdx.x * N; i < dim; i += blockDim.x * N) {
        Pack pack = *reinterpret_cast<const Pack*>(source + i);
        if (kAddResidual) {
            const Pack old = *reinterpret_cast<const Pack*>(sum_row + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                pack.elements[j] = from_float<T>(to_float(old.elements[j]) + to_float(pack.elements[j]));
            }
            *reinterpret_cast<Pack*>(sum_row + i) = pack;
        }
#pragma unroll
        for (int j = 0; j < N; ++j) squares += to_float(pack.elements[j]) * to_float(pack.elements[j]);
    }
    const float scale = rsqrtf(block_sum(squares) / dim + eps);

    const T* normed = kAddResidual ? sum_row : source;
    T* destination = out + static_cast<int64_t>(blockIdx.x) * dim;
    for (int i = threadIdx.x * N; i < dim; i += blockDim.x * N) {
        Pack pack = *reinterpret_cast<const Pack*>(normed + i);
        const Pack weights = *reinterpret_cast<const Pack*>(weight + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            pack.elements[j] = from_float<T>(to_float(pack.elements[j]) * scale * to_float(weights.elements[j]));
        }
        *reinterpret_cast<Pack*>(destination + i) = pack;
    }
}

struct Launch {
    const void* x;
    void* residual;  // null without an addition
    const void* weight;
    void* out;
    int64_t x_row_stride, x_group_stride, residual_row_stride;
    int32_t num_rows, num_groups, dim, dtype;
    float eps;
    cudaStream_t stream;
};

template <typename T, int N, bool kAddResidual>
int launch_width(const Launch& launch, const char* operation) {
    const int64_t wanted = ceil_div(ceil_div(launch.dim, N), kWarpSize) * kWarpSize;
    const int threads = static_cast<int>(wanted < kMaxThreads ? wanted : kMaxThreads);
    const int64_t rows = static_cast<int64_t>(launch.num_rows) * launch.num_groups;
    QUIRE_REQUIRE(rows <= INT32_MAX, "%s: num_rows * num_groups = %lld exceeds 2^31 - 1", operation,
                  static_cast<long long>(rows));
    rms_norm_kernel<T, N, kAddResidual><<<static_cast<unsigned>(rows), threads, 0, launch.stream>>>(
        static_cast<const T*>(launch.x), static_cast<T*>(launch.residual), static_cast<const T*>(launch.weight),
        static_cast<T*>(launch.out), launch.x_row_stride, launch.x_group_stride, launch.residual_row_stride,
        launch.num_groups, launch.dim, launch.eps);
    return check_launch(operation);
}

template <bool kAddResidual>
int launch_norm(const Launch& launch, const char* operation) {
    return with_dtype(launch.dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int kPack = 16 / sizeof(T);
        const bool packed = launch.dim % kPack == 0 && launch.x_row_stride % kPack == 0 &&
                            launch.x_group_stride % kPack == 0 && launch.residual_row_stride % kPack == 0 &&
                            is_aligned(launch.x, 16) && is_aligned(launch.residual, 16) &&
                            is_aligned(launch.weight, 16) && is_aligned(launch.out, 16);
        return packed ? launch_width<T, kPack, kAddResidual>(launch, operation)
                      : launch_width<T, 1, kAddResidual>(launch, operation);
    });
}

}  // namespace
}  // namespace quire

int quire_rms_norm(const QuireRmsNormParams* params) {
    using namespace quire;
    constexpr const char* kName = "rms_norm";
    if (int status = check_params(params, kName)) return status;
    const QuireRmsNormParams& p = *params;
    QUIRE_REQUIRE_DTYPE(kName, "dtype", p.dtype);
    QUIRE_REQUIRE(p.num_rows >= 0 && p.num_groups >= 1 && p.dim >= 1,
                  "rms_norm: num_rows=%d, num_groups=%d, dim=%d must be at least 0, 1 and 1", p.num_rows, p.num_groups,
                  p.dim);
    QUIRE_REQUIRE(p.eps >= 0.0f, "rms_norm: eps=%g must not be negative", p.eps);
    if (p.num_rows == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.x != nullptr && p.weight != nullptr && p.out != nullptr, "rms_norm: x, weight or out is null");
    return launch_norm<false>({p.x, nullptr, p.weight, p.out, p.x_row_stride, p.x_group_stride, 0, p.num_rows,
                               p.num_groups, p.dim, p.dtype, p.eps, static_cast<cudaStream_t>(p.stream)},
                              kName);
}

int quire_add_rms_norm(const QuireAddRmsNormParams* params) {
    using namespace quire;
    constexpr const char* kName = "add_rms_norm";
    if (int status = check_params(params, kName)) return status;
    const QuireAddRmsNormParams& p = *params;
    QUIRE_REQUIRE_DTYPE(kName, "dtype", p.dtype);
    QUIRE_REQUIRE(p.num_rows >= 0 && p.dim >= 1, "add_rms_norm: num_rows=%d, dim=%d must be at least 0 and 1",
                  p.num_rows, p.dim);
    QUIRE_REQUIRE(p.eps >= 0.0f, "add_rms_norm: eps=%g must not be negative", p.eps);
    QUIRE_REQUIRE(p.reserved == 0, "add_rms_norm: reserved=%d must be 0", p.reserved);
    if (p.num_rows == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.x != nullptr && p.residual != nullptr && p.weight != nullptr && p.out != nullptr,
                  "add_rms_norm: x, residual, weight or out is null");
    // Rows that overlap would be added into by several CTAs at once.
    QUIRE_REQUIRE(p.num_rows == 1 || p.residual_row_stride >= p.dim,
                  "add_rms_norm: residual_row_stride=%lld is below dim=%d: rows would overlap",
                  static_cast<long long>(p.residual_row_stride), p.dim);
    return launch_norm<true>({p.x, p.residual, p.weight, p.out, p.x_row_stride, 0, p.residual_row_stride, p.num_rows, 1,
                              p.dim, p.dtype, p.eps, static_cast<cudaStream_t>(p.stream)},
                             kName);
}
