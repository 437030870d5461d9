// What each instruction set provides: the inner part of every operation, over a range of rows or one work item.
//
// The kernel sources that csrc/cpu.cmake names are compiled once per instruction set (see vec.h), all other sources of this
// folder once, for the plain machine.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "quire.h"

namespace quire {

// Keys are visited in tiles of kTile absolute positions, and results of kSegment positions are merged in order. Both
// are the same for every row of every call, and so is the order in which a row's terms are added.
constexpr int kTile = 64;
constexpr int kSegment = 512;

// The query rows of one work item: tokens first_token .. first_token + num_tokens (rows of the batch) of sequence
// `seq`, the first at absolute position `first_position`. With a KV head it is one item.
struct QueryTile {
    int32_t seq;
    int32_t first_token;
    int32_t num_tokens;
    int32_t first_position;
};

// The running softmax of the rows of a tile: row r is query head r % group of token r / group.
struct SoftmaxState {
    float* max;  // [rows], in units of log2
    float* sum;  // [rows]
    float* acc;  // [rows, padded_dim(head_dim)], the values summed with weights 2^(score - max)
};

inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

struct Kernels {
    const char* isa;
    void (*rms_norm)(const QuireRmsNormParams& p, int64_t begin, int64_t end);           // rows * groups
    void (*add_rms_norm)(const QuireAddRmsNormParams& p, int64_t begin, int64_t end);    // rows
    void (*silu_and_mul)(const QuireSiluAndMulParams& p, int64_t begin, int64_t end);    // rows
    void (*rotate_and_cache)(const QuireRotateAndCacheParams& p, int64_t begin, int64_t end);  // tokens

    // Fill `state` with the tile's attention over positions segment * kSegment and the kSegment - 1 after.
    void (*attend)(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, int segment, float* scratch,
                   SoftmaxState state);
    // Add a later segment's state into `into`.
    void (*merge)(int64_t rows, int64_t head_dim, SoftmaxState into, SoftmaxState from);
    // Divide by the sums and store the rows.
    void (*finish)(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, SoftmaxState state);
};

// Floats of scratch that attend() needs for `rows` rows.
inline int64_t attend_scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t dim = padded_dim(head_dim);
    return rows * dim + rows * kTile + 2 * kTile * dim;  // queries, scores, keys, values
}

inline int64_t state_floats(int64_t rows, int64_t head_dim) { return rows * (padded_dim(head_dim) + 2); }

inline SoftmaxState state_at(float* memory, int64_t rows, int64_t head_dim) {
    float* max = memory + rows * padded_dim(head_dim);
    return {max, max + rows, memory};
}

namespace scalar {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace quire
