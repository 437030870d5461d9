// Paged attention of single rows on tensor cores (§4.1, Eq. 4): the decodes of a batch, K and V read once for all query
// heads that share them.
//
// The operands are swapped: a tile has 16 tokens, which are one block or a part of one, as the M of the matrix units and
// a KV head's query vectors as their N of 8, so that small groups waste little. Each warp works alone on its own tiles:
//
//   scores   S^T [16 tokens, 8 vectors]        = K [16, head_dim] Q^T          K as it lies in shared memory
//   values   O^T [head_dim, 8 vectors]        += V^T [head_dim, 16] P^T        V transposed as it is loaded
//
//   tokens   run 0: | warp 0 | warp 1 | warp 2 | warp 3 |   run 1: | warp 0 | ...      16 tokens each
//   shared   warp 0: stage 0: K rows, V rows; stage 1: ...;  warp 1: ...               see shared_rows.cuh
//
// Tiles come by asynchronous copies, kStages - 1 tiles ahead; the blocks of 32 tiles are read at a time, 32 tiles ahead.
// Which runs a CTA takes is said in attention_plan.h. Vectors past 8 or 16 of a KV head (`chunks`) are other CTAs'.
//
// A sequence that a CTA has to itself goes straight to `out`; else the CTA leaves a partial result, the output relative
// to its own sum and the logarithm (to base 2) of that sum, for merge_shares.cu.
#pragma once

#include "attention_shares.cuh"
#include "matrix_attention.h"
#include "mma.cuh"
#include "shared_rows.cuh"

namespace quire {

template <typename ElementType, int kDim, int kVectorsOfTile>
struct DecodeTile {
    using Element = ElementType;
    using Rows = SharedRows<kDim>;

    static constexpr int kHeadDim = kDim;
    static constexpr int kVectors = kVectorsOfTile;
    static constexpr int kColumns = kVectors / 8;  // of 8 vectors
    static constexpr int kSteps = kDim / 16;       // of the matrix units along head_dim
    static constexpr int kWarps = decode_warps(kDim);
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kRun = decode_run(kDim);
    static constexpr int kTileBytes = kDecodeTokens * Rows::kRowBytes;  // of K, and as much of V
    // As many stages as the 99 KiB hold that every GPU since sm_80 gives a CTA.
    static constexpr int kStages = kWarps * 4 * 2 * kTileBytes <= 99 * 1024 ? 4 : 3;
    static constexpr int kWarpBytes = kStages * 2 * kTileBytes;
    static constexpr int kSharedBytes = kWarps * kWarpBytes;
    // Floats of a vector's result in shared memory: output, maximum, sum. 4 past a multiple of 16: no bank conflicts.
    static constexpr int kResult = kDim + 4;

    static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 must be able to hold it");
    static_assert(kVectors * kResult * static_cast<int>(sizeof(float)) <= kWarpBytes, "results replace a warp's tiles");
};

// The blocks of this warp's tiles, one after another. Lane i holds the block of the i-th tile of the 32 at hand, and that
// of the 32 after them.
struct BlockQueue {
    const int32_t* table;
    int shift, start, step, end;  // tile i's first token is start + i * step; table entries from `end` on are not read
    int lane;
    int32_t at_hand, upcoming;

    __device__ __forceinline__ int32_t read(int tile) const {
        const int token = start + (tile + lane) * step;
        return token < end ? table[token >> shift] : 0;
    }
    __device__ __forceinline__ void fill() {
        at_hand = read(0);
        upcoming = read(kWarpSize);
    }
    // Called for 0, 1, 2 ... by the whole warp.
    __device__ __forceinline__ int64_t block(int tile) {
        if (tile > 0 && tile % kWarpSize == 0) {
            at_hand = upcoming;
            upcoming = read(tile + kWarpSize);
        }
        return __shfl_sync(kFullWarp, at_hand, tile % kWarpSize);
    }
};

// One warp's online softmax. Lane (g, t) has vectors 8 c + 2 t and the next of each column c, of dimensions 16 s + g and
// + 8 of each step s.
template <typename Tile>
struct DecodeWarp {
    using Element = typename Tile::Element;
    using Rows = typename Tile::Rows;

