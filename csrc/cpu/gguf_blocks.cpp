#include "gguf_blocks.h"

#include "half.h"
#include "quire_decoder.h"

namespace quire {

namespace {

float half_at(const uint8_t* p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return float_of_half(bits);
}

void set_scale(float scale, float min, BlockRecord* out) {
    out->scales[0] = out->scales[1] = scale;
    out->mins[0] = out->mins[1] = min;
}

// 16 bytes: values 0 to 15 in the low nibbles, 16 to 31 in the high ones.
void read_nibbles(const uint8_t* packed, BlockRecord* out) {
    for (int i = 0; i < 16; ++i) {
        out->codes[i] = packed[i] & 15;
        out->codes[16 + i] = packed[i] >> 4;
    }
}

// 4 bytes: bit i is the fifth of value i.
void add_fifth_bits(const uint8_t* packed, BlockRecord* out) {
    uint32_t high;
    memcpy(&high, packed, sizeof high);
    for (int i = 0; i < 32; ++i) out->codes[i] |= static_cast<uint8_t>(((high >> i) & 1) << 4);
}

void read_q4_0(const uint8_t* block, int, BlockRecord* out) {
    const float scale = half_at(block);
    set_scale(scale, -8.0f * scale, out);
    read_nibbles(block + 2, out);
}

void read_q4_1(const uint8_t* block, int, BlockRecord* out) {
    set_scale(half_at(block), half_at(block + 2), out);
    read_nibbles(block + 4, out);
}

void read_q5_0(const uint8_t* block, int, BlockRecord* out) {
    const float scale = half_at(block);
    set_scale(scale, -16.0f * scale, out);
    read_nibbles(block + 6, out);
    add_fifth_bits(block + 2, out);
}

void read_q5_1(const uint8_t* block, int, BlockRecord* out) {
    set_scale(half_at(block), half_at(block + 2), out);
    read_nibbles(block + 8, out);
    add_fifth_bits(block + 4, out);
}

void read_q8_0(const uint8_t* block, int, BlockRecord* out) {
    const float scale = half_at(block);
    set_scale(scale, -128.0f * scale, out);
    for (int i = 0; i < 32; ++i) out->codes[i] = block[2 + i] ^ 0x80;
}

// 12 bytes hold 8 scales and 8 mins of 6 bits: the first 4 of each whole, of the others 4 bits and the rest beside those.
void read_k_scale(const uint8_t* block, int record, BlockRecord* out) {
    const uint8_t* q = block + 4;
    int scale, min;
    if (record < 4) {
        scale = q[record] & 63;
        min = q[record + 4] & 63;
    } else {
        scale = (q[record + 4] & 15) | ((q[record - 4] >> 6) << 4);
        min = (q[record + 4] >> 4) | ((q[record] >> 6) << 4);
    }
    set_scale(half_at(block) * static_cast<float>(scale), -half_at(block + 2) * static_cast<float>(min), out);
}

// Records 2j and 2j + 1 are the low and the high nibbles of 32 bytes.
void read_k_nibbles(const uint8_t* packed, int record, BlockRecord* out) {
    const uint8_t* from = packed + record / 2 * 32;
    for (int i = 0; i < 32; ++i) out->codes[i] = record % 2 == 0 ? from[i] & 15 : from[i] >> 4;
}

void read_q4_k(const uint8_t* block, int record, BlockRecord* out) {
    read_k_scale(block, record, out);
    read_k_nibbles(block + 16, record, out);
}

void read_q5_k(const uint8_t* block, int record, BlockRecord* out) {
    read_k_scale(block, record, out);
    read_k_nibbles(block + 48, record, out);
    for (int i = 0; i < 32; ++i) out->codes[i] |= static_cast<uint8_t>(((block[16 + i] >> record) & 1) << 4);
}

// 128 bytes of nibbles, 64 of upper bits, 16 scales, one scale of scales. Each half of a block has four records: the low
// nibbles of 64 bytes, then their high ones; the upper bits of all four lie in the same 32 bytes.
void read_q6_k(const uint8_t* block, int record, BlockRecord* out) {
    const int half = record / 4, quarter = record % 4;
    const uint8_t* nibbles = block + half * 64 + quarter % 2 * 32;
    const uint8_t* upper = block + 128 + half * 32;
    for (int i = 0; i < 32; ++i) {
        const int low = quarter < 2 ? nibbles[i] & 15 : nibbles[i] >> 4;
        out->codes[i] = static_cast<uint8_t>(low | (((upper[i] >> (2 * quarter)) & 3) << 4));
    }
    for (int i = 0; i < 2; ++i) {
        const int8_t scale = static_cast<int8_t>(block[192 + 2 * record + i]);
        out->scales[i] = half_at(block + 208) * static_cast<float>(scale);
        out->mins[i] = -32.0f * out->scales[i];
    }
}

}  // namespace

const BlockType* block_type(int32_t source_type) {
    static const BlockType q4_0 = {32, 18, 4, 32, false, read_q4_0};
    static const BlockType q4_1 = {32, 20, 4, 32, true, read_q4_1};
    static const BlockType q5_0 = {32, 22, 5, 32, false, read_q5_0};
    static const BlockType q5_1 = {32, 24, 5, 32, true, read_q5_1};
    static const BlockType q8_0 = {32, 34, 8, 32, false, read_q8_0};
    static const BlockType q4_k = {256, 144, 4, 32, true, read_q4_k};
    static const BlockType q5_k = {256, 176, 5, 32, true, read_q5_k};
    static const BlockType q6_k = {256, 210, 6, 16, false, read_q6_k};
    switch (source_type) {
        case QUIRE_SOURCE_Q4_0: return &q4_0;
        case QUIRE_SOURCE_Q4_1: return &q4_1;
        case QUIRE_SOURCE_Q5_0: return &q5_0;
        case QUIRE_SOURCE_Q5_1: return &q5_1;
        case QUIRE_SOURCE_Q8_0: return &q8_0;
        case QUIRE_SOURCE_Q4_K: return &q4_k;
        case QUIRE_SOURCE_Q5_K: return &q5_k;
        case QUIRE_SOURCE_Q6_K: return &q6_k;
        default: return nullptr;
    }
}

}  // namespace quire
