// Packing of weight matrices into panels (packed.h), and the way back for rows of an embedding.
#include "packed.h"

#include <string.h>

#include <atomic>

#include "error.h"
#include "gguf_blocks.h"
#include "half.h"
#include "thread_pool.h"
#include "unpack.h"

namespace quire {

namespace {

constexpr const char* kOp = "pack";

int element_bytes(int32_t source_type) { return source_type == QUIRE_SOURCE_F32 ? 4 : 2; }

float element_at(const uint8_t* p, int32_t source_type) {
    if (source_type == QUIRE_SOURCE_F32) {
        float value;
        memcpy(&value, p, sizeof value);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return source_type == QUIRE_SOURCE_F16 ? float_of_half(bits) : float_of_bfloat16(bits);
}

// The stored matrix, row by row.
class Source {
public:
    explicit Source(const QuirePackParams& p) : p_(p), type_(block_type(p.source_type)) {}

    const BlockType* blocks() const { return type_; }

    int64_t row_bytes() const {
        if (type_ != nullptr) return int64_t{p_.source_columns} / type_->values * type_->bytes;
        return int64_t{p_.source_columns} * element_bytes(p_.source_type);
    }

    // 32 values of a row, `first_column` being at a border of them.
    void read_record(int64_t row, int64_t record, BlockRecord* out) const {
        const int records = type_->values / kRecord;
        record += p_.first_column / kRecord;
        const uint8_t* block = row_at(row) + record / records * type_->bytes;
        type_->read(block, static_cast<int>(record % records), out);
    }

    void read_values(int64_t row, float* out) const {
        if (type_ != nullptr) {
            for (int64_t record = 0; record < p_.num_columns / kRecord; ++record) {
                BlockRecord values;
                read_record(row, record, &values);
                for (int i = 0; i < kRecord; ++i) {
                    out[record * kRecord + i] = values.scales[i / 16] * values.codes[i] + values.mins[i / 16];
                }
            }
            return;
        }
        const int64_t step = element_bytes(p_.source_type) * (p_.transposed ? int64_t{p_.source_rows} : 1);
        const uint8_t* at = p_.transposed ? bytes() + order(row) * element_bytes(p_.source_type) : row_at(row);
        at += p_.first_column * step;
        for (int64_t i = 0; i < p_.num_columns; ++i, at += step) out[i] = element_at(at, p_.source_type);
    }

private:
    const uint8_t* bytes() const { return static_cast<const uint8_t*>(p_.source); }
    int64_t order(int64_t row) const { return p_.row_order == nullptr ? row : p_.row_order[row]; }
    const uint8_t* row_at(int64_t row) const { return bytes() + order(row) * row_bytes(); }

    const QuirePackParams& p_;
    const BlockType* type_;
};

void put_half(uint8_t* p, float value) {
    const uint16_t bits = half_of_float(value);
    memcpy(p, &bits, sizeof bits);
}

// One row's 32 values into the record; `column` is its place in the panel. The record begins as zeros.
void put_record(const WeightFormat& format, const BlockRecord& values, int column, uint8_t* record) {
    for (int group = 0; group < format.groups(); ++group) {
        put_half(record + (group * kPanel + column) * 2, values.scales[group]);
        if (format.has_min) put_half(record + ((format.groups() + group) * kPanel + column) * 2, values.mins[group]);
    }
    uint8_t* const codes = record + format.scale_bytes();
    uint8_t* const plane = codes + 4 * kQuadBytes;
    for (int i = 0; i < kRecord; ++i) {
        const int quad = i / 4, place = column * 4 + i % 4, code = values.codes[i];
        if (format.bits == 8) {
            codes[quad * kQuadBytes + place] = static_cast<uint8_t>(code);
            continue;
        }
        codes[quad % 4 * kQuadBytes + place] |= static_cast<uint8_t>((code & 15) << (quad < 4 ? 0 : 4));
        if (format.bits == 5) plane[place] |= static_cast<uint8_t>((code >> 4) << quad);
        if (format.bits == 6) plane[quad / 4 * kQuadBytes + place] |= static_cast<uint8_t>((code >> 4) << (2 * (quad % 4)));
    }
}

// 8 bits, symmetric: the largest value of the record is 127 scales, rounded as it will be stored.
BlockRecord quantize(const float* values, int64_t count) {
    BlockRecord out;
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = __builtin_fabsf(values[i]) > largest ? __builtin_fabsf(values[i]) : largest;
    const float scale = float_of_half(half_of_float(largest / 127.0f));
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < kRecord; ++i) {
        const float code = i < count ? __builtin_rintf(values[i] * inverse) : 0.0f;
        out.codes[i] = static_cast<uint8_t>(128 + static_cast<int>(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code));
    }
    out.scales[0] = out.scales[1] = scale;
    out.mins[0] = out.mins[1] = -128.0f * scale;
    return out;
}

void put_float(const WeightFormat& format, const float* values, int64_t k, int column, uint8_t* panel) {
    for (int64_t i = 0; i < k; ++i) {
        if (format.bits == 32) {
            memcpy(panel + (i * kPanel + column) * 4, values + i, sizeof(float));
        } else {
            const uint16_t bits = bfloat16_of_float(values[i]);
            memcpy(panel + ((i / 2 * kPanel + column) * 2 + i % 2) * 2, &bits, sizeof bits);
        }
    }
}

class Packer {
public:
    Packer(const QuirePackParams& p, const WeightFormat& format) : p_(p), format_(format), source_(p) {
        const BlockType* const type = source_.blocks();
        keep_codes_ = type != nullptr && format.bits == type->bits && format.group == type->group &&
                      format.has_min == type->has_min;
    }

