// The parts of paged attention on tensor cores, each compiled in files of its own.
#pragma once

#include <type_traits>

#include "attention_shares.cuh"
#include "prefill_arguments.cuh"

namespace quire {

// What paged_attention.cu asks: whether the tensor cores take a call, the workspace, and the launches.
bool matrix_attention_takes(const QuirePagedAttentionParams& p);
int matrix_attention_workspace(const QuirePagedAttentionParams& p, const AttentionArguments& args, int64_t* bytes);
int launch_matrix_attention(const QuirePagedAttentionParams& p, const AttentionArguments& args);

int resident_ctas(const void* kernel, int threads, int shared_bytes, int* ctas);

// The kernel of one tile, and what its launches need.
template <typename Arguments>
struct TileKernel {
    void (*kernel)(Arguments);
    int threads, shared_bytes;

    // The CTAs that fit on the current device at once. Lets the kernel have more than 48 KiB of shared memory, so it
    // comes before the first launch.
    int resident(int* ctas) const {
        return resident_ctas(reinterpret_cast<const void*>(kernel), threads, shared_bytes, ctas);
    }

    int launch(const Arguments& args, dim3 grid, cudaStream_t stream) const {
        const auto tile = kernel;
        tile<<<grid, threads, shared_bytes, stream>>>(args);
        return check_launch("paged_attention");
    }
};

// Decodes: `vectors` is 8 or 16. Prompts: `warps` is 4 or 8, of 16 query vectors each.
template <typename Element>
TileKernel<DecodeArguments> decode_kernel(int head_dim, int vectors);
template <typename Element>
TileKernel<PrefillArguments> prefill_kernel(int head_dim, int warps);

int launch_merge_shares(const DecodeArguments& args, int vectors, int heads, cudaStream_t stream);
int launch_merge_splits(const PrefillArguments& args, cudaStream_t stream);

// Calls `body` with the (already checked) head_dim as a type.
template <typename Body>
auto with_head_dim(int head_dim, Body body) {
    switch (head_dim) {
        case 64: return body(std::integral_constant<int, 64>{});
        case 80: return body(std::integral_constant<int, 80>{});
        case 96: return body(std::integral_constant<int, 96>{});
        case 128: return body(std::integral_constant<int, 128>{});
        default: return body(std::integral_constant<int, 256>{});
    }
}

}  // namespace quire
