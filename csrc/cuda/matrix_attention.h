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

// Decodes: `vectors` is 8 or 16. The CTAs that fit on the device at once; asking also gets the kernel its shared memory,
// so it comes before the first launch.
template <typename Element>
int resident_decodes(int head_dim, int vectors, int* ctas);
template <typename Element>
int launch_decodes(const DecodeArguments& args, int vectors, dim3 grid, cudaStream_t stream);
int launch_merge_shares(const DecodeArguments& args, int vectors, int heads, cudaStream_t stream);

// Prompts: `warps` is 4 or 8, of 16 query vectors each.
template <typename Element>
int resident_prefills(int head_dim, int warps, int* ctas);
template <typename Element>
int launch_prefills(const PrefillArguments& args, int warps, dim3 grid, cudaStream_t stream);
int launch_merge_splits(const PrefillArguments& args, cudaStream_t stream);

// Calls `body` with the (already checked) head_dim as a type.
template <typename Body>
int with_head_dim(int head_dim, Body body) {
    switch (head_dim) {
        case 64: return body(std::integral_constant<int, 64>{});
        case 80: return body(std::integral_constant<int, 80>{});
        case 96: return body(std::integral_constant<int, 96>{});
        case 128: return body(std::integral_constant<int, 128>{});
        default: return body(std::integral_constant<int, 256>{});
    }
}

// The CTAs of a tile's kernel that fit on the current device at once. Lets the kernel have more than 48 KiB of shared
// memory.
template <typename Tile, typename Kernel>
int resident_ctas(Kernel kernel, int* ctas) {
    constexpr const char* kName = "paged_attention";
    // Asking takes microseconds, and a step has dozens of layers.
    static thread_local int known_device = -1, known_ctas = 0;
    int device = 0;
    if (int status = check_cuda(cudaGetDevice(&device), kName)) return status;
    if (device != known_device) {
        int processors = 0, each = 0;
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
        if (int status = check_cuda(error, kName)) return status;
        if (int status = check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kName)) {
            return status;
        }
        const cudaError_t asked =
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, Tile::kThreads, Tile::kSharedBytes);
        if (int status = check_cuda(asked, kName)) return status;
        known_ctas = processors * (each > 0 ? each : 1);
        known_device = device;
    }
    *ctas = known_ctas;
    return QUIRE_OK;
}

}  // namespace quire