    uint32_t query[Tile::kSteps][Tile::kColumns][2];
    float output[Tile::kSteps][Tile::kColumns][4];
    float maximum[Tile::kColumns][2];
    float sum[Tile::kColumns][2];  // of this lane's tokens
    int lane;

    __device__ __forceinline__ void start(int lane_) {
        lane = lane_;
#pragma unroll
        for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
            for (int i = 0; i < 2; ++i) maximum[c][i] = -INFINITY, sum[c][i] = 0.0f;
#pragma unroll
            for (int s = 0; s < Tile::kSteps; ++s) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output[s][c][i] = 0.0f;
            }
        }
    }

    // The first `count` of the vectors at `first`, a stride apart; zeros for the others.
    __device__ __forceinline__ void load_query(const Element* first, int64_t stride, int count) {
#pragma unroll
        for (int c = 0; c < Tile::kColumns; ++c) {
            const int vector = 8 * c + lane / 4;
            const Element* row = first + vector * stride + 2 * (lane % 4);
#pragma unroll
            for (int s = 0; s < Tile::kSteps; ++s) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    query[s][c][half] =
                        vector < count ? *reinterpret_cast<const uint32_t*>(row + 16 * s + 8 * half) : 0;
                }
            }
        }
    }

    // Takes a tile in. Tokens outside [low, end) of the sequence are not seen; the tile's first one is `token`.
    __device__ __forceinline__ void take(const unsigned char* keys, const unsigned char* values, int token, int low,
                                         int end, float scale_log2) {
        float score[Tile::kColumns][4] = {};
#pragma unroll
        for (int s = 0; s < Tile::kSteps; ++s) {
            uint32_t key[4];
            load_matrices(key, Rows::at(keys, lane % 16, 2 * s + lane / 16));
#pragma unroll
            for (int c = 0; c < Tile::kColumns; ++c) {
                mma_16x8x16<Element>(score[c], key, query[s][c][0], query[s][c][1]);
            }
        }
#pragma unroll
        for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int position = token + lane / 4 + (i < 2 ? 0 : 8);
                score[c][i] = position >= low && position < end ? score[c][i] * scale_log2 : -INFINITY;
            }
        }
        uint32_t weights[Tile::kColumns][2];
        update_softmax(score, weights);
#pragma unroll
        for (int s = 0; s < Tile::kSteps; ++s) {
            uint32_t value[4];
            load_matrices_transposed(value, Rows::at(values, lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2));
#pragma unroll
            for (int c = 0; c < Tile::kColumns; ++c) {
                mma_16x8x16<Element>(output[s][c], value, weights[c][0], weights[c][1]);
            }
        }
    }

    // From scores to the weights of the second product, transposed for it; decays what came before.
    __device__ __forceinline__ void update_softmax(const float (&score)[Tile::kColumns][4],
                                                   uint32_t (&weights)[Tile::kColumns][2]) {
#pragma unroll
        for (int c = 0; c < Tile::kColumns; ++c) {
            float weight[4], decay[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float highest = fmaxf(score[c][i], score[c][i + 2]);
#pragma unroll
                for (int mask = 4; mask < kWarpSize; mask *= 2) {
                    highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, mask));
                }
                highest = fmaxf(highest, maximum[c][i]);
                // As long as a vector has seen nothing its maximum is -inf, and -inf - -inf would be NaN.
                const float base = highest == -INFINITY ? 0.0f : highest;
                decay[i] = fast_exp2(maximum[c][i] - base);
                weight[i] = fast_exp2(score[c][i] - base);
                weight[i + 2] = fast_exp2(score[c][i + 2] - base);
                maximum[c][i] = highest;
                sum[c][i] = fmaf(sum[c][i], decay[i], weight[i] + weight[i + 2]);
            }
#pragma unroll
            for (int s = 0; s < Tile::kSteps; ++s) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output[s][c][i] *= decay[i % 2];
            }
            weights[c][0] = transpose_matrix(pack_pair<Element>(weight[0], weight[1]));
            weights[c][1] = transpose_matrix(pack_pair<Element>(weight[2], weight[3]));
        }
    }

    // Leaves each vector's output, maximum and sum in `results`, [kVectors, kResult].
    __device__ __forceinline__ void store(float* results) {
#pragma unroll
        for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int mask = 4; mask < kWarpSize; mask *= 2) {
                    sum[c][i] += __shfl_xor_sync(kFullWarp, sum[c][i], mask);
                }
                float* result = results + (8 * c + 2 * (lane % 4) + i) * Tile::kResult;
                if (lane < 4) result[Tile::kHeadDim] = maximum[c][i], result[Tile::kHeadDim + 1] = sum[c][i];
