// A step's attention: queries, keys and values rotated, K and V stored, rows attended.
#pragma once

#include "step.h"

namespace quire {

// Columns of `qkv` at which a layer's K and V begin; q begins at 0. Each is in full panels.
struct QkvColumns {
    int64_t key;
    int64_t value;
};

QkvColumns qkv_columns(const QuireDecoderLayer& layer);

// The layer's part of the KV pool.
LayerCache layer_cache(const Step& step, int layer);

// Norm and rotate q and k of all rows where the layer says so, and store k and v in the rows' slots.
void rotate_and_store(const Step& step, const QuireDecoderLayer& layer, const LayerCache& cache);

// All rows' attention into `attended`, and into what the layer's output projection wants. False if there was no memory.
bool attend(const Step& step, const QuireDecoderLayer& layer, const LayerCache& cache);

}  // namespace quire
