// What all kernels of paged attention are given, and which query vectors a CTA takes.
#pragma once

#include "host.h"
#include "numeric.cuh"

namespace quire {

struct AttentionArguments {
    const void* query;
    void* out;
    const int32_t* query_start_loc;
    const int32_t* seq_lens;
    const int32_t* block_tables;
    QuireCacheView key_cache, value_cache;
    int64_t query_token_stride, query_head_stride, block_table_stride;
    int32_t num_tokens, num_seqs, num_heads, group, block_shift, sliding_window;
    int32_t dtype;
    float scale_log2;  // softmax scale * log2(e): the exponentials are powers of two
};

__device__ __forceinline__ float load_dtype(const void* data, int64_t index, int dtype) {
    if (dtype == QUIRE_BFLOAT16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    if (dtype == QUIRE_FLOAT16) return to_float(static_cast<const __half*>(data)[index]);
    return static_cast<const float*>(data)[index];
}

__device__ __forceinline__ void store_dtype(void* data, int64_t index, float value, int dtype) {
    if (dtype == QUIRE_BFLOAT16) {
        static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
    } else if (dtype == QUIRE_FLOAT16) {
        static_cast<__half*>(data)[index] = from_float<__half>(value);
    } else {
        static_cast<float*>(data)[index] = value;
    }
}

// The query vectors of one CTA: vectors first .. first + count of sequence `seq`, whose rows in the batch start at
// `first_row`. Vector v of a sequence is head v % group of its KV head's group, in row v / group.
struct QueryVectors {
    int seq;  // num_seqs stands for the rows of no sequence
    int first_row, num_rows;
    int first, count;  // count <= 0: nothing is left for this CTA
    int group;

    __device__ int row(int i) const { return first_row + (first + i) / group; }
    __device__ int head(int i, int kv_head) const { return kv_head * group + (first + i) % group; }
    // The rows are the last of the sequence's seq_len tokens.
    __device__ int position(int i, int seq_len) const { return seq_len - num_rows + (first + i) / group; }
};

// Sequence i's CTAs begin at floor(query_start_loc[i] * group / kVectors) + i: a place that needs no prefix sum over
// the sequences and leaves each of them enough CTAs, at most one of them idle. Those past the last sequence's take the
// rows of no sequence.
template <int kVectors>
__device__ QueryVectors find_vectors(const AttentionArguments& args, int cta) {
    const auto first_cta = [&](int seq) {
        return static_cast<int>(static_cast<int64_t>(args.query_start_loc[seq]) * args.group / kVectors) + seq;
    };
    int low = 0, high = args.num_seqs;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_cta(middle) <= cta) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int first_row = args.query_start_loc[low];
    const int num_rows = (low < args.num_seqs ? args.query_start_loc[low + 1] : args.num_tokens) - first_row;
    const int first = (cta - first_cta(low)) * kVectors;
    return {low, first_row, num_rows, first, min(kVectors, num_rows * args.group - first), args.group};
}

// The CTAs along x that find_vectors() counts on.
inline int64_t attention_ctas(const AttentionArguments& args, int vectors) {
    return static_cast<int64_t>(args.num_tokens) * args.group / vectors + args.num_seqs + 1;
}

}  // namespace quire
