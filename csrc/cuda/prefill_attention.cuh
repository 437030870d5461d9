// Paged attention of prompts, whole or in chunks, on tensor cores (§4.1, Eq. 4); tiles and online softmax are those of
// FlashAttention-2 (arXiv 2307.08691), K and V come through the block table.
//
// The group of query heads that share a KV head, over the rows of one sequence, make one list of vectors, as in
// attention_arguments.cuh; each warp of a CTA takes 16 neighbours of it, and all warps share tiles of keys:
//
//   scores   S [16 vectors, kKeys]      = Q K^T            Q in registers (in shared memory where head_dim is 256)
//   values   O [16 vectors, head_dim]  += P V              P in registers, as the first product left it
//
//   shared   stage 0: K rows, V rows; stage 1: K rows, V rows                      see shared_rows.cuh
//
// While the warps work on one stage the other fills. Tiles of keys start at absolute positions, and a tile of which a
// vector sees nothing changes nothing of it, so a row's result is bitwise the same in any batch and chunk, if the splits
// are (attention_plan.h). Warps skip the tiles that none of their vectors sees, and the masks where they see all.
//
// A row whose tokens all lie in one split goes straight to `out`; else each split leaves a partial result, the output
// relative to its own sum and the logarithm (to base 2) of that sum, for merge_splits.cu.
#pragma once

#include "matrix_attention.h"
#include "mma.cuh"
#include "shared_rows.cuh"

namespace quire {

template <typename ElementType, int kDim, int kWarpsOfTile>
struct PrefillTile {
    using Element = ElementType;
    using Rows = SharedRows<kDim>;

    static constexpr int kHeadDim = kDim;
    static constexpr int kWarps = kWarpsOfTile;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kVectors = kWarps * 16;
    static constexpr int kKeys = kDim > 128 ? 32 : 64;
    static constexpr int kSteps = kDim / 16;
    static constexpr int kTileBytes = kKeys * Rows::kRowBytes;  // of K, and as much of V
    static constexpr int kStageBytes = 2 * kTileBytes;
    static constexpr int kQueryBytes = kVectors * Rows::kRowBytes;
    // Otherwise the vectors pass through the stages, on the way to registers.
    static constexpr bool kQueryStays = kDim > 128;
    static constexpr int kSharedBytes = kQueryStays ? 2 * kStageBytes + kQueryBytes
                                        : 2 * kStageBytes > kQueryBytes ? 2 * kStageBytes
                                                                        : kQueryBytes;

    static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 must be able to hold it");
    static_assert(kSplitGrain % kKeys == 0, "splits are whole tiles");
};

// One warp's vectors: their queries and online softmax. Lane (g, t) has vectors g and g + 8 of the warp's 16, and of each
// 8 dimensions, or keys, 2 t and 2 t + 1.
template <typename Tile>
struct PrefillWarp {
    using Element = typename Tile::Element;
    using Rows = typename Tile::Rows;
    static constexpr int kKeyColumns = Tile::kKeys / 8;
    static constexpr int kOutColumns = Tile::kHeadDim / 8;

    int lane;
    int first, last;  // positions of the warp's first and last row; last is -1 if it has none
    int position[2];  // of this lane's vectors' rows; -1: there is no such vector
    const unsigned char* query_rows;
    uint32_t query[Tile::kQueryStays ? 1 : Tile::kSteps][4];
    float output[kOutColumns][4];
    float maximum[2], sum[2];  // sum: of this lane's keys

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int i = 0; i < 2; ++i) maximum[i] = -INFINITY, sum[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < kOutColumns; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) output[c][i] = 0.0f;
        }
    }

    __device__ __forceinline__ void load_query_step(uint32_t (&step)[4], int s) const {
        load_matrices(step, Rows::at(query_rows, lane % 16, 2 * s + lane / 16));
    }

    __device__ __forceinline__ void score_keys(const unsigned char* keys, float (&score)[kKeyColumns][4]) const {
#pragma unroll
        for (int c = 0; c < kKeyColumns; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) score[c][i] = 0.0f;
        }
#pragma unroll
        for (int s = 0; s < Tile::kSteps; ++s) {
            uint32_t step[4];
            if constexpr (Tile::kQueryStays) {
                load_query_step(step, s);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) step[i] = query[s][i];
            }
