// Rows of signed bytes times a panel of packed codes (packed.h): up to kMaxRows rows by 16 columns at a time.
//
// Within a record integers are multiplied and added exactly; then out += scale_w * scale_x * sum, in float32, record after
// record. An output's additions are in the order of k whatever rows stand beside it.
#include "code_products.h"
#include "prefetch.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

template <int kBits, int kGroup, bool kHasMin>
struct Record {
    static constexpr WeightFormat kFormat{kBits, kGroup, kHasMin};
    static constexpr int kGroups = kRecord / kGroup;
    static constexpr int64_t kBytes = kFormat.record_bytes();

    const uint8_t* data;

    const uint8_t* scales(int group) const { return data + group * 2 * kPanel; }
    const uint8_t* mins(int group) const { return data + (kGroups + group) * 2 * kPanel; }
    const uint8_t* codes() const { return data + kFormat.scale_bytes(); }
    const uint8_t* plane() const { return codes() + 4 * kQuadBytes; }

    // Quad kQuad of half kSecond.
    template <bool kSecond, int kQuad>
    Codes quad() const {
        if (kBits == 8) return load_codes(codes() + (kSecond ? 4 * kQuadBytes : 0) + kQuad * kQuadBytes);
        const Codes packed = load_codes(codes() + kQuad * kQuadBytes);
        const Codes nibbles = kSecond ? high_nibbles(packed) : low_nibbles(packed);
        if (kBits == 5) return merged(nibbles, bits<(kSecond ? 4 : 0) + kQuad, 4, 1>(load_codes(plane())));
        if (kBits == 6) {
            return merged(nibbles, bits<2 * kQuad, 4, 3>(load_codes(plane() + (kSecond ? kQuadBytes : 0))));
        }
        return nibbles;
    }
};

// What follows must be inlined whole, or the sums would live in memory rather than in registers.
#define QUIRE_INLINE inline __attribute__((always_inline))

// One quad of the record times that of each row, which begins at codes + kQuad's place.
template <bool kSecond, int kQuad, int kRows, int kBits, int kGroup, bool kHasMin>
QUIRE_INLINE void add_quad(const Record<kBits, kGroup, kHasMin>& record, const int8_t* codes, int64_t stride,
                           Dot<kBits> (&dots)[kRows]) {
    const auto quad = Dot<kBits>::operand(record.template quad<kSecond, kQuad>());
    codes += (kSecond ? 16 : 0) + 4 * kQuad;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dots[r].add(quad, load_quad(codes + r * stride));
    if (kBits == 6 ? kQuad % 2 == 1 : kQuad == 3) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) dots[r].carry();
    }
}

template <bool kSecond, int kRows, int kBits, int kGroup, bool kHasMin>
QUIRE_INLINE void add_half(const Record<kBits, kGroup, kHasMin>& record, const int8_t* codes, int64_t stride,
                           Dot<kBits> (&dots)[kRows]) {
    add_quad<kSecond, 0>(record, codes, stride, dots);
    add_quad<kSecond, 1>(record, codes, stride, dots);
    add_quad<kSecond, 2>(record, codes, stride, dots);
    add_quad<kSecond, 3>(record, codes, stride, dots);
}

template <int kRows, int kBits>
QUIRE_INLINE void zero(Dot<kBits> (&dots)[kRows]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dots[r].zero();
}

// out += scale_w * scale_x * (sum - offset), or with a minimum, + min * total.
template <int kRows, int kBits, int kGroup, bool kHasMin>
QUIRE_INLINE void scale_group(const Record<kBits, kGroup, kHasMin>& record, int group, const RecordScale* scales,
                              int64_t stride, const Dot<kBits> (&dots)[kRows], Vec (&out)[kRows][kPanelVectors]) {
    Vec scale[kPanelVectors], min[kPanelVectors];
    load_half_panel(record.scales(group), scale);
    if (kHasMin) load_half_panel(record.mins(group), min);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        const RecordScale& x = scales[r * stride];
        const Vec factor = Vec::set1(x.scale);
        Vec both[kPanelVectors];
        for (int i = 0; i < kPanelVectors; ++i) both[i] = scale[i] * factor;
        if (kHasMin) {
            const Vec total = Vec::set1(x.total);
            for (int i = 0; i < kPanelVectors; ++i) out[r][i] = fma(min[i], total, out[r][i]);
            dots[r].scale_into(out[r], 0, both);
        } else {
            const int32_t sum = kGroup == kRecord ? x.half_sums[0] + x.half_sums[1] : x.half_sums[group];
            dots[r].scale_into(out[r], sum * (1 << (kBits - 1)), both);
        }
    }
}

