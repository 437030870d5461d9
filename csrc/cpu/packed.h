// Packed weight matrices, the same for every instruction set.
//
// W [n, k] is cut into panels of kPanel = 16 rows (output columns); n is padded with zero rows. A panel is contiguous:
//
//   float32   [k][16] floats
//   bfloat16  [k / 2][16][2]: pairs along k, as VDPBF16PS takes them; an odd k is padded with a zero
//   codes     [k / 32] records, k padded with codes of value zero
//
// A record holds 32 values of each of the 16 rows, value = scale * code + min:
//
//   scales    [32 / group][16] float16, group 16 or 32 values a scale
//   mins      the same, only if the format has them; otherwise min = -scale * 2^(bits - 1)
//   codes     unsigned; a quad is 4 values of each row, 64 bytes as [16][4], what VPDPBUSD and VPMADDUBSW multiply.
//             8 bits: the 8 quads. Fewer: 4 vectors of 64 bytes, whose low nibbles are quads 0 to 3 and high ones 4 to 7,
//             5 bits: then 64 bytes, bit q of each the fifth bit of quad q,
//             6 bits: then 2 x 64 bytes, bits 2i and 2i + 1 of vector j the upper bits of quad 4j + i.
#pragma once

#include <stdint.h>

#include "quire_decoder.h"

namespace quire {

constexpr int kPanel = 16;
constexpr int kRecord = 32;  // values along k
constexpr int kQuadBytes = kPanel * 4;

struct WeightFormat {
    int bits;   // of a code; 16 and 32 are bfloat16 and float32
    int group;  // values a scale
    bool has_min;

    constexpr int groups() const { return kRecord / group; }
    constexpr int64_t scale_bytes() const { return groups() * kPanel * 2 * (has_min ? 2 : 1); }
    constexpr int64_t record_bytes() const { return scale_bytes() + kPanel * kRecord * bits / 8; }
    constexpr bool quantized() const { return bits <= 8; }
};

// False if `type` is no QuireWeightType.
inline bool format_of(int32_t type, WeightFormat* format) {
    switch (type) {
        case QUIRE_WEIGHT_FLOAT32: *format = {32, 0, false}; return true;
        case QUIRE_WEIGHT_BFLOAT16: *format = {16, 0, false}; return true;
        case QUIRE_WEIGHT_U4: *format = {4, 32, false}; return true;
        case QUIRE_WEIGHT_U4_MIN: *format = {4, 32, true}; return true;
        case QUIRE_WEIGHT_U5: *format = {5, 32, false}; return true;
        case QUIRE_WEIGHT_U5_MIN: *format = {5, 32, true}; return true;
        case QUIRE_WEIGHT_U6_16: *format = {6, 16, false}; return true;
        case QUIRE_WEIGHT_U8: *format = {8, 32, false}; return true;
        default: return false;
    }
}

inline int64_t padded_k(const WeightFormat& format, int64_t k) {
    if (format.quantized()) return (k + kRecord - 1) / kRecord * kRecord;
    return format.bits == 16 ? (k + 1) / 2 * 2 : k;
}

inline int64_t panel_bytes(const WeightFormat& format, int64_t k) {
    const int64_t padded = padded_k(format, k);
    return format.quantized() ? padded / kRecord * format.record_bytes() : padded * kPanel * format.bits / 8;
}

inline int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

}  // namespace quire