#pragma unroll
            for (int c = 0; c < kKeyColumns; c += 2) {
                uint32_t key[4];
                load_matrices(key, Rows::at(keys, 8 * c + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2));
                mma_16x8x16<Element>(score[c], step, key[0], key[1]);
                mma_16x8x16<Element>(score[c + 1], step, key[2], key[3]);
            }
        }
    }

    // Keys behind a row's position, or before its window, are not seen. The tile's first key is `token`.
    __device__ __forceinline__ void mask(int token, int window, float (&score)[kKeyColumns][4]) const {
#pragma unroll
        for (int c = 0; c < kKeyColumns; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = token + 8 * c + 2 * (lane % 4) + i % 2;
                const int behind = position[i / 2] - key;
                if (behind < 0 || behind >= window) score[c][i] = -INFINITY;
            }
        }
    }

    // From scores to weights, in place; decays what came before.
    __device__ __forceinline__ void update_softmax(float scale_log2, float (&score)[kKeyColumns][4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float highest = -INFINITY;
#pragma unroll
            for (int c = 0; c < kKeyColumns; ++c) {
                highest = fmaxf(highest, fmaxf(score[c][2 * i], score[c][2 * i + 1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, 2));
            highest = fmaxf(highest * scale_log2, maximum[i]);
            // As long as a vector has seen nothing its maximum is -inf, and -inf - -inf would be NaN.
            const float base = highest == -INFINITY ? 0.0f : highest;
            const float decay = fast_exp2(maximum[i] - base);
            float total = 0.0f;
#pragma unroll
            for (int c = 0; c < kKeyColumns; ++c) {
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) {
                    score[c][j] = fast_exp2(fmaf(score[c][j], scale_log2, -base));
                    total += score[c][j];
                }
            }
            maximum[i] = highest;
            sum[i] = fmaf(sum[i], decay, total);
#pragma unroll
            for (int c = 0; c < kOutColumns; ++c) {
                output[c][2 * i] *= decay;
                output[c][2 * i + 1] *= decay;
            }
        }
    }

    __device__ __forceinline__ void add_values(const unsigned char* values, const float (&weight)[kKeyColumns][4]) {
#pragma unroll
        for (int c = 0; c < kKeyColumns; c += 2) {
            const uint32_t step[4] = {
                pack_pair<Element>(weight[c][0], weight[c][1]), pack_pair<Element>(weight[c][2], weight[c][3]),
                pack_pair<Element>(weight[c + 1][0], weight[c + 1][1]),
                pack_pair<Element>(weight[c + 1][2], weight[c + 1][3])};
#pragma unroll
            for (int d = 0; d < kOutColumns; d += 2) {
                uint32_t value[4];
                load_matrices_transposed(value, Rows::at(values, 8 * c + lane % 16, d + lane / 16));
                mma_16x8x16<Element>(output[d], step, value[0], value[1]);
                mma_16x8x16<Element>(output[d + 1], step, value[2], value[3]);
            }
        }
    }
};

// The CTA's vectors to shared memory, zeros where there are fewer; waits until they are there.
template <typename Tile>
__device__ __forceinline__ void load_query_rows(const PrefillArguments& args, const QueryVectors& vectors, int kv_head,
                                                unsigned char* rows) {
    using Rows = typename Tile::Rows;
    for (int i = threadIdx.x; i < Tile::kVectors * Rows::kChunks; i += Tile::kThreads) {
        const int vector = i / Rows::kChunks, chunk = i % Rows::kChunks;
        const bool valid = vector < vectors.count;
        const int64_t start = valid ? vectors.row(vector) * args.query_token_stride +
                                          vectors.head(vector, kv_head) * args.query_head_stride
                                    : 0;
        copy_async_16(Rows::at(rows, vector, chunk),
                      static_cast<const typename Tile::Element*>(args.query) + start + chunk * Rows::kChunk, valid);
    }
    commit_async_group();
    wait_async_groups<0>();
    __syncthreads();
}

