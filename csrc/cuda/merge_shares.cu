// Merges the partial results of decodes that lie in several shares (attention_plan.h): one CTA for each sequence (x) and
// each 8 or 16 vectors of each KV head (y).
//
//   sequence's runs   |----------------------|
//   shares            ...--2---|---3----|--4-...
//   places                    1     0      0
//
// Parts are added in the order of their tokens.
#include "attention_shares.cuh"
#include "matrix_attention.h"
#include "mma.cuh"

namespace quire {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) merge_shares_kernel(DecodeArguments args, int vectors) {
    const int seq = blockIdx.x, lane = threadIdx.x % kWarpSize;
    const int count = runs_of(args, seq).count;
    if (count == 0) return;
    const Shares shares = find_shares(args, lane);
    int64_t first_run = 0;
    for (int other = lane; other < seq; other += kWarpSize) first_run += runs_of(args, other).count;
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) first_run += __shfl_xor_sync(kFullWarp, first_run, mask);
    const int64_t first = shares.of_run(first_run), last = shares.of_run(first_run + count - 1);
    if (first == last) return;  // one CTA had it all, and wrote it

    const int kv_head = blockIdx.y / args.chunks, first_vector = blockIdx.y % args.chunks * vectors;
    const int head = kv_head * args.group + first_vector;
    const int64_t out =
        (static_cast<int64_t>(args.query_start_loc[seq]) * args.num_heads + head) * args.head_dim;
    for (int i = threadIdx.x; i < min(vectors, args.group - first_vector) * args.head_dim; i += kThreads) {
        const int vector = i / args.head_dim;
        const auto place = [&](int64_t share) {
            return partial_place(share, gridDim.y, blockIdx.y, share == first ? 1 : 0) * vectors + vector;
        };
        float highest = -INFINITY;
        for (int64_t share = first; share <= last; ++share) highest = fmaxf(highest, args.partial_lse[place(share)]);
        float numerator = 0.0f, denominator = 0.0f;
        for (int64_t share = first; share <= last; ++share) {
            const float weight = fast_exp2(args.partial_lse[place(share)] - highest);
            denominator += weight;
            numerator = fmaf(weight, args.partial_out[place(share) * args.head_dim + i % args.head_dim], numerator);
        }
        store_dtype(args.out, out + i, numerator / denominator, args.dtype);
    }
}

}  // namespace

int launch_merge_shares(const DecodeArguments& args, int vectors, int heads, cudaStream_t stream) {
    merge_shares_kernel<<<dim3(args.num_seqs, heads), kThreads, 0, stream>>>(args, vectors);
    return check_launch("paged_attention");
}

}  // namespace quire