// `next`: what will be read next of the weights, of which `step` bytes are asked for with each record.
template <int kRows, int kBits, int kGroup, bool kHasMin>
__attribute__((noinline)) void multiply_rows(const uint8_t* panel, const uint8_t* next, int64_t step, int64_t num_records,
                                             const QuantizedRows& x, int64_t row, const MatmulOutput& y,
                                             int64_t column) {
    using TheRecord = Record<kBits, kGroup, kHasMin>;
    const int8_t* codes = x.codes + row * x.stride;
    const int64_t stride = x.stride, scale_stride = x.stride / kRecord;
    const RecordScale* scales = x.records + row * scale_stride;
    Vec out[kRows][kPanelVectors];
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kPanelVectors; ++i) out[r][i] = Vec::set1(0.0f);
    }
    for (int64_t i = 0; i < num_records; ++i, panel += TheRecord::kBytes, codes += kRecord, ++scales) {
        const TheRecord record{panel};
        for (const uint8_t* const end = next + step; next < end; next += kCacheLine) __builtin_prefetch(next, 0, 2);
        Dot<kBits> dots[kRows];
        zero(dots);
        add_half<false>(record, codes, stride, dots);
        if (kGroup == 16) {
            scale_group(record, 0, scales, scale_stride, dots, out);
            zero(dots);
        }
        add_half<true>(record, codes, stride, dots);
        scale_group(record, kGroup == 16 ? 1 : 0, scales, scale_stride, dots, out);
    }
    for (int r = 0; r < kRows; ++r) store_panel(out[r], y, row + r, column);
}

// multiply_rows<rows>, found at compile time.
template <int kRows, int kBits, int kGroup, bool kHasMin, typename... Args>
void multiply_some(int64_t rows, const Args&... args) {
    if (rows == kRows) return multiply_rows<kRows, kBits, kGroup, kHasMin>(args...);
    if constexpr (kRows > 1) multiply_some<kRows - 1, kBits, kGroup, kHasMin>(rows, args...);
}

template <int kBits, int kGroup, bool kHasMin>
void multiply(const QuireWeight& w, const QuantizedRows& x, const MatmulRange& range, const MatmulOutput& y) {
    constexpr int kMaxRows = rows_at_once<kBits>();
    constexpr WeightFormat kFormat{kBits, kGroup, kHasMin};
    const int64_t num_records = padded_k(kFormat, w.k) / kRecord, bytes = panel_bytes(kFormat, w.k);
    // While a panel is multiplied the next one is fetched, a part with each tile of rows: too many rows are multiplied
    // between two of its lines for the hardware to foresee them.
    const int64_t num_tiles = (range.end_row - range.first_row + kMaxRows - 1) / kMaxRows;
    const int64_t step = (kFormat.record_bytes() / num_tiles + kCacheLine - 1) / kCacheLine * kCacheLine;
    for (int64_t p = range.first_panel; p < range.end_panel; ++p) {
        const uint8_t* const panel = static_cast<const uint8_t*>(w.data) + p * bytes;
        const int64_t column = (p - range.first_panel) * kPanel;
        const uint8_t *next = panel + bytes, *const end = next + bytes;  // a prefetch past the last panel does no harm
        int64_t row = range.first_row;
        while (row < range.end_row) {
            // Tiles of like size, rather than a full one and a rest.
            const int64_t left = range.end_row - row, tiles = (left + kMaxRows - 1) / kMaxRows;
            const int64_t rows = (left + tiles - 1) / tiles;
            multiply_some<kMaxRows, kBits, kGroup, kHasMin>(rows, panel, next, next < end ? step : 0, num_records, x, row,
                                                            y, column);
            row += rows;
            next += num_records * step;
        }
    }
}

}  // namespace

void matmul_quantized(const QuireWeight& w, const QuantizedRows& x, const MatmulRange& range, const MatmulOutput& y) {
    switch (w.type) {
        case QUIRE_WEIGHT_U4: multiply<4, 32, false>(w, x, range, y); break;
        case QUIRE_WEIGHT_U4_MIN: multiply<4, 32, true>(w, x, range, y); break;
        case QUIRE_WEIGHT_U5: multiply<5, 32, false>(w, x, range, y); break;
        case QUIRE_WEIGHT_U5_MIN: multiply<5, 32, true>(w, x, range, y); break;
        case QUIRE_WEIGHT_U6_16: multiply<6, 16, false>(w, x, range, y); break;
        default: multiply<8, 32, false>(w, x, range, y); break;
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