// This lane's half of the warp's results: rows g and g + 8.
template <typename Tile>
__device__ __forceinline__ void write_vectors(const PrefillArguments& args, const QueryVectors& vectors, int kv_head,
                                              int split, int first_vector, PrefillWarp<Tile>& attention) {
    const int lane = attention.lane;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float total = attention.sum[i];
        total += __shfl_xor_sync(kFullWarp, total, 1);
        total += __shfl_xor_sync(kFullWarp, total, 2);
        const int vector = first_vector + lane / 4 + 8 * i;
        if (vector >= vectors.count) continue;
        const int row = vectors.row(vector);
        if (row < args.first_row || row >= args.end_row) continue;  // another launch's
        const RowSplits splits = splits_of(args, attention.position[i]);
        if (split < splits.first || split > splits.last) continue;
        const float inverse = 1.0f / total;
        const int head = vectors.head(vector, kv_head);
        if (splits.first == splits.last) {
            const int64_t index = static_cast<int64_t>(row) * args.num_heads + head;
            uint32_t* const out = reinterpret_cast<uint32_t*>(static_cast<typename Tile::Element*>(args.out) +
                                                              index * Tile::kHeadDim) +
                                  lane % 4;
#pragma unroll
            for (int c = 0; c < Tile::kHeadDim / 8; ++c) {
                out[4 * c] = pack_pair<typename Tile::Element>(attention.output[c][2 * i] * inverse,
                                                               attention.output[c][2 * i + 1] * inverse);
            }
        } else {
            const int64_t place = partial_row(args, split, row) + head;
            if (lane % 4 == 0) args.partial_lse[place] = attention.maximum[i] + log2f(total);
            float* const out = args.partial_out + place * Tile::kHeadDim + 2 * (lane % 4);
#pragma unroll
            for (int c = 0; c < Tile::kHeadDim / 8; ++c) {
                *reinterpret_cast<float2*>(out + 8 * c) = make_float2(attention.output[c][2 * i] * inverse,
                                                                      attention.output[c][2 * i + 1] * inverse);
            }
        }
    }
}

template <typename Tile>
__device__ __forceinline__ void clear_rows(const PrefillArguments& args, const QueryVectors& vectors, int kv_head) {
    using Element = typename Tile::Element;
    for (int i = threadIdx.x; i < vectors.count * Tile::kHeadDim; i += Tile::kThreads) {
        const int v = i / Tile::kHeadDim;
        const int64_t index = static_cast<int64_t>(vectors.row(v)) * args.num_heads + vectors.head(v, kv_head);
        static_cast<Element*>(args.out)[index * Tile::kHeadDim + i % Tile::kHeadDim] = from_float<Element>(0.0f);
    }
}

// The CTA's tokens [begin, end), through the stages.
template <typename Tile>
__device__ __forceinline__ void attend_tokens(const PrefillArguments& args, int seq, int kv_head, int begin, int end,
                                              int window, unsigned char* stages, PrefillWarp<Tile>& attention) {
    using Element = typename Tile::Element;
    constexpr int kBlocks = Tile::kKeys / 16;
    const Element* const keys = static_cast<const Element*>(args.key_cache.data) + kv_head * args.key_cache.head_stride;
    const Element* const values =
        static_cast<const Element*>(args.value_cache.data) + kv_head * args.value_cache.head_stride;
    const int32_t* const block_table = args.block_tables + seq * args.block_table_stride;
    const int slot_mask = (1 << args.block_shift) - 1;
    int32_t blocks[kBlocks];  // of the next tile's tokens; table entries past the end hold anything and are not read
    const auto read_blocks = [&](int token) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            blocks[b] = token + 16 * b < end ? block_table[(token + 16 * b) >> args.block_shift] : 0;
        }
    };
    const auto load = [&](int token, unsigned char* rows) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const int64_t block = blocks[b];
            const int first = token + 16 * b, slot = first & slot_mask;
            unsigned char* const key_rows = rows + 16 * b * Tile::Rows::kRowBytes;
            load_16_tokens<Tile::kHeadDim, Tile::kThreads>(
                key_rows, key_rows + Tile::kTileBytes,
                keys + block * args.key_cache.block_stride + slot * args.key_cache.slot_stride,
                values + block * args.value_cache.block_stride + slot * args.value_cache.slot_stride,
                args.key_cache.slot_stride, args.value_cache.slot_stride, end - first, threadIdx.x);
        }
        commit_async_group();
    };
    read_blocks(begin);
    load(begin, stages);
    read_blocks(begin + Tile::kKeys);
    int stage = 0;
    for (int token = begin; token < end; token += Tile::kKeys) {
        wait_async_groups<0>();
        __syncthreads();  // the tile is here for all warps, and none reads the other stage
        if (token + Tile::kKeys < end) {
            load(token + Tile::kKeys, stages + (1 - stage) * Tile::kStageBytes);
            read_blocks(token + 2 * Tile::kKeys);
        }
        if (token <= attention.last && token + Tile::kKeys > attention.first - window + 1) {
            const unsigned char* const rows = stages + stage * Tile::kStageBytes;
            float score[Tile::kKeys / 8][4];
            attention.score_keys(rows, score);
            const bool all_seen = token + Tile::kKeys <= attention.first + 1 && token > attention.last - window;
            if (!all_seen) attention.mask(token, window, score);
            attention.update_softmax(args.scale_log2, score);
            attention.add_values(rows + Tile::kTileBytes, score);
        }
        stage = 1 - stage;
    }
}

