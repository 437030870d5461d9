// AVX-512 on a machine that has AVX2, for tests: the intrinsics that the kernels use, by SIMDe (Debian's libsimde-dev,
// 0.7.4), and by loops over the lanes where that version lacks one. Built with QUIRE_EMULATE_AVX512=ON.
#pragma once

#include <immintrin.h>
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

// The compiler's own vectors of 512 bits cannot be passed around without AVX-512.
#define __m512 simde__m512
#define __m512d simde__m512d
#define __m512i simde__m512i
#define __m512bh simde__m512bh
#define __mmask16 simde__mmask16

#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_add_ps simde_mm512_add_ps
#define _mm512_and_si512 simde_mm512_and_si512
#define _mm512_castpd_ps simde_mm512_castpd_ps
#define _mm512_castps_pd simde_mm512_castps_pd
#define _mm512_castps_si512 simde_mm512_castps_si512
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#define _mm512_cmp_ps_mask simde_mm512_cmp_ps_mask
#define _mm512_div_ps simde_mm512_div_ps
#define _mm512_dpbf16_ps simde_mm512_dpbf16_ps
#define _mm512_dpbusd_epi32 simde_mm512_dpbusd_epi32
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_mask_or_epi32 simde_mm512_mask_or_epi32
#define _mm512_maskz_mov_ps simde_mm512_maskz_mov_ps
#define _mm512_max_ps simde_mm512_max_ps
#define _mm512_min_ps simde_mm512_min_ps
#define _mm512_mul_ps simde_mm512_mul_ps
#define _mm512_or_si512 simde_mm512_or_si512
#define _mm512_roundscale_ps simde_mm512_roundscale_ps
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_set1_epi8 simde_mm512_set1_epi8
#define _mm512_set1_ps simde_mm512_set1_ps
#define _mm512_setzero_si512 simde_mm512_setzero_si512
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#define _mm512_slli_epi16 simde_mm512_slli_epi16
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#define _mm512_srli_epi16 simde_mm512_srli_epi16
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#define _mm512_storeu_ps simde_mm512_storeu_ps
#define _mm512_sub_epi32 simde_mm512_sub_epi32
#define _mm512_sub_ps simde_mm512_sub_ps
#define _mm512_unpackhi_pd simde_mm512_unpackhi_pd
#define _mm512_unpackhi_ps simde_mm512_unpackhi_ps
#define _mm512_unpacklo_pd simde_mm512_unpacklo_pd
#define _mm512_unpacklo_ps simde_mm512_unpacklo_ps

// What 0.7.4 lacks, under the same names.
#define _mm512_cvtepi32_epi16 quire::emulated::narrow_to_words
#define _mm512_cvtepi32_epi8 quire::emulated::narrow_to_bytes
#define _mm512_cvtepi32_ps quire::emulated::to_floats
#define _mm512_cvtepi8_epi32 quire::emulated::widen_bytes
#define _mm512_cvtepu16_epi32 quire::emulated::widen_unsigned_words
#define _mm512_cvtph_ps quire::emulated::widen_halves
#define _mm512_cvtps_epi32 quire::emulated::to_integers
#define _mm512_reduce_add_ps quire::emulated::sum_of
#define _mm512_reduce_max_ps quire::emulated::largest_of

namespace quire {
namespace emulated {

// A vector's two halves as AVX2 has them, and back.
template <typename Whole, typename Half>
static inline Whole joined(Half low, Half high) {
    Whole whole;
    memcpy(&whole, &low, sizeof low);
    memcpy(reinterpret_cast<char*>(&whole) + sizeof low, &high, sizeof high);
    return whole;
}
template <typename Half, typename Whole>
static inline Half half_of(Whole whole, int index) {
    Half half;
    memcpy(&half, reinterpret_cast<const char*>(&whole) + index * sizeof half, sizeof half);
    return half;
}

// Lanes of 32 bits to their low 16 or 8, as the instructions without saturation do.
static inline __m256i narrow_to_words(__m512i v) {
    int32_t lanes[16];
    int16_t words[16];
    memcpy(lanes, &v, sizeof lanes);
    for (int i = 0; i < 16; ++i) words[i] = static_cast<int16_t>(lanes[i]);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}
static inline __m128i narrow_to_bytes(__m512i v) {
    int32_t lanes[16];
    int8_t bytes[16];
    memcpy(lanes, &v, sizeof lanes);
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(lanes[i]);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

static inline __m512 to_floats(__m512i v) {
    return joined<__m512>(_mm256_cvtepi32_ps(half_of<__m256i>(v, 0)), _mm256_cvtepi32_ps(half_of<__m256i>(v, 1)));
}
static inline __m512i to_integers(__m512 v) {
    return joined<__m512i>(_mm256_cvtps_epi32(half_of<__m256>(v, 0)), _mm256_cvtps_epi32(half_of<__m256>(v, 1)));
}
static inline __m512i widen_bytes(__m128i v) {
    return joined<__m512i>(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}
static inline __m512i widen_unsigned_words(__m256i v) {
    return joined<__m512i>(_mm256_cvtepu16_epi32(half_of<__m128i>(v, 0)), _mm256_cvtepu16_epi32(half_of<__m128i>(v, 1)));
}
static inline __m512 widen_halves(__m256i v) {
    return joined<__m512>(_mm256_cvtph_ps(half_of<__m128i>(v, 0)), _mm256_cvtph_ps(half_of<__m128i>(v, 1)));
}

// The upper half onto the lower one until one lane is left: the order in which compilers expand these.
static inline float sum_of(__m512 v) {
    float lanes[16];
    memcpy(lanes, &v, sizeof lanes);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}
static inline float largest_of(__m512 v) {
    float lanes[16];
    memcpy(lanes, &v, sizeof lanes);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    }
    return lanes[0];
}

}  // namespace emulated
}  // namespace quire
