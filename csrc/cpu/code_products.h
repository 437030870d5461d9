// A quad of a panel's codes (packed.h) times a quad of a row: in each instruction set its own way, exact in integers.
// Included by sources compiled once per set (vec.h).
//
// AVX2 has no dot product of bytes that adds up in 32 bits. VPMADDUBSW adds pairs of products in 16 bits, which codes of 4
// bits can fill for a whole record (8 * 2 * 15 * 127 < 2^15), of 5 bits for 4 quads, of 6 bits for 2. Codes of 8 bits, less
// their offset, give their signs to the row's (2 * 128 * 127 < 2^15), and each pair is widened at once.
#pragma once

#include "panel.h"

namespace quire {
namespace QUIRE_ISA {

// Codes: one quad of a panel; operand() makes of it what rows are multiplied with. Dot: sums for its 16 columns, of which
// carry() is called after each 4 quads, with 6 bits 2.
#if defined(QUIRE_AVX512)

using Codes = __m512i;

inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes low_nibbles(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
inline Codes high_nibbles(Codes c) { return _mm512_and_si512(_mm512_srli_epi16(c, 4), _mm512_set1_epi8(15)); }
// Bits `from` and up, as many as `mask` has, moved to where the mask is.
template <int kFrom, int kTo, int kMask>
inline Codes bits(Codes c) {
    constexpr int kShift = kTo - kFrom;
    const Codes moved = kShift >= 0 ? _mm512_slli_epi16(c, kShift >= 0 ? kShift : 0)
                                    : _mm512_srli_epi16(c, kShift < 0 ? -kShift : 0);
    return _mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(kMask << kTo)));
}
inline Codes merged(Codes a, Codes b) { return _mm512_or_si512(a, b); }

template <int kBits>
struct Dot {
    __m512i sums;

    static Codes operand(Codes c) { return c; }
    void zero() { sums = _mm512_setzero_si512(); }
    void add(Codes codes, int32_t quad) { sums = _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(quad)); }
    void carry() {}
    // out += (sums - offset) * scale
    void scale_into(Vec* out, int32_t offset, const Vec* scale) const {
        const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(offset)));
        *out = fma({exact}, *scale, *out);
    }
};

#elif defined(QUIRE_AVX2)

struct Codes {
    __m256i v[2];
};

inline Codes load_codes(const uint8_t* p) {
    const __m256i* const from = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
}
inline Codes low_nibbles(Codes c) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(c.v[0], mask), _mm256_and_si256(c.v[1], mask)}};
}
inline Codes high_nibbles(Codes c) {
    return low_nibbles({{_mm256_srli_epi16(c.v[0], 4), _mm256_srli_epi16(c.v[1], 4)}});
}
template <int kFrom, int kTo, int kMask>
inline Codes bits(Codes c) {
    constexpr int kShift = kTo - kFrom;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(kMask << kTo));
    Codes moved;
    for (int i = 0; i < 2; ++i) {
        const __m256i shifted = kShift >= 0 ? _mm256_slli_epi16(c.v[i], kShift >= 0 ? kShift : 0)
                                            : _mm256_srli_epi16(c.v[i], kShift < 0 ? -kShift : 0);
        moved.v[i] = _mm256_and_si256(shifted, mask);
    }
    return moved;
}
inline Codes merged(Codes a, Codes b) {
    return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}};
}

// pairs += codes * quad, in 16 bits.
inline __attribute__((always_inline)) void add_products(const Codes& codes, int32_t quad, __m256i pairs[2]) {
    const __m256i x = _mm256_set1_epi32(quad);
    for (int i = 0; i < 2; ++i) {
        __m256i sum = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(codes.v[i], x));
        // GCC would put off all additions of a record to its end, and have no registers for what they add.
        __asm__("" : "+x"(sum));
        pairs[i] = sum;
    }
}

// out += (sums - offset) * scale
inline void scale_sums(const __m256i sums[2], Vec* out, int32_t offset, const Vec* scale) {
    for (int i = 0; i < 2; ++i) {
        const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[i], _mm256_set1_epi32(offset)));
        out[i] = fma({exact}, scale[i], out[i]);
    }
}

// 5 and 6 bits: carry() moves the 16-bit sums into 32-bit ones.
template <int kBits>
struct Dot {
    __m256i pairs[2], sums[2];

