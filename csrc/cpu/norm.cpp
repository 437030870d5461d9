// RMSNorm, alone and with the residual added first. A row is reduced in an order that depends on its length only.
#include "kernels.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

template <typename T>
float inverse_rms(const T* x, int64_t dim, float eps) {
    constexpr int kWidth = Vec::kWidth, kSums = 4;
    Vec sums[kSums] = {Vec::set1(0.0f), Vec::set1(0.0f), Vec::set1(0.0f), Vec::set1(0.0f)};
    int64_t i = 0;
    for (; i + kSums * kWidth <= dim; i += kSums * kWidth) {
        for (int j = 0; j < kSums; ++j) {
            const Vec value = Vec::load(x + i + j * kWidth);
            sums[j] = fma(value, value, sums[j]);
        }
    }
    for (; i + kWidth <= dim; i += kWidth) {
        const Vec value = Vec::load(x + i);
        sums[0] = fma(value, value, sums[0]);
    }
    if (i < dim) {
        const Vec value = load_partial(x + i, dim - i);
        sums[1] = fma(value, value, sums[1]);
    }
    const float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(dim) + eps);
}

template <typename T>
void normalize_row(const T* x, const T* weight, T* out, int64_t dim, float eps) {
    const Vec scale = Vec::set1(inverse_rms(x, dim, eps));
    int64_t i = 0;
    for (; i + Vec::kWidth <= dim; i += Vec::kWidth) {
        (Vec::load(x + i) * scale * Vec::load(weight + i)).store(out + i);
    }
    if (i < dim) {
        const int64_t rest = dim - i;
        store_partial(load_partial(x + i, rest) * scale * load_partial(weight + i, rest), out + i, rest);
    }
}

template <typename T>
void add_row(const T* x, T* residual, int64_t dim) {
    int64_t i = 0;
    for (; i + Vec::kWidth <= dim; i += Vec::kWidth) (Vec::load(residual + i) + Vec::load(x + i)).store(residual + i);
    if (i < dim) {
        const int64_t rest = dim - i;
        store_partial(load_partial(residual + i, rest) + load_partial(x + i, rest), residual + i, rest);
    }
}

template <typename T>
void rms_norm_rows(const QuireRmsNormParams& p, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(p.x);
    for (int64_t i = begin; i < end; ++i) {
        const T* row = x + i / p.num_groups * p.x_row_stride + i % p.num_groups * p.x_group_stride;
        normalize_row(row, static_cast<const T*>(p.weight), static_cast<T*>(p.out) + i * p.dim, p.dim, p.eps);
    }
}

template <typename T>
void add_rms_norm_rows(const QuireAddRmsNormParams& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        T* residual = static_cast<T*>(p.residual) + i * p.residual_row_stride;
        add_row(static_cast<const T*>(p.x) + i * p.x_row_stride, residual, p.dim);
        normalize_row(residual, static_cast<const T*>(p.weight), static_cast<T*>(p.out) + i * p.dim, p.dim, p.eps);
    }
}

}  // namespace

void rms_norm(const QuireRmsNormParams& p, int64_t begin, int64_t end) {
    if (p.dtype == QUIRE_FLOAT32) {
        rms_norm_rows<float>(p, begin, end);
    } else {
        rms_norm_rows<BFloat16>(p, begin, end);
    }
}

void add_rms_norm(const QuireAddRmsNormParams& p, int64_t begin, int64_t end) {
    if (p.dtype == QUIRE_FLOAT32) {
        add_rms_norm_rows<float>(p, begin, end);
    } else {
        add_rms_norm_rows<BFloat16>(p, begin, end);
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
