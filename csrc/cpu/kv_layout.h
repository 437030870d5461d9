// Where a token's K and V lie in a block of the native decoder's pool.
//
// A block of the pool is [num_layers][num_kv_heads]{K part, V part}. Within a part, for S = block_size, D = head_dim:
//
//   float32    K [D][S], tokens side by side as the scores of a query want them; V [S][D]
//   bfloat16   K [D / 2][S][2], pairs along D as VDPBF16PS multiplies them; V [S][D]
//   int8       S float32 scales, one a token and head, then K [D][S] or V [S][D]
//
// Parts are whole multiples of 4 bytes.
#pragma once

#include <stdint.h>

#include "quire_decoder.h"

namespace quire {

struct KVLayout {
    int kv_type;
    int64_t head_dim;
    int64_t block_size;
    int64_t num_kv_heads;
    int64_t num_layers;

    int64_t key_bytes() const {
        if (kv_type == QUIRE_KV_FLOAT32) return 4 * head_dim * block_size;
        if (kv_type == QUIRE_KV_BFLOAT16) return 2 * head_dim * block_size;  // head_dim is even
        return 4 * block_size + (head_dim * block_size + 3) / 4 * 4;
    }
    int64_t head_bytes() const { return 2 * key_bytes(); }  // V takes as much
    int64_t layer_bytes() const { return num_kv_heads * head_bytes(); }
    int64_t block_bytes() const { return num_layers * layer_bytes(); }
};

// One layer of the pool under one sequence's block table.
struct LayerCache {
    uint8_t* pool;  // at the layer, in block 0
    const KVLayout* layout;

    uint8_t* keys(int64_t block, int64_t kv_head) const {
        return pool + block * layout->block_bytes() + kv_head * layout->head_bytes();
    }
    uint8_t* values(int64_t block, int64_t kv_head) const { return keys(block, kv_head) + layout->key_bytes(); }
};

}  // namespace quire
