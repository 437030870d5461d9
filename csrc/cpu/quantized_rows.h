// Activations in the forms that weights multiply: signed bytes, for each row and record of 32 values one scale,
// x = scale * code; or bfloat16.
#pragma once

#include <stdint.h>

namespace quire {

struct RecordScale {
    float scale;
    float total;           // scale * the sum of the record's codes: what a weight's minimum multiplies
    int32_t half_sums[2];  // of its first and of its last 16 codes
};

struct QuantizedRows {
    int8_t* codes;         // [rows, stride]
    RecordScale* records;  // [rows, stride / 32]
    int64_t stride;        // values a row, a multiple of 32; those past the row's end are zero
};

struct RoundedRows {
    uint16_t* values;  // [rows, stride], bfloat16
    int64_t stride;    // values a row, a multiple of 16; those past the row's end are zero up to a multiple of 16
};

}  // namespace quire
