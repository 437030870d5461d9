// The vector intrinsics of the instruction set that this file is compiled for. One of these is defined, or none:
//
//   QUIRE_AVX512   F, BW, CD, DQ, VL and VNNI; with QUIRE_AVX512_BF16 beside it, BF16 as well
//   QUIRE_AVX2     AVX2, FMA and F16C
#pragma once

#if defined(QUIRE_EMULATE_AVX512)
#include "emulated_avx512.h"
#define QUIRE_AVX512
#elif defined(__AVX512VNNI__)
#include <immintrin.h>
#define QUIRE_AVX512
#if defined(__AVX512BF16__)
#define QUIRE_AVX512_BF16
#endif
#elif defined(__AVX2__)
#include <immintrin.h>
#define QUIRE_AVX2
#endif
