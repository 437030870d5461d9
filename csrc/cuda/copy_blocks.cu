// Whole blocks copied within the pool (§4.3), in order, in one launch.
//
// The order that copy-on-write asks for (a block written by one pair is what a later pair reads) holds only within a
// byte column: each thread owns the same 16 bytes of every block and walks the pairs in order, so no barrier is needed
// and chains of pairs come out as if copied one after another. Pairs are taken by fours, all loads before all stores,
// where none of the four reads what an earlier one writes.
#include "host.h"
#include "numeric.cuh"

namespace quire {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 4;

struct Pair {
    int64_t source, destination;
};

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(Word* pool, const Pair* __restrict__ pairs, int num_pairs, int64_t block_words) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (column >= block_words) return;
    Word* words = pool + column;
    int i = 0;
    for (; i + kBatch <= num_pairs; i += kBatch) {
        Pair batch[kBatch];
        bool independent = true;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            batch[j] = pairs[i + j];
#pragma unroll
            for (int k = 0; k < j; ++k) independent &= batch[j].source != batch[k].destination;
        }
        if (independent) {
            Word held[kBatch];
#pragma unroll
            for (int j = 0; j < kBatch; ++j) held[j] = words[batch[j].source * block_words];
#pragma unroll
            for (int j = 0; j < kBatch; ++j) words[batch[j].destination * block_words] = held[j];
        } else {
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                words[batch[j].destination * block_words] = words[batch[j].source * block_words];
            }
        }
    }
    for (; i < num_pairs; ++i) words[pairs[i].destination * block_words] = words[pairs[i].source * block_words];
}

template <typename Word>
int launch(const QuireCopyBlocksParams& p) {
    const int64_t block_words = p.block_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t ctas = ceil_div(block_words, kThreads);
    QUIRE_REQUIRE(ctas <= INT32_MAX, "copy_blocks: block_bytes=%lld is too large for one launch",
                  static_cast<long long>(p.block_bytes));
    copy_blocks_kernel<Word><<<static_cast<unsigned>(ctas), kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        static_cast<Word*>(p.pool), reinterpret_cast<const Pair*>(p.pairs), p.num_pairs, block_words);
    return check_launch("copy_blocks");
}

}  // namespace
}  // namespace quire

int quire_copy_blocks(const QuireCopyBlocksParams* params) {
    using namespace quire;
    if (int status = check_params(params, "copy_blocks")) return status;
    const QuireCopyBlocksParams& p = *params;
    QUIRE_REQUIRE(p.num_pairs >= 0 && p.num_blocks >= 0, "copy_blocks: num_pairs=%d and num_blocks=%d must not be negative",
                  p.num_pairs, p.num_blocks);
    QUIRE_REQUIRE(p.block_bytes >= 1, "copy_blocks: block_bytes=%lld must be at least 1",
                  static_cast<long long>(p.block_bytes));
    QUIRE_REQUIRE(p.reserved == 0, "copy_blocks: reserved=%d must be 0", p.reserved);
    if (p.num_pairs == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.pool != nullptr && p.pairs != nullptr, "copy_blocks: pool or pairs is null");
    if (p.block_bytes % 16 == 0 && is_aligned(p.pool, 16)) return launch<Vector<uint32_t, 4>>(p);
    if (p.block_bytes % 4 == 0 && is_aligned(p.pool, 4)) return launch<uint32_t>(p);
    return launch<unsigned char>(p);
}
