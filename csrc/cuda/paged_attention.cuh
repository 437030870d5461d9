// Paged attention on CUDA cores: online softmax in float32 over K and V read through the block table (§4.1, Eq. 4).
//
// A query vector is one head of one row. The group of query heads that share a KV head, over the rows of one sequence,
// make one list of vectors; a CTA takes kVectors neighbours of it, so that each K and V element that it reads serves
// them all:
//
//   vector   0         1         ...  group - 1      group     ...
//   is       row 0,h0  row 0,h1  ...  row 0,h(g-1)   row 1,h0  ...
//
// The CTA's warps divide the tokens: warp w takes tokens [32 w, 32 w + 32) of each run of 32 * kWarps, counted from
// position 0 of the sequence. A warp works alone, on its own tiles of K and V in shared memory:
//
//   scores    lane = token: a lane dots its K row with every vector (read from shared memory, the same for all lanes)
//   softmax   running maximum and sum of each vector over the warp's tiles
//   values    lane = dimensions: a lane sums p[token] * V[token, its dimensions]
//
// and only at the end do the warps merge their partial results, in a fixed order. While a warp works on K, its V is
// on the way, and the other way round. A vector's arithmetic depends only on its own position and the tokens'
// absolute positions, so its result is bitwise the same whatever its batch, chunk or neighbours in the tile: a tile
// of which a vector sees nothing adds exact zeros.
#pragma once

#include "attention_tile.cuh"

namespace quire {

template <typename Tile>
__device__ __forceinline__ void clear_vectors(const AttentionArguments& args, const QueryVectors& vectors,
                                              int kv_head) {
    for (int i = threadIdx.x; i < vectors.count * Tile::kHeadDim; i += Tile::kThreads) {
        const int v = i / Tile::kHeadDim;
        const int64_t out = static_cast<int64_t>(vectors.row(v)) * args.num_heads + vectors.head(v, kv_head);
        store_dtype(args.out, out * Tile::kHeadDim + i % Tile::kHeadDim, 0.0f, args.dtype);
    }
}

// The vectors, scaled and in float32, to shared memory; zeros where there are fewer than kVectors.
template <typename Tile>
__device__ __forceinline__ void load_queries(const AttentionArguments& args, const QueryVectors& vectors, int kv_head,
                                             float* queries) {
    for (int i = threadIdx.x; i < Tile::kVectors * Tile::kHeadDim; i += Tile::kThreads) {
        const int v = i / Tile::kHeadDim;
        float element = 0.0f;
        if (v < vectors.count) {
            const int64_t start =
                vectors.row(v) * args.query_token_stride + vectors.head(v, kv_head) * args.query_head_stride;
            element = args.scale_log2 * load_dtype(args.query, start + i % Tile::kHeadDim, args.dtype);
        }
        queries[i] = element;
    }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) paged_attention_kernel(AttentionArguments args) {
    using Cache = typename Tile::Cache;
    extern __shared__ __align__(16) unsigned char shared[];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int kv_head = blockIdx.y;
    unsigned char* const warp_tiles = shared + warp * 2 * Tile::kTileBytes;
    Cache* const keys = reinterpret_cast<Cache*>(warp_tiles);
    Cache* const values = reinterpret_cast<Cache*>(warp_tiles + Tile::kTileBytes);
    float* const queries = reinterpret_cast<float*>(shared + Tile::kWarps * 2 * Tile::kTileBytes);
    float* const probabilities =
        queries + Tile::kVectors * Tile::kHeadDim + warp * Tile::kTokens * Tile::kVectors;  // [kTokens, kVectors]

    const QueryVectors vectors = find_vectors<Tile::kVectors>(args, blockIdx.x);
    if (vectors.count <= 0) return;
    if (vectors.seq == args.num_seqs) {
        clear_vectors<Tile>(args, vectors, kv_head);
        return;
    }
    load_queries<Tile>(args, vectors, kv_head, queries);
    __syncthreads();

    // The CTA sees tokens [begin, end). begin is rounded down to a whole run of all warps, so that which warp takes a
    // token depends on nothing but its position.
    const int seq_len = args.seq_lens[vectors.seq];
    const int window = args.sliding_window > 0 ? args.sliding_window : seq_len;
    const int end = vectors.position(vectors.count - 1, seq_len) + 1;
    const int begin = max(0, vectors.position(0, seq_len) - window + 1) / Tile::kRun * Tile::kRun;

    const int32_t* const block_table = args.block_tables + vectors.seq * args.block_table_stride;
    const int slot_mask = (1 << args.block_shift) - 1;
    // This lane's block of the tile at `first_token`; table entries past the end hold anything and are not read.
    const auto block_of = [&](int first_token) -> int64_t {
        return first_token + lane < end ? block_table[(first_token + lane) >> args.block_shift] : 0;
    };
    const auto load = [&](Cache* tile, const QuireCacheView& cache, int first_token, int64_t block) {
        const Cache* row = static_cast<const Cache*>(cache.data) + kv_head * cache.head_stride +
                           block * cache.block_stride + ((first_token + lane) & slot_mask) * cache.slot_stride;
        load_rows<Tile>(tile, row, first_token, end, lane);
    };

    WarpAttention<Tile> attention(lane);
    int first_token = begin + warp * Tile::kTokens;
    if (first_token < end) {
        const int64_t block = block_of(first_token);
        load(keys, args.key_cache, first_token, block);
        commit_async_group();
        load(values, args.value_cache, first_token, block);
        commit_async_group();
    }
    while (first_token < end) {
        const int next_token = first_token + Tile::kRun;
        const int64_t next_block = block_of(next_token);

        wait_async_groups<1>();  // K is here; V may be on its way
        __syncwarp();
        float score[Tile::kVectors];
        attention.score_keys(keys, queries, score);
        __syncwarp();
        if (next_token < end) load(keys, args.key_cache, next_token, next_block);
        commit_async_group();

        const int token = first_token + lane;
#pragma unroll
        for (int i = 0; i < Tile::kVectors; ++i) {
            const int position = vectors.position(i, seq_len);
            const bool visible = token <= position && token > position - window && token < end;
            probabilities[lane * Tile::kVectors + i] = attention.update_softmax(i, visible ? score[i] : -INFINITY);
        }

        wait_async_groups<1>();  // V is here; the next K may be on its way
        __syncwarp();
        attention.add_values(values, probabilities, min(Tile::kTokens, end - first_token));
        __syncwarp();
        if (next_token < end) load(values, args.value_cache, next_token, next_block);
        commit_async_group();
        first_token = next_token;
    }

    // Merge. Nothing fills the tiles any more: each warp leaves its partial result in its own.
    wait_async_groups<0>();
    __syncwarp();
    attention.store_partial(reinterpret_cast<float*>(warp_tiles));
    __syncthreads();
    constexpr int kStride = 2 * Tile::kTileBytes / static_cast<int>(sizeof(float));
    for (int i = threadIdx.x; i < vectors.count * Tile::kHeadDim; i += Tile::kThreads) {
        const int v = i / Tile::kHeadDim, d = i % Tile::kHeadDim;
        const float result = merge_partials<Tile>(reinterpret_cast<const float*>(shared), kStride, v, d);
        const int64_t out = static_cast<int64_t>(vectors.row(v)) * args.num_heads + vectors.head(v, kv_head);
        store_dtype(args.out, out * Tile::kHeadDim + d, result, args.dtype);
    }
}

template <typename Tile>
int launch_attention_tile(const AttentionArguments& args, int num_kv_heads, cudaStream_t stream) {
    const auto kernel = paged_attention_kernel<Tile>;
    const int64_t ctas = attention_ctas(args, Tile::kVectors);
    QUIRE_REQUIRE(ctas <= INT32_MAX, "paged_attention: %lld tiles of query rows exceed 2^31 - 1",
                  static_cast<long long>(ctas));
    // More than 48 KiB has to be asked for, once for each device.
    static thread_local int ready_device = -1;
    int device = 0;
    if (int status = check_cuda(cudaGetDevice(&device), "paged_attention")) return status;
    if (device != ready_device) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
        if (int status = check_cuda(error, "paged_attention")) return status;
        ready_device = device;
    }
    const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(num_kv_heads));
    kernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(args);
    return check_launch("paged_attention");
}

