// Whole blocks moved between the device's pool and the host's (§4.5), all of a step's in one operation.
//
// Because a block of all layers is one run of bytes, a swap is few large copies, which the copy engines do at the link's
// speed and beside whatever computes. Blocks of a few KiB are slower there than a kernel that reads and writes the
// host's memory itself.
#include <vector>

#include "host.h"
#include "numeric.cuh"
#include "quire_cuda.h"

namespace quire {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxCtas = 64;  // enough for the link; more would only take multiprocessors from what computes
constexpr int kUnroll = 4;

struct Pair {
    int64_t source, destination;
};

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    swap_blocks_kernel(const Word* source_pool, Word* destination_pool, const Pair* __restrict__ pairs, int num_pairs,
                       int64_t block_words) {
    for (int i = blockIdx.x; i < num_pairs; i += gridDim.x) {
        const Pair pair = pairs[i];
        const Word* source = source_pool + pair.source * block_words;
        Word* destination = destination_pool + pair.destination * block_words;
        int64_t word = threadIdx.x;
        for (; word + (kUnroll - 1) * kThreads < block_words; word += kUnroll * kThreads) {
            Word held[kUnroll];
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) held[j] = source[word + j * kThreads];
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) destination[word + j * kThreads] = held[j];
        }
        for (; word < block_words; word += kThreads) destination[word] = source[word];
    }
}

template <typename Word>
int launch(const QuireSwapBlocksParams& p) {
    const void* source = p.to_host ? p.device_pool : p.host_pool;
    void* destination = p.to_host ? p.host_pool : p.device_pool;
    const int ctas = p.num_pairs < kMaxCtas ? p.num_pairs : kMaxCtas;
    swap_blocks_kernel<Word><<<static_cast<unsigned>(ctas), kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        static_cast<const Word*>(source), static_cast<Word*>(destination), reinterpret_cast<const Pair*>(p.pairs),
        p.num_pairs, p.block_bytes / static_cast<int64_t>(sizeof(Word)));
    return check_launch("swap_blocks");
}

int copy_batch(const QuireSwapBlocksParams& p) {
    const char* source_pool = static_cast<const char*>(p.to_host ? p.device_pool : p.host_pool);
    char* destination_pool = static_cast<char*>(p.to_host ? p.host_pool : p.device_pool);
    std::vector<const void*> sources(p.num_pairs);
    std::vector<void*> destinations(p.num_pairs);
    std::vector<size_t> sizes(p.num_pairs, static_cast<size_t>(p.block_bytes));
    for (int i = 0; i < p.num_pairs; ++i) {
        sources[i] = source_pool + p.pairs[2 * i] * p.block_bytes;
        destinations[i] = destination_pool + p.pairs[2 * i + 1] * p.block_bytes;
    }
    // In stream order both ways: a step in front of this one on the stream may have written what is read here, the
    // device's blocks by a kernel, the host's by an earlier swap.
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    return check_cuda(cudaMemcpyBatchAsync(destinations.data(), sources.data(), sizes.data(), sizes.size(), &attributes,
                                           &first, 1, static_cast<cudaStream_t>(p.stream)),
                      "swap_blocks");
}

}  // namespace
}  // namespace quire

int quire_swap_blocks(const QuireSwapBlocksParams* params) {
    using namespace quire;
    if (int status = check_params(params, "swap_blocks")) return status;
    const QuireSwapBlocksParams& p = *params;
    QUIRE_REQUIRE(p.num_pairs >= 0, "swap_blocks: num_pairs=%d must not be negative", p.num_pairs);
    QUIRE_REQUIRE(p.block_bytes >= 1, "swap_blocks: block_bytes=%lld must be at least 1",
                  static_cast<long long>(p.block_bytes));
    QUIRE_REQUIRE(p.to_host == 0 || p.to_host == 1, "swap_blocks: to_host=%d must be 0 or 1", p.to_host);
    QUIRE_REQUIRE(p.method == QUIRE_SWAP_COPY_ENGINE || p.method == QUIRE_SWAP_KERNEL,
                  "swap_blocks: method=%d is no QuireSwapMethod", p.method);
    QUIRE_REQUIRE(p.stream != nullptr, "swap_blocks: stream is null; batched copies need a stream of their own");
    if (p.num_pairs == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.device_pool != nullptr && p.host_pool != nullptr && p.pairs != nullptr,
                  "swap_blocks: device_pool, host_pool or pairs is null");
    const int64_t num_sources = p.to_host ? p.num_device_blocks : p.num_host_blocks;
    const int64_t num_destinations = p.to_host ? p.num_host_blocks : p.num_device_blocks;
    for (int i = 0; i < p.num_pairs; ++i) {
        const int64_t source = p.pairs[2 * i], destination = p.pairs[2 * i + 1];
        QUIRE_REQUIRE(source >= 0 && source < num_sources && destination >= 0 && destination < num_destinations,
                      "swap_blocks: pair %d is (%lld, %lld); the pools have %lld and %lld blocks", i,
                      static_cast<long long>(source), static_cast<long long>(destination),
                      static_cast<long long>(num_sources), static_cast<long long>(num_destinations));
    }
    if (p.method == QUIRE_SWAP_COPY_ENGINE) return copy_batch(p);
    const bool aligned = is_aligned(p.device_pool, 16) && is_aligned(p.host_pool, 16) && p.block_bytes % 16 == 0;
    return aligned ? launch<Vector<uint32_t, 4>>(p) : launch<unsigned char>(p);
}
