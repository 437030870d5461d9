// Which runs of tokens of which sequences a CTA of decode attention takes, worked out from the lengths in device memory
// (attention_plan.h says how they are cut).
#pragma once

#include "attention_arguments.cuh"
#include "attention_plan.h"

namespace quire {

constexpr int kDecodeTokens = 16;  // of a warp's tile

// Two warps where rows are so long that the stages of four would not fit.
constexpr int decode_warps(int head_dim) { return head_dim > 128 ? 2 : 4; }
constexpr int decode_run(int head_dim) { return decode_warps(head_dim) * kDecodeTokens; }

struct DecodeArguments : AttentionArguments {
    float* partial_out;  // [max_shares, heads * chunks, 2 places, vectors, head_dim]
    float* partial_lse;  // [max_shares, heads * chunks, 2 places, vectors], to base 2
    int32_t head_dim;
    int32_t run_tokens;
    int32_t chunks;      // of a KV head's vectors
    int32_t max_shares;  // of each KV head
};

__device__ __forceinline__ int64_t partial_place(int64_t share, int heads, int head, int place) {
    return (share * heads + head) * 2 + place;
}

// The first token that the last row of a sequence of `seq_len` tokens sees.
__device__ __forceinline__ int first_visible(const DecodeArguments& args, int seq_len) {
    return args.sliding_window > 0 ? max(0, seq_len - args.sliding_window) : 0;
}

// The runs that a sequence's row sees any token of; none where it is no decode, which has one row in the batch.
struct SequenceRuns {
    int first, count;
};

__device__ __forceinline__ SequenceRuns runs_of(const DecodeArguments& args, int seq) {
    if (args.query_start_loc[seq + 1] - args.query_start_loc[seq] != 1) return {0, 0};
    const int seq_len = args.seq_lens[seq];
    const int first = first_visible(args, seq_len) / args.run_tokens;
    return {first, (seq_len + args.run_tokens - 1) / args.run_tokens - first};
}

// The shares of all sequences' runs. Each warp works it out for itself.
__device__ __forceinline__ Shares find_shares(const DecodeArguments& args, int lane) {
    int64_t runs = 0;
    for (int seq = lane; seq < args.num_seqs; seq += kWarpSize) runs += runs_of(args, seq).count;
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) runs += __shfl_xor_sync(kFullWarp, runs, mask);
    return cut_shares(runs, args.max_shares);
}

// Where a share begins, run `run` of sequence `seq`'s, and how many runs of this and later sequences it has.
struct ShareCursor {
    int seq, run;
    int64_t left;
};

__device__ __forceinline__ ShareCursor find_share(const DecodeArguments& args, int share, int lane) {
    const Shares shares = find_shares(args, lane);
    const int64_t begin = shares.begin(share), left = shares.begin(share + 1) - begin;
    if (left == 0) return {0, 0, 0};
    int64_t before = 0;  // runs of the sequences before the 32 at hand
    for (int seq = 0;; seq += kWarpSize) {
        const int count = seq + lane < args.num_seqs ? runs_of(args, seq + lane).count : 0;
        int64_t through = count;  // runs of the first of the 32 up to this lane's
#pragma unroll
        for (int offset = 1; offset < kWarpSize; offset *= 2) {
            const int64_t lower = __shfl_up_sync(kFullWarp, through, offset);
            if (lane >= offset) through += lower;
        }
        const unsigned past = __ballot_sync(kFullWarp, before + through > begin);
        if (past != 0) {
            const int found = __ffs(past) - 1;
            const int64_t run = begin - before - __shfl_sync(kFullWarp, through - count, found);
            return {seq + found, static_cast<int>(run), left};
        }
        before += __shfl_sync(kFullWarp, through, kWarpSize - 1);
    }
}

}  // namespace quire
