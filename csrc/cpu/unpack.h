// Rows of a packed matrix, as an embedding wants them.
#pragma once

#include "quire_decoder.h"

namespace quire {

// out[k] = row `row` of W.
void unpack_row(const QuireWeight& w, int64_t row, float* out);

}  // namespace quire
