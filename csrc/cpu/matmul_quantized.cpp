// Rows of signed bytes times a panel of packed codes (packed.h): up to kMaxRows rows by 16 columns at a time.
//
// Within a record integers are multiplied and added exactly; then out += scale_w * scale_x * sum, in float32, record after
// record. An output's additions are in the order of k whatever rows stand beside it.
//
// AVX2 has no dot product of bytes that adds up in 32 bits. VPMADDUBSW adds pairs of products in 16 bits, which codes of 4
// bits can fill for a whole record (8 * 2 * 15 * 127 < 2^15), of 5 bits for 4 quads, of 6 bits for 2; codes of 8 bits are
// multiplied as two nibbles.
#include "panel.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

// One quad of a panel's codes, and sums for its 16 columns.
#if defined(__AVX512VNNI__)

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

    void zero() { sums = _mm512_setzero_si512(); }
    void add(Codes codes, int32_t quad) { sums = _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(quad)); }
    void carry() {}
    // out += (sums - offset) * scale
    void scale_into(Vec* out, int32_t offset, const Vec* scale) const {
        const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(offset)));
        *out = fma({exact}, *scale, *out);
    }
};

#elif defined(__AVX2__)

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
    Dot<4> low, high;

    void zero() { low.zero(), high.zero(); }
    void add(const Codes& low_codes, const Codes& high_codes, int32_t quad) {
        low.add(low_codes, quad), high.add(high_codes, quad);
    }
    void carry() {}
    void scale_into(Vec* out, int32_t offset, const Vec* scale) const {
        __m256i sums[2];
        for (int i = 0; i < 2; ++i) {
            sums[i] = _mm256_add_epi32(_mm256_madd_epi16(low.pairs[i], _mm256_set1_epi16(1)),
                                       _mm256_madd_epi16(high.pairs[i], _mm256_set1_epi16(16)));
        }
        scale_sums(sums, out, offset, scale);
    }
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

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr bool kNibbles8 = true;  // codes of 8 bits are multiplied as nibbles
template <int kBits>
constexpr int rows_at_once() {
    return kBits == 4 ? 6 : 3;
}
#else
constexpr bool kNibbles8 = false;
template <int kBits>
constexpr int rows_at_once() {
    return Vec::kWidth == 1 ? 2 : 8;
}
#endif

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
    const Codes quad = record.template quad<kSecond, kQuad>();
    codes += (kSecond ? 16 : 0) + 4 * kQuad;
    if constexpr (kBits == 8 && kNibbles8) {
        const Codes low = low_nibbles(quad), high = high_nibbles(quad);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) dots[r].add(low, high, load_quad(codes + r * stride));
    } else {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) dots[r].add(quad, load_quad(codes + r * stride));
    }
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

template <int kRows, int kBits, int kGroup, bool kHasMin>
__attribute__((noinline)) void multiply_rows(const uint8_t* panel, int64_t num_records, const QuantizedRows& x,
                                             int64_t row, const MatmulOutput& y, int64_t column) {
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
    for (int64_t p = range.first_panel; p < range.end_panel; ++p) {
        const uint8_t* const panel = static_cast<const uint8_t*>(w.data) + p * bytes;
        const int64_t column = (p - range.first_panel) * kPanel;
        int64_t row = range.first_row;
        while (row < range.end_row) {
            // Tiles of like size, rather than a full one and a rest.
            const int64_t left = range.end_row - row, tiles = (left + kMaxRows - 1) / kMaxRows;
            const int64_t rows = (left + tiles - 1) / tiles;
            multiply_some<kMaxRows, kBits, kGroup, kHasMin>(rows, panel, num_records, x, row, y, column);
            row += rows;
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
