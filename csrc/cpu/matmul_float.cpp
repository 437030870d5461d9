// Rows of float32 times a panel of float32 or bfloat16 weights (packed.h): up to kMaxRows rows by 16 columns at a time.
//
// An output is one chain of fused multiply-adds in the order of k, whatever rows stand beside it.
#include "panel.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

constexpr int kMaxRows = Vec::kWidth == 1 ? 2 : Vec::kWidth == 8 ? 6 : 12;

// The weights of 16 columns at k (and k + 1).
struct FloatStep {
    using Weight = float;
    static constexpr int kValues = 1;

    static void load(const float* panel, Vec out[1][kPanelVectors]) {
        for (int i = 0; i < kPanelVectors; ++i) out[0][i] = Vec::load(panel + i * Vec::kWidth);
    }
};

struct PairStep {
    using Weight = BFloat16;
    static constexpr int kValues = 2;

    static void load(const BFloat16* panel, Vec out[2][kPanelVectors]) {
        for (int i = 0; i < kPanelVectors; ++i) load_pairs(panel + 2 * i * Vec::kWidth, &out[0][i], &out[1][i]);
    }
};

template <int kRows, typename Step>
void multiply_rows(const typename Step::Weight* panel, int64_t k, const float* x, int64_t x_stride, int64_t row,
                   const MatmulOutput& y, int64_t column) {
    Vec sums[kRows][kPanelVectors];
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kPanelVectors; ++i) sums[r][i] = Vec::set1(0.0f);
    }
    const float* const first = x + row * x_stride;
    int64_t at = 0;
    for (; at + Step::kValues <= k; at += Step::kValues) {
        Vec weights[Step::kValues][kPanelVectors];
        Step::load(panel + at * kPanel, weights);
        for (int v = 0; v < Step::kValues; ++v) {
            for (int r = 0; r < kRows; ++r) {
                const Vec value = Vec::set1(first[r * x_stride + at + v]);
                for (int i = 0; i < kPanelVectors; ++i) sums[r][i] = fma(value, weights[v][i], sums[r][i]);
            }
        }
    }
    if (at < k) {  // the last of an odd number, beside its padding
        Vec weights[Step::kValues][kPanelVectors];
        Step::load(panel + at * kPanel, weights);
        for (int r = 0; r < kRows; ++r) {
            const Vec value = Vec::set1(first[r * x_stride + at]);
            for (int i = 0; i < kPanelVectors; ++i) sums[r][i] = fma(value, weights[0][i], sums[r][i]);
        }
    }
    for (int r = 0; r < kRows; ++r) store_panel(sums[r], y, row + r, column);
}

// multiply_rows<rows>, found at compile time.
template <int kRows, typename Step, typename... Args>
void multiply_some(int64_t rows, Args... args) {
    if (rows == kRows) return multiply_rows<kRows, Step>(args...);
    if constexpr (kRows > 1) multiply_some<kRows - 1, Step>(rows, args...);
}

template <typename Step>
void multiply(const QuireWeight& w, const float* x, int64_t x_stride, const MatmulRange& range, const MatmulOutput& y) {
    WeightFormat format{};
    format_of(w.type, &format);
    const int64_t bytes = panel_bytes(format, w.k);
    for (int64_t p = range.first_panel; p < range.end_panel; ++p) {
        const auto* panel =
            reinterpret_cast<const typename Step::Weight*>(static_cast<const uint8_t*>(w.data) + p * bytes);
        for (int64_t row = range.first_row; row < range.end_row;) {
            // Tiles of like size, rather than full ones and a rest.
            const int64_t left = range.end_row - row, tiles = (left + kMaxRows - 1) / kMaxRows;
            const int64_t rows = (left + tiles - 1) / tiles;
            multiply_some<kMaxRows, Step>(rows, panel, int64_t{w.k}, x, x_stride, row, y,
                                          (p - range.first_panel) * kPanel);
            row += rows;
        }
    }
}

}  // namespace

void matmul_float(const QuireWeight& w, const float* x, int64_t x_stride, const MatmulRange& range,
                  const MatmulOutput& y) {
    if (w.type == QUIRE_WEIGHT_FLOAT32) {
        multiply<FloatStep>(w, x, x_stride, range, y);
    } else {
        multiply<PairStep>(w, x, x_stride, range, y);
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
