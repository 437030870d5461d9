// Rows of bfloat16 times a panel of bfloat16 weights (packed.h) by VDPBF16PS: up to kMaxRows rows by 16 columns at a time.
//
// An instruction adds a pair's two products to a float32 sum. An output is one chain of them in the order of k, whatever
// rows stand beside it.
#include "panel.h"

namespace quire {
namespace QUIRE_ISA {

#if defined(QUIRE_AVX512_BF16)

namespace {

constexpr int kMaxRows = 12;

template <int kRows>
void multiply_rows(const uint16_t* panel, int64_t num_pairs, const RoundedRows& x, int64_t row, const MatmulOutput& y,
                   int64_t column) {
    Vec sums[kRows][kPanelVectors];
    for (int r = 0; r < kRows; ++r) sums[r][0] = Vec::set1(0.0f);
    const uint16_t* const first = x.values + row * x.stride;
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
        const __m512bh weights = (__m512bh)_mm512_loadu_si512(panel + pair * 2 * kPanel);
        for (int r = 0; r < kRows; ++r) {
            int32_t values;
            memcpy(&values, first + r * x.stride + 2 * pair, sizeof values);
            sums[r][0].v = _mm512_dpbf16_ps(sums[r][0].v, (__m512bh)_mm512_set1_epi32(values), weights);
        }
    }
    for (int r = 0; r < kRows; ++r) store_panel(sums[r], y, row + r, column);
}

// multiply_rows<rows>, found at compile time.
template <int kRows, typename... Args>
void multiply_some(int64_t rows, const Args&... args) {
    if (rows == kRows) return multiply_rows<kRows>(args...);
    if constexpr (kRows > 1) multiply_some<kRows - 1>(rows, args...);
}

}  // namespace

void matmul_bfloat16(const QuireWeight& w, const RoundedRows& x, const MatmulRange& range, const MatmulOutput& y) {
    WeightFormat format{};
    format_of(w.type, &format);
    const int64_t bytes = panel_bytes(format, w.k), num_pairs = padded_k(format, w.k) / 2;
    for (int64_t p = range.first_panel; p < range.end_panel; ++p) {
        const auto* panel = reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(w.data) + p * bytes);
        const int64_t column = (p - range.first_panel) * kPanel;
        for (int64_t row = range.first_row; row < range.end_row;) {
            // Tiles of like size, rather than full ones and a rest.
            const int64_t left = range.end_row - row, tiles = (left + kMaxRows - 1) / kMaxRows;
            const int64_t rows = (left + tiles - 1) / tiles;
            multiply_some<kMaxRows>(rows, panel, num_pairs, x, row, y, column);
            row += rows;
        }
    }
}

void decoder_round(const float* x, int64_t row, int64_t begin, int64_t end, const RoundedRows& out) {
    uint16_t* const to = out.values + row * out.stride;
    int64_t at = begin;
    for (; at + Vec::kWidth <= end; at += Vec::kWidth) Vec::load(x + at).store(reinterpret_cast<BFloat16*>(to + at));
    if (at == end) return;
    // The end of x; zeros where the last pair has no second value.
    load_partial(x + at, end - at).store(reinterpret_cast<BFloat16*>(to + at));
}

#endif

}  // namespace QUIRE_ISA
}  // namespace quire