template <typename Cache, int kHeadDim>
int launch_attention_dim(const AttentionArguments& args, int num_kv_heads, int max_query_len, cudaStream_t stream) {
    // Decodes fill few vectors; a prompt fills all that the registers hold.
    constexpr int kFew = 4, kMany = kHeadDim > 128 ? 8 : 16;
    const bool few = static_cast<int64_t>(max_query_len) * args.group <= kFew;
    return few ? launch_attention_tile<AttentionTile<Cache, kHeadDim, kFew>>(args, num_kv_heads, stream)
               : launch_attention_tile<AttentionTile<Cache, kHeadDim, kMany>>(args, num_kv_heads, stream);
}

// Instantiated in one translation unit for each type of cache: they compile side by side.
template <typename Cache>
int launch_attention(const AttentionArguments& args, int num_kv_heads, int head_dim, int max_query_len,
                     cudaStream_t stream) {
    switch (head_dim) {
        case 64: return launch_attention_dim<Cache, 64>(args, num_kv_heads, max_query_len, stream);
        case 80: return launch_attention_dim<Cache, 80>(args, num_kv_heads, max_query_len, stream);
        case 96: return launch_attention_dim<Cache, 96>(args, num_kv_heads, max_query_len, stream);
        case 128: return launch_attention_dim<Cache, 128>(args, num_kv_heads, max_query_len, stream);
        case 256: return launch_attention_dim<Cache, 256>(args, num_kv_heads, max_query_len, stream);
        default:
            return fail(QUIRE_UNSUPPORTED, "paged_attention: head_dim=%d; the CUDA kernels have 64, 80, 96, 128 and 256",
                        head_dim);
    }
}

}  // namespace quire
