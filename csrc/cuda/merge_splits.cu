// Merges the partial results of rows whose tokens lie in several splits (attention_plan.h): one CTA for each row. Parts
// are added in the order of their tokens.
#include "matrix_attention.h"
#include "mma.cuh"

namespace quire {
namespace {

constexpr int kThreads = 128;

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

__global__ void __launch_bounds__(kThreads) merge_splits_kernel(PrefillArguments args) {
    const int row = blockIdx.x;
    const int seq = sequence_of(args, row);
    if (seq == args.num_seqs) return;
    const int end_row = args.query_start_loc[seq + 1];
    if (args.skips_decodes && end_row - args.query_start_loc[seq] == 1) return;
    const RowSplits splits = splits_of(args, args.seq_lens[seq] - (end_row - row));
    if (splits.first == splits.last) return;  // one CTA had it all, and wrote it

    const int64_t vectors = static_cast<int64_t>(args.num_tokens) * args.num_heads;
    for (int i = threadIdx.x; i < args.num_heads * args.head_dim; i += kThreads) {
        const int64_t vector = static_cast<int64_t>(row) * args.num_heads + i / args.head_dim;
        const auto place = [&](int split) { return split * vectors + vector; };
        float highest = -INFINITY;
        for (int split = splits.first; split <= splits.last; ++split) {
            highest = fmaxf(highest, args.partial_lse[place(split)]);
        }
        float numerator = 0.0f, denominator = 0.0f;
        for (int split = splits.first; split <= splits.last; ++split) {
            const float weight = fast_exp2(args.partial_lse[place(split)] - highest);
            denominator += weight;
            numerator = fmaf(weight, args.partial_out[place(split) * args.head_dim + i % args.head_dim], numerator);
        }
        store_dtype(args.out, vector * args.head_dim + i % args.head_dim, numerator / denominator, args.dtype);
    }
}

}  // namespace

int launch_merge_splits(const PrefillArguments& args, cudaStream_t stream) {
    merge_splits_kernel<<<args.num_tokens, kThreads, 0, stream>>>(args);
    return check_launch("paged_attention");
}

}  // namespace quire