    static const Codes& operand(const Codes& c) { return c; }
    void zero() { pairs[0] = pairs[1] = sums[0] = sums[1] = _mm256_setzero_si256(); }
    void add(const Codes& codes, int32_t quad) { add_products(codes, quad, pairs); }
    void carry() {
        for (int i = 0; i < 2; ++i) {
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs[i], _mm256_set1_epi16(1)));
            pairs[i] = _mm256_setzero_si256();
        }
    }
    void scale_into(Vec* out, int32_t offset, const Vec* scale) const { scale_sums(sums, out, offset, scale); }
};

template <>
struct Dot<4> {
    __m256i pairs[2];

    static const Codes& operand(const Codes& c) { return c; }
    void zero() { pairs[0] = pairs[1] = _mm256_setzero_si256(); }
    void add(const Codes& codes, int32_t quad) { add_products(codes, quad, pairs); }
    void carry() {}
    void scale_into(Vec* out, int32_t offset, const Vec* scale) const {
        const __m256i ones = _mm256_set1_epi16(1);
        const __m256i sums[2] = {_mm256_madd_epi16(pairs[0], ones), _mm256_madd_epi16(pairs[1], ones)};
        scale_sums(sums, out, offset, scale);
    }
};

template <>
struct Dot<8> {
    struct Operand {
        Codes values, sizes;
    };

    __m256i sums[2];

    static Operand operand(const Codes& c) {
        Operand x;
        for (int i = 0; i < 2; ++i) {
            x.values.v[i] = _mm256_xor_si256(c.v[i], _mm256_set1_epi8(-128));
            x.sizes.v[i] = _mm256_abs_epi8(x.values.v[i]);
        }
        return x;
    }
    void zero() { sums[0] = sums[1] = _mm256_setzero_si256(); }
    __attribute__((always_inline)) void add(const Operand& codes, int32_t quad) {
        const __m256i x = _mm256_set1_epi32(quad);
        for (int i = 0; i < 2; ++i) {
            const __m256i pairs = _mm256_maddubs_epi16(codes.sizes.v[i], _mm256_sign_epi8(x, codes.values.v[i]));
            __m256i sum = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            __asm__("" : "+x"(sum));  // as above
            sums[i] = sum;
        }
    }
    void carry() {}
    // The codes' offset is no part of the sums.
    void scale_into(Vec* out, int32_t, const Vec* scale) const { scale_sums(sums, out, 0, scale); }
};

#else

struct Codes {
    uint8_t v[kQuadBytes];
};

inline Codes load_codes(const uint8_t* p) {
    Codes codes;
    memcpy(codes.v, p, sizeof codes.v);
    return codes;
}
template <int kFrom, int kTo, int kMask>
inline Codes bits(Codes c) {
    for (uint8_t& code : c.v) code = static_cast<uint8_t>(((code >> kFrom) & kMask) << kTo);
    return c;
}
inline Codes low_nibbles(const Codes& c) { return bits<0, 0, 15>(c); }
inline Codes high_nibbles(const Codes& c) { return bits<4, 0, 15>(c); }
inline Codes merged(Codes a, const Codes& b) {
    for (int i = 0; i < kQuadBytes; ++i) a.v[i] |= b.v[i];
    return a;
}

template <int kBits>
struct Dot {
    int32_t sums[kPanel];

    static const Codes& operand(const Codes& c) { return c; }
    void zero() { __builtin_memset(sums, 0, sizeof sums); }
    void add(const Codes& codes, int32_t quad) {
        int8_t x[4];
        memcpy(x, &quad, sizeof x);
        for (int i = 0; i < kQuadBytes; ++i) sums[i / 4] += codes.v[i] * x[i % 4];
    }
    void carry() {}
    void scale_into(Vec* out, int32_t offset, const Vec* scale) const {
        for (int i = 0; i < kPanel; ++i) out[i] = fma({static_cast<float>(sums[i] - offset)}, scale[i], out[i]);
    }
};

#endif

inline int32_t load_quad(const int8_t* p) {
    int32_t quad;
    memcpy(&quad, p, sizeof quad);
    return quad;
}

#if defined(QUIRE_AVX2)
template <int kBits>
constexpr int rows_at_once() {
    return kBits == 4 ? 6 : kBits == 8 ? 4 : 3;
}
#else
template <int kBits>
constexpr int rows_at_once() {
    return Vec::kWidth == 1 ? 2 : 8;
}
#endif

}  // namespace QUIRE_ISA
}  // namespace quire