    void pack_panel(int64_t index) const {
        const int64_t bytes = panel_bytes(format_, p_.num_columns);
        uint8_t* const panel = static_cast<uint8_t*>(p_.packed) + index * bytes;
        memset(panel, 0, static_cast<size_t>(bytes));
        for (int column = 0; column < kPanel; ++column) {
            const int64_t row = index * kPanel + column;
            if (row >= p_.num_rows) break;
            keep_codes_ ? copy_row(row, column, panel) : convert_row(row, column, panel);
        }
    }

    bool keeps_codes() const { return keep_codes_; }
    bool out_of_memory() const { return out_of_memory_.load(); }

private:
    void copy_row(int64_t row, int column, uint8_t* panel) const {
        for (int64_t record = 0; record < p_.num_columns / kRecord; ++record) {
            BlockRecord values;
            source_.read_record(row, record, &values);
            put_record(format_, values, column, panel + record * format_.record_bytes());
        }
    }

    void convert_row(int64_t row, int column, uint8_t* panel) const {
        const int64_t k = p_.num_columns;
        float* const values = thread_scratch(0, k);
        if (values == nullptr) return out_of_memory_.store(true);
        source_.read_values(row, values);
        if (!format_.quantized()) return put_float(format_, values, k, column, panel);
        for (int64_t at = 0; at < k; at += kRecord) {
            const BlockRecord record = quantize(values + at, k - at < kRecord ? k - at : kRecord);
            put_record(format_, record, column, panel + at / kRecord * format_.record_bytes());
        }
    }

    const QuirePackParams& p_;
    const WeightFormat format_;
    const Source source_;
    bool keep_codes_;
    mutable std::atomic<bool> out_of_memory_{false};
};

int check_source(const QuirePackParams& p, const Source& source) {
    const BlockType* const type = source.blocks();
    if (type == nullptr && p.source_type != QUIRE_SOURCE_F32 && p.source_type != QUIRE_SOURCE_F16 &&
        p.source_type != QUIRE_SOURCE_BF16) {
        return fail(QUIRE_UNSUPPORTED, "%s: source_type=%d", kOp, p.source_type);
    }
    QUIRE_CHECK(check_range(kOp, "source_columns", p.source_columns, p.num_columns, INT32_MAX));
    QUIRE_CHECK(check_range(kOp, "first_column", p.first_column, 0, p.source_columns - p.num_columns));
    if (type != nullptr && p.source_columns % type->values != 0) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: source_columns=%d is no multiple of the source's blocks of %d", kOp,
                    p.source_columns, type->values);
    }
    if (type != nullptr && (p.first_column % kRecord != 0 || p.num_columns % kRecord != 0)) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: columns %d to %d of blocks are not at borders of %d", kOp, p.first_column,
                    p.first_column + p.num_columns, kRecord);
    }
    if (type != nullptr && p.transposed != 0) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: a transposed source must be F32, F16 or BF16", kOp);
    }
    QUIRE_CHECK(check_range(kOp, "source_bytes", p.source_bytes, source.row_bytes() * p.source_rows, INT64_MAX));
    for (int64_t i = 0; p.row_order != nullptr && i < p.num_rows; ++i) {
        QUIRE_CHECK(check_range(kOp, "row_order", p.row_order[i], 0, p.source_rows - 1));
    }
    return QUIRE_OK;
}

