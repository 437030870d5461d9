// Merges the partial results of rows whose tokens lie in several splits (attention_plan.h): one CTA for each row of the
// launch. Parts are added in the order of their tokens.
#include "matrix_attention.h"
#include "mma.cuh"

namespace quire {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) merge_splits_kernel(PrefillArguments args) {
    const int row = args.first_row + blockIdx.x;
    const int seq = sequence_of(args, row);
    if (seq == args.num_seqs) return;
    const int end_row = args.query_start_loc[seq + 1];
    if (args.skips_decodes && end_row - args.query_start_loc[seq] == 1) return;
    const RowSplits splits = splits_of(args, args.seq_lens[seq] - (end_row - row));
    if (splits.first == splits.last) return;  // one CTA had it all, and wrote it

    for (int i = threadIdx.x; i < args.num_heads * args.head_dim; i += kThreads) {
        const int head = i / args.head_dim;
        const auto place = [&](int split) { return partial_row(args, split, row) + head; };
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
        const int64_t out = static_cast<int64_t>(row) * args.num_heads * args.head_dim + i;
        store_dtype(args.out, out, numerator / denominator, args.dtype);
    }
}

}  // namespace

int launch_merge_splits(const PrefillArguments& args, cudaStream_t stream) {
    merge_splits_kernel<<<args.end_row - args.first_row, kThreads, 0, stream>>>(args);
    return check_launch("paged_attention");
}

}  // namespace quire
