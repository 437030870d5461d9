// 16 columns of one output row, in vectors of this instruction set. Included by sources compiled once per set (vec.h).
#pragma once

#include "decoder_kernels.h"
#include "packed.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

constexpr int kPanelVectors = kPanel / Vec::kWidth;

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | (mantissa << 13);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void load_half_panel(const uint8_t* p, Vec out[kPanelVectors]) {
#if defined(QUIRE_AVX512)
    out[0].v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(QUIRE_AVX2)
    out[0].v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    out[1].v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
#else
    uint16_t bits[kPanel];
    memcpy(bits, p, sizeof bits);
    for (int i = 0; i < kPanel; ++i) out[i].v = half_to_float(bits[i]);
#endif
}

inline void store_panel(const Vec sums[kPanelVectors], const MatmulOutput& y, int64_t row, int64_t column) {
    float* const to = y.data + row * y.stride + column;
    for (int i = 0; i < kPanelVectors; ++i) {
        Vec value = sums[i];
        if (y.bias != nullptr) value = value + Vec::load(y.bias + column + i * Vec::kWidth);
        if (y.add) value = value + Vec::load(to + i * Vec::kWidth);
        value.store(to + i * Vec::kWidth);
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