#pragma unroll
                for (int s = 0; s < Tile::kSteps; ++s) {
                    result[16 * s + lane / 4] = output[s][c][i];
                    result[16 * s + lane / 4 + 8] = output[s][c][i + 2];
                }
            }
        }
    }
};

// The part of a sequence's tokens, [begin, end), that a CTA takes; it sees those from `low` on.
struct DecodeSegment {
    int seq, begin, low, end;
};

// This warp's tiles of the segment, through its stages.
template <typename Tile>
__device__ __forceinline__ void attend_segment(const DecodeArguments& args, const DecodeSegment& segment, int kv_head,
                                               int warp, unsigned char* stages, DecodeWarp<Tile>& attention) {
    using Element = typename Tile::Element;
    const int lane = attention.lane;
    const int start = segment.begin + warp * kDecodeTokens;
    const int num_tiles = start < segment.end ? (segment.end - start - 1) / Tile::kRun + 1 : 0;
    const Element* const keys = static_cast<const Element*>(args.key_cache.data) + kv_head * args.key_cache.head_stride;
    const Element* const values =
        static_cast<const Element*>(args.value_cache.data) + kv_head * args.value_cache.head_stride;
    const int slot_mask = (1 << args.block_shift) - 1;
    BlockQueue blocks{args.block_tables + segment.seq * args.block_table_stride,
                      args.block_shift,
                      start,
                      Tile::kRun,
                      segment.end,
                      lane,
                      0,
                      0};
    blocks.fill();
    const auto load = [&](int tile, int stage) {
        const int token = start + tile * Tile::kRun;
        const int64_t block = blocks.block(tile);
        const int slot = token & slot_mask;
        unsigned char* const rows = stages + stage * 2 * Tile::kTileBytes;
        load_16_tokens<Tile::kHeadDim, kWarpSize>(
            rows, rows + Tile::kTileBytes, keys + block * args.key_cache.block_stride + slot * args.key_cache.slot_stride,
            values + block * args.value_cache.block_stride + slot * args.value_cache.slot_stride,
            args.key_cache.slot_stride, args.value_cache.slot_stride, segment.end - token, lane);
    };
#pragma unroll
    for (int tile = 0; tile < Tile::kStages - 1; ++tile) {
        if (tile < num_tiles) load(tile, tile);
        commit_async_group();
    }
    int stage = 0, free_stage = Tile::kStages - 1;
    for (int tile = 0; tile < num_tiles; ++tile) {
        wait_async_groups<Tile::kStages - 2>();
        __syncwarp();  // the tile is here for all lanes, and none reads the stage that comes free
        if (tile + Tile::kStages - 1 < num_tiles) load(tile + Tile::kStages - 1, free_stage);
        commit_async_group();
        const unsigned char* const rows = stages + stage * 2 * Tile::kTileBytes;
        attention.take(rows, rows + Tile::kTileBytes, start + tile * Tile::kRun, segment.low, segment.end,
                       args.scale_log2);
        free_stage = stage;
        stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    wait_async_groups<0>();
    __syncwarp();
}

// The warps' results as one, to `out` or to the place of a partial result. `stages` is warp 0's.
template <typename Tile>
__device__ __forceinline__ void write_segment(const DecodeArguments& args, const unsigned char* stages, int64_t row,
                                              int first_head, int count, int64_t place) {
    for (int i = threadIdx.x; i < count * Tile::kHeadDim; i += Tile::kThreads) {
        const int vector = i / Tile::kHeadDim, d = i % Tile::kHeadDim;
        const auto result = [&](int warp) {
            return reinterpret_cast<const float*>(stages + warp * Tile::kWarpBytes) + vector * Tile::kResult;
        };
        float highest = -INFINITY;
#pragma unroll
        for (int w = 0; w < Tile::kWarps; ++w) highest = fmaxf(highest, result(w)[Tile::kHeadDim]);
        float numerator = 0.0f, denominator = 0.0f;
#pragma unroll
        for (int w = 0; w < Tile::kWarps; ++w) {
            const float weight = fast_exp2(result(w)[Tile::kHeadDim] - highest);
            denominator = fmaf(weight, result(w)[Tile::kHeadDim + 1], denominator);
            numerator = fmaf(weight, result(w)[d], numerator);
        }
        const float output = numerator / denominator;
        if (place < 0) {
            const int64_t index = (row * args.num_heads + first_head + vector) * Tile::kHeadDim + d;
            static_cast<typename Tile::Element*>(args.out)[index] = from_float<typename Tile::Element>(output);
        } else {
            args.partial_out[(place * Tile::kVectors + vector) * Tile::kHeadDim + d] = output;
            if (d == 0) args.partial_lse[place * Tile::kVectors + vector] = highest + log2f(denominator);
        }
    }
}

// One CTA for each share (y) and each 8 or 16 vectors of each KV head (x, so that the heads of a block are read at about
// the same time).
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) decode_attention_kernel(DecodeArguments args) {
    using Element = typename Tile::Element;
    extern __shared__ __align__(16) unsigned char shared[];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int kv_head = blockIdx.x / args.chunks, first_vector = blockIdx.x % args.chunks * Tile::kVectors;
    const int first_head = kv_head * args.group + first_vector;
    const int count = min(Tile::kVectors, args.group - first_vector);
    unsigned char* const stages = shared + warp * Tile::kWarpBytes;

    // Rows of no sequence: each CTA clears its vectors of some of them.
    for (int row = args.query_start_loc[args.num_seqs] + blockIdx.y; row < args.num_tokens; row += gridDim.y) {
        for (int i = threadIdx.x; i < count * Tile::kHeadDim; i += Tile::kThreads) {
            const int64_t index = (static_cast<int64_t>(row) * args.num_heads + first_head) * Tile::kHeadDim + i;
            static_cast<Element*>(args.out)[index] = from_float<Element>(0.0f);
        }
    }

    ShareCursor cursor = find_share(args, blockIdx.y, lane);
    bool continues = cursor.run > 0;  // this sequence's earlier runs are another CTA's
    while (cursor.left > 0) {
        const SequenceRuns runs = runs_of(args, cursor.seq);
        const int taken = static_cast<int>(min(static_cast<int64_t>(runs.count - cursor.run), cursor.left));
        if (taken > 0) {
            const int seq_len = args.seq_lens[cursor.seq];
            const int64_t row = args.query_start_loc[cursor.seq];
            const int begin = (runs.first + cursor.run) * Tile::kRun;
            const DecodeSegment segment{cursor.seq, begin, first_visible(args, seq_len),
                                        min(begin + taken * Tile::kRun, seq_len)};
            DecodeWarp<Tile> attention;
            attention.start(lane);
            attention.load_query(static_cast<const Element*>(args.query) + row * args.query_token_stride +
                                     first_head * args.query_head_stride,
                                 args.query_head_stride, count);
            attend_segment(args, segment, kv_head, warp, stages, attention);
            attention.store(reinterpret_cast<float*>(stages));
            __syncthreads();
            const bool whole = !continues && cursor.run + taken == runs.count;
            write_segment<Tile>(args, shared, row, first_head, count,
                                whole ? -1 : partial_place(blockIdx.y, gridDim.x, blockIdx.x, continues ? 0 : 1));
            __syncthreads();  // the stages may be filled again
        }
        cursor.left -= taken;
        cursor.run = 0;
        continues = false;
        ++cursor.seq;
    }
}

template <typename Element>
TileKernel<DecodeArguments> decode_kernel(int head_dim, int vectors) {
    const auto of = [](auto tile) -> TileKernel<DecodeArguments> {
        using Tile = decltype(tile);
        return {decode_attention_kernel<Tile>, Tile::kThreads, Tile::kSharedBytes};
    };
    return with_head_dim(head_dim, [&](auto dim) {
        return vectors == 8 ? of(DecodeTile<Element, dim.value, 8>{}) : of(DecodeTile<Element, dim.value, 16>{});
    });
}

}  // namespace quire
