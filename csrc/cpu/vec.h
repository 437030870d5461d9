// One vector of floats, in the width of the instruction set that this file is compiled for.
//
// Each kernel source is compiled once per instruction set, with -DQUIRE_ISA=<scalar|avx2|avx512|avx512_bf16> and its flags,
// into a namespace of that name. Such a source must not use inline functions of the standard library: the linker keeps
// one copy of them for the whole library, which could be one that the machine cannot run.
#pragma once

#include <stdint.h>
#include <string.h>

#include "intrinsics.h"

#ifndef QUIRE_ISA
#error "compile with -DQUIRE_ISA=scalar, avx2, avx512 or avx512_bf16"
#endif

namespace quire {
namespace QUIRE_ISA {

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void from_float(float value, float* out) { *out = value; }

// Round to nearest even; a NaN stays one.
inline void from_float(float value, BFloat16* out) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) {
        out->bits = static_cast<uint16_t>((bits >> 16) | 0x40);
    } else {
        out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

#if defined(QUIRE_AVX512)

// GCC 12 takes the _mm512_undefined_*() of its own headers for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

struct Vec {
    static constexpr int kWidth = 16;
    __m512 v;

    static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const BFloat16* p) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
    }
    static Vec load(const int8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(BFloat16* p) const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i high = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        high = _mm512_mask_or_epi32(high, nan, bits, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
    }
    // Rounded to nearest even; lanes are from -128 to 127.
    void store(int8_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    float sum() const { return _mm512_reduce_add_ps(v); }
    float largest() const { return _mm512_reduce_max_ps(v); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Of a NaN and a number, the second operand.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec zero_where_less(Vec value, Vec x, Vec bound) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), value.v)};
}
// 2^n for whole n from -126 to 127.
inline Vec power_of_two(Vec n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}

// kWidth pairs: the first of each, and the second.
inline void load_pairs(const BFloat16* p, Vec* first, Vec* second) {
    const __m512i pairs = _mm512_loadu_si512(p);
    first->v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second->v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline void transpose(Vec r[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; ++i) {  // b[4g + i]: column i of each 128-bit lane, rows 4g .. 4g + 3
        const __m512 x = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
        const __m512 y = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        const __m512 z = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
        const __m512 w = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        r[i].v = _mm512_shuffle_f32x4(x, y, 0x88);
        r[4 + i].v = _mm512_shuffle_f32x4(z, w, 0x88);
        r[8 + i].v = _mm512_shuffle_f32x4(x, y, 0xdd);
        r[12 + i].v = _mm512_shuffle_f32x4(z, w, 0xdd);
    }
}

#elif defined(QUIRE_AVX2)

struct Vec {
    static constexpr int kWidth = 8;
    __m256 v;

    static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const BFloat16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
    }
    static Vec load(const int8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(BFloat16* p) const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    // Rounded to nearest even; lanes are from -128 to 127.
    void store(int8_t* p) const {
        const __m256i wide = _mm256_cvtps_epi32(v);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
    }
    float sum() const {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    float largest() const {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// Of a NaN and a number, the second operand.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec zero_where_less(Vec value, Vec x, Vec bound) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_NLT_UQ), value.v)};
}
// 2^n for whole n from -126 to 127.
inline Vec power_of_two(Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

// kWidth pairs: the first of each, and the second.
inline void load_pairs(const BFloat16* p, Vec* first, Vec* second) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    first->v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    second->v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline void transpose(Vec r[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
        a[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        r[i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
        r[4 + i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}

#else

struct Vec {
    static constexpr int kWidth = 1;
    float v;

    static Vec set1(float x) { return {x}; }
    static Vec load(const float* p) { return {*p}; }
    static Vec load(const BFloat16* p) { return {to_float(*p)}; }
    static Vec load(const int8_t* p) { return {static_cast<float>(*p)}; }
    void store(float* p) const { *p = v; }
    void store(BFloat16* p) const { from_float(v, p); }
    void store(int8_t* p) const { *p = static_cast<int8_t>(__builtin_rintf(v)); }
    float sum() const { return v; }
    float largest() const { return v; }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec round(Vec a) { return {__builtin_rintf(a.v)}; }
inline void load_pairs(const BFloat16* p, Vec* first, Vec* second) {
    first->v = to_float(p[0]);
    second->v = to_float(p[1]);
}
inline void transpose(Vec[1]) {}

#endif

#if defined(QUIRE_AVX2) || defined(QUIRE_AVX512)

// 2^n * 2^f for whole n and f from -0.5 to 0.5: minimax polynomial of degree 6, relative error 5e-9 before rounding.
inline Vec scaled_exp2(Vec n, Vec f) {
    Vec p = Vec::set1(0.00015461447f);
    p = fma(p, f, Vec::set1(0.0013390867f));
    p = fma(p, f, Vec::set1(0.0096180569f));
    p = fma(p, f, Vec::set1(0.055503570f));
    p = fma(p, f, Vec::set1(0.24022651f));
    p = fma(p, f, Vec::set1(0.69314718f));
    p = fma(p, f, Vec::set1(1.0f));
    return p * power_of_two(n);
}

// 2^x for x <= 127: exactly 1 at 0, exactly 0 below -126 (no subnormals), NaN for NaN.
inline Vec exp2(Vec x) {
    const Vec low = Vec::set1(-126.0f);
    const Vec clamped = max(low, x);
    const Vec n = round(clamped);
    return zero_where_less(scaled_exp2(n, clamped - n), x, low);
}

// e^x, with x clamped to where the result is a normal number; NaN for NaN.
inline Vec exp(Vec x) {
    const Vec clamped = max(Vec::set1(-87.0f), min(Vec::set1(88.0f), x));
    const Vec n = round(clamped * Vec::set1(1.44269504f));
    Vec f = fma(clamped, Vec::set1(1.44269502f), Vec::set1(0.0f) - n);
    f = fma(clamped, Vec::set1(1.92596299e-8f), f);  // the rest of log2(e), so that large x stays exact
    return scaled_exp2(n, f);
}

#else

inline Vec exp2(Vec x) { return {x.v < -126.0f ? 0.0f : __builtin_exp2f(x.v)}; }
inline Vec exp(Vec x) {
    const float low = x.v < -87.0f ? -87.0f : x.v;
    return {__builtin_expf(low > 88.0f ? 88.0f : low)};
}

#endif

// The last n < kWidth elements of a row; lanes past them are zero.
template <typename T>
inline Vec load_partial(const T* p, int64_t n) {
    float lanes[Vec::kWidth] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
    return Vec::load(lanes);
}

template <typename T>
inline void store_partial(Vec x, T* p, int64_t n) {
    float lanes[Vec::kWidth];
    x.store(lanes);
    for (int64_t i = 0; i < n; ++i) from_float(lanes[i], p + i);
}

}  // namespace QUIRE_ISA
}  // namespace quire