// One CTA for each tile of vectors (x), KV head (y) and split (z).
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) prefill_attention_kernel(PrefillArguments args) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int kv_head = blockIdx.y, split = blockIdx.z;
    // The last tiles of a prompt see most: they start first.
    const QueryVectors vectors = find_tile<Tile::kVectors>(args, gridDim.x - 1 - blockIdx.x);
    if (vectors.count <= 0) return;
    if (vectors.seq == args.num_seqs) {
        if (!args.skips_decodes && split == 0) clear_rows<Tile>(args, vectors, kv_head);
        return;
    }
    if (args.skips_decodes && vectors.num_rows == 1) return;

    // The CTA sees tokens [begin, end) of this split. begin is rounded down to whole tiles of keys.
    const int seq_len = args.seq_lens[vectors.seq];
    const int window = args.sliding_window > 0 ? args.sliding_window : INT32_MAX;
    const int split_begin = split * args.split_tokens;
    const int end = min(vectors.position(vectors.count - 1, seq_len) + 1,
                        split_begin > INT32_MAX - args.split_tokens ? INT32_MAX : split_begin + args.split_tokens);
    const int low = args.sliding_window > 0 ? max(0, vectors.position(0, seq_len) - window + 1) : 0;
    const int begin = max(split_begin, low / Tile::kKeys * Tile::kKeys);
    if (begin >= end) return;

    PrefillWarp<Tile> attention;
    attention.lane = lane;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int vector = 16 * warp + lane / 4 + 8 * i;
        attention.position[i] = vector < vectors.count ? vectors.position(vector, seq_len) : -1;
    }
    attention.first = vectors.position(16 * warp, seq_len);
    attention.last =
        16 * warp < vectors.count ? vectors.position(min(16 * warp + 16, vectors.count) - 1, seq_len) : -1;
    attention.start();
    unsigned char* const query_rows = shared + (Tile::kQueryStays ? 2 * Tile::kStageBytes : 0);
    load_query_rows<Tile>(args, vectors, kv_head, query_rows);
    attention.query_rows = query_rows + 16 * warp * Tile::Rows::kRowBytes;
    if constexpr (!Tile::kQueryStays) {
#pragma unroll
        for (int s = 0; s < Tile::kSteps; ++s) attention.load_query_step(attention.query[s], s);
        __syncthreads();  // the stages may be filled
    }
    attend_tokens(args, vectors.seq, kv_head, begin, end, window, shared, attention);
    write_vectors(args, vectors, kv_head, split, 16 * warp, attention);
}

template <typename Element>
TileKernel<PrefillArguments> prefill_kernel(int head_dim, int warps) {
    const auto of = [](auto tile) -> TileKernel<PrefillArguments> {
        using Tile = decltype(tile);
        return {prefill_attention_kernel<Tile>, Tile::kThreads, Tile::kSharedBytes};
    };
    return with_head_dim(head_dim, [&](auto dim) {
        if constexpr (dim.value <= 128) {
            if (warps == 8) return of(PrefillTile<Element, dim.value, 8>{});
        }
        return of(PrefillTile<Element, dim.value, 4>{});
    });
}

}  // namespace quire