// Element i of row `column` of a panel.
float value_at(const WeightFormat& format, const uint8_t* panel, int column, int64_t i) {
    if (format.bits == 32) return float_of_bits(*reinterpret_cast<const uint32_t*>(panel + (i * kPanel + column) * 4));
    if (format.bits == 16) {
        uint16_t bits;
        memcpy(&bits, panel + ((i / 2 * kPanel + column) * 2 + i % 2) * 2, sizeof bits);
        return float_of_bfloat16(bits);
    }
    const uint8_t* record = panel + i / kRecord * format.record_bytes();
    const int at = static_cast<int>(i % kRecord), group = at / format.group, quad = at / 4, place = column * 4 + at % 4;
    uint16_t scale, min = 0;
    memcpy(&scale, record + (group * kPanel + column) * 2, sizeof scale);
    if (format.has_min) memcpy(&min, record + ((format.groups() + group) * kPanel + column) * 2, sizeof min);
    const uint8_t* const codes = record + format.scale_bytes();
    const uint8_t* const plane = codes + 4 * kQuadBytes;
    int code;
    if (format.bits == 8) {
        code = codes[quad * kQuadBytes + place];
    } else {
        code = (codes[quad % 4 * kQuadBytes + place] >> (quad < 4 ? 0 : 4)) & 15;
        if (format.bits == 5) code |= ((plane[place] >> quad) & 1) << 4;
        if (format.bits == 6) code |= ((plane[quad / 4 * kQuadBytes + place] >> (2 * (quad % 4))) & 3) << 4;
    }
    const float factor = float_of_half(scale);
    if (format.has_min) return factor * static_cast<float>(code) + float_of_half(min);
    return factor * static_cast<float>(code - (1 << (format.bits - 1)));
}

}  // namespace

void unpack_row(const QuireWeight& w, int64_t row, float* out) {
    WeightFormat format{};
    format_of(w.type, &format);
    const uint8_t* panel = static_cast<const uint8_t*>(w.data) + row / kPanel * panel_bytes(format, w.k);
    for (int64_t i = 0; i < w.k; ++i) out[i] = value_at(format, panel, static_cast<int>(row % kPanel), i);
}

}  // namespace quire

using namespace quire;

int quire_packed_bytes(int32_t weight_type, int32_t num_rows, int32_t num_columns, int64_t* bytes) {
    WeightFormat format{};
    if (!format_of(weight_type, &format)) return fail(QUIRE_UNSUPPORTED, "%s: weight_type=%d", kOp, weight_type);
    QUIRE_CHECK(check_range(kOp, "num_rows", num_rows, 1, INT32_MAX - kPanel));
    QUIRE_CHECK(check_range(kOp, "num_columns", num_columns, 1, INT32_MAX - kRecord));
    QUIRE_CHECK(check_not_null(kOp, "bytes", bytes));
    *bytes = num_panels(num_rows) * panel_bytes(format, num_columns);
    return QUIRE_OK;
}

int quire_pack(const QuirePackParams* params) {
    if (params == nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: params is NULL", kOp);
    QUIRE_CHECK(check_header(kOp, params->size, params->abi_version, sizeof *params));
    const QuirePackParams& p = *params;
    int64_t needed;
    QUIRE_CHECK(quire_packed_bytes(p.weight_type, p.num_rows, p.num_columns, &needed));
    QUIRE_CHECK(check_not_null(kOp, "source", p.source));
    QUIRE_CHECK(check_not_null(kOp, "packed", p.packed));
    QUIRE_CHECK(check_range(kOp, "packed_bytes", p.packed_bytes, needed, INT64_MAX));
    QUIRE_CHECK(check_range(kOp, "num_threads", p.num_threads, 1, INT32_MAX));
    QUIRE_CHECK(check_range(kOp, "source_rows", p.source_rows, p.row_order == nullptr ? p.num_rows : 1, INT32_MAX));
    QUIRE_CHECK(check_source(p, Source(p)));
    WeightFormat format{};
    format_of(p.weight_type, &format);
    const Packer packer(p, format);
    if (!packer.keeps_codes() && format.quantized() && p.weight_type != QUIRE_WEIGHT_U8) {
        return fail(QUIRE_UNSUPPORTED, "%s: no way from source_type=%d to weight_type=%d", kOp, p.source_type,
                    p.weight_type);
    }
    parallel_for(p.num_threads, num_panels(p.num_rows), [&](int64_t panel) { packer.pack_panel(panel); });
    return packer.out_of_memory() ? fail(QUIRE_OUT_OF_MEMORY, "%s: no memory for a row", kOp) : int{QUIRE_OK};
}
