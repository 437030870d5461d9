// In place of csrc/cuda/mma.cuh, which is assembly: the same operations by the definitions of the PTX manual.
//
// Each lane leaves its registers in the warp's exchange; the last to come computes for all.
#pragma once

#include "numeric.cuh"

namespace quire {

template <typename Element>
uint32_t pack_pair(float low, float high) {
    const Element pair[2] = {from_float<Element>(low), from_float<Element>(high)};
    uint32_t bits;
    std::memcpy(&bits, pair, 4);
    return bits;
}

namespace emulated {

template <typename Element>
float half_of(uint32_t pair, int half) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * half);
    Element element;
    std::memcpy(&element, &bits, 2);
    return to_float(element);
}

// Row r, columns 2 t and 2 t + 1 of each matrix for lane 4 r + t, or, transposed, column r, rows 2 t and 2 t + 1.
inline void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed) {
    struct Lane { const void* row; uint32_t matrices[4]; };
    Lane& mine = emulation::warp_together(Lane{row}, [=](Lane* lanes) {
        for (int l = 0; l < 32; ++l) {
            if (reinterpret_cast<uintptr_t>(lanes[l].row) % 16 != 0) std::abort();  // a GPU would fault
            for (int m = 0; m < 4; ++m) {
                uint16_t pair[2];
                for (int i = 0; i < 2; ++i) {
                    const int r = transposed ? 2 * (l % 4) + i : l / 4, c = transposed ? l / 4 : 2 * (l % 4) + i;
                    std::memcpy(&pair[i], static_cast<const char*>(lanes[8 * m + r].row) + 2 * c, 2);
                }
                std::memcpy(&lanes[l].matrices[m], pair, 4);
            }
        }
    });
    std::memcpy(matrices, mine.matrices, sizeof matrices);
}

}  // namespace emulated

inline void load_matrices(uint32_t (&matrices)[4], const void* row) { emulated::load_matrices(matrices, row, false); }
inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
    emulated::load_matrices(matrices, row, true);
}

inline uint32_t transpose_matrix(uint32_t matrix) {
    struct Lane { uint32_t matrix, transposed; };
    return emulation::warp_together(Lane{matrix}, [](Lane* lanes) {
        for (int l = 0; l < 32; ++l) {
            const auto element = [&](int row, int column) {
                return lanes[4 * row + column / 2].matrix >> 16 * (column % 2) & 0xffff;
            };
            lanes[l].transposed = element(2 * (l % 4), l / 4) | element(2 * (l % 4) + 1, l / 4) << 16;
        }
    }).transposed;
}

template <typename Element>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Lane { float c[4]; uint32_t a[4], b[2]; };
    Lane given{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    Lane& mine = emulation::warp_together(given, [](Lane* lanes) {
        float left[16][16], right[16][8], sums[16][8];
        for (int l = 0; l < 32; ++l) {
            const int g = l / 4, t = l % 4;
            for (int i = 0; i < 2; ++i) {
                for (int half = 0; half < 2; ++half) {
                    left[g][8 * half + 2 * t + i] = emulated::half_of<Element>(lanes[l].a[2 * half], i);
                    left[g + 8][8 * half + 2 * t + i] = emulated::half_of<Element>(lanes[l].a[2 * half + 1], i);
                    right[8 * half + 2 * t + i][g] = emulated::half_of<Element>(lanes[l].b[half], i);
                }
                sums[g][2 * t + i] = lanes[l].c[i];
                sums[g + 8][2 * t + i] = lanes[l].c[2 + i];
            }
        }
        for (int m = 0; m < 16; ++m) {
            for (int k = 0; k < 16; ++k) {
                for (int n = 0; n < 8; ++n) sums[m][n] += left[m][k] * right[k][n];
            }
        }
        for (int l = 0; l < 32; ++l) {
            for (int i = 0; i < 4; ++i) lanes[l].c[i] = sums[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
        }
    });
    std::memcpy(c, mine.c, sizeof c);
}

inline float fast_exp2(float x) { return exp2f(x); }

}  // namespace quire
