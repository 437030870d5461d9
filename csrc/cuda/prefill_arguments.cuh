// What the kernels of prompts' attention are given, and which splits of its tokens a row sees.
#pragma once

#include "attention_arguments.cuh"
#include "attention_plan.h"

namespace quire {

// A batch whose partial results would fill too much memory is computed some rows at a time, one launch after another.
struct PrefillArguments : AttentionArguments {
    float* partial_out;  // [num_splits, rows_at_once, num_heads, head_dim]
    float* partial_lse;  // [num_splits, rows_at_once, num_heads], to base 2
    int32_t head_dim;
    int32_t split_tokens;
    int32_t num_splits;
    int32_t rows_at_once;
    int32_t first_row, end_row;  // of this launch
    int32_t first_tile;          // of find_vectors(), in this launch
    bool single_rows;            // no sequence has more than one row: tiles are counted from rows, not sequences
    bool skips_decodes;  // sequences of one row, and the rows of no sequence, are decode_attention.cuh's
};

// Where a row's partial result of one split lies, for each of its heads.
__device__ __forceinline__ int64_t partial_row(const PrefillArguments& args, int split, int row) {
    return (static_cast<int64_t>(split) * args.rows_at_once + row - args.first_row) * args.num_heads;
}

// The sequence that has the row, or num_seqs.
__device__ __forceinline__ int sequence_of(const PrefillArguments& args, int row) {
    int low = 0, high = args.num_seqs;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (args.query_start_loc[middle] <= row) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// The query vectors of tile `tile` of this launch; count <= 0 if it has none.
template <int kVectors>
__device__ __forceinline__ QueryVectors find_tile(const PrefillArguments& args, int tile) {
    if (!args.single_rows) {
        QueryVectors vectors = find_vectors<kVectors>(args, args.first_tile + tile);
        const bool outside = vectors.count <= 0 || vectors.row(vectors.count - 1) < args.first_row ||
                             vectors.row(0) >= args.end_row;
        if (outside) vectors.count = 0;
        return vectors;
    }
    const int tiles_of_row = (args.group + kVectors - 1) / kVectors;
    const int row = args.first_row + tile / tiles_of_row, first = tile % tiles_of_row * kVectors;
    const int seq = sequence_of(args, row);
    return {seq, row, 1, first, min(kVectors, args.group - first), args.group};
}

// The tiles that may have vectors of rows first_row to end_row, counted from first_tile, which this sets.
inline int64_t tiles_of_rows(PrefillArguments& args, int vectors) {
    const int64_t rows = args.end_row - args.first_row;
    args.first_tile = 0;
    if (args.single_rows) return rows * ((args.group + vectors - 1) / vectors);
    // Tile t of a sequence holds its vectors from t * vectors on: a row's tile is at most one below where it would be if
    // all rows were one sequence's, and at most as many above as there are sequences.
    const int64_t first = static_cast<int64_t>(args.first_row) * args.group / vectors;
    const int64_t end = static_cast<int64_t>(args.end_row) * args.group / vectors + args.num_seqs + 1;
    args.first_tile = static_cast<int32_t>(first > 0 ? first - 1 : 0);
    return end - args.first_tile;
}

// The splits of its sequence, first to last, that the row at `position` sees any token of.
struct RowSplits {
    int first, last;
};

__device__ __forceinline__ RowSplits splits_of(const PrefillArguments& args, int position) {
    const int low = args.sliding_window > 0 ? max(0, position - args.sliding_window + 1) : 0;
    return {low / args.split_tokens, position / args.split_tokens};
}

}  // namespace quire
