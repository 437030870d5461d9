// float16 and bfloat16 as bits, without the machine's help.
#pragma once

#include <stdint.h>
#include <string.h>

namespace quire {

inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float float_of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    return float_of_bits(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | (mantissa << 13));
}

// To nearest even; too large becomes infinity.
inline uint16_t half_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
    if (bits < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
        const float scaled = float_of_bits(bits) * 16777216.0f;
        const uint32_t whole = static_cast<uint32_t>(scaled);
        const float rest = scaled - static_cast<float>(whole);
        return static_cast<uint16_t>(sign | (whole + (rest > 0.5f || (rest == 0.5f && (whole & 1)))));
    }
    const uint32_t rounded = bits + 0xfff + ((bits >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float float_of_bfloat16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

// To nearest even; a NaN stays one.
inline uint16_t bfloat16_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace quire
