// What the kernels of prompts' attention are given, and which splits of its tokens a row sees.
#pragma once

#include "attention_arguments.cuh"
#include "attention_plan.h"

namespace quire {

struct PrefillArguments : AttentionArguments {
    float* partial_out;  // [num_splits, num_tokens, num_heads, head_dim]
    float* partial_lse;  // [num_splits, num_tokens, num_heads], to base 2
    int32_t head_dim;
    int32_t split_tokens;
    int32_t num_splits;
    bool skips_decodes;  // sequences of one row, and the rows of no sequence, are decode_attention.cuh's
};

// The splits of its sequence, first to last, that the row at `position` sees any token of.
struct RowSplits {
    int first, last;
};

__device__ __forceinline__ RowSplits splits_of(const PrefillArguments& args, int position) {
    const int low = args.sliding_window > 0 ? max(0, position - args.sliding_window + 1) : 0;
    return {low / args.split_tokens, position / args.split_tokens};
}

}  // namespace quire
