// The GGUF block types, read 32 values at a time: value = scale * code + min.
#pragma once

#include <stdint.h>

namespace quire {

// 32 consecutive values of a row. Types with 16 values a scale fill both scales and mins, others the first.
struct BlockRecord {
    uint8_t codes[32];
    float scales[2];
    float mins[2];
};

struct BlockType {
    int values;  // of a block
    int bytes;
    int bits;    // of a code
    int group;   // values a scale
    bool has_min;
    void (*read)(const uint8_t* block, int record, BlockRecord* out);  // the record-th 32 values of a block
};

// NULL for a type that is none of QuireSourceType's quantised ones.
const BlockType* block_type(int32_t source_type);

}  // namespace quire
