// Paged attention on CUDA cores: what a warp does with one tile of tokens.
#pragma once

#include "async_copy.cuh"
#include "attention_arguments.cuh"

namespace quire {

// Shapes that the compiler knows. Row padding of 16 bytes lets 8 lanes read 8 rows without bank conflicts.
template <typename CacheType, int kDim, int kVectorsOfTile>
struct AttentionTile {
    using Cache = CacheType;
    using Pack = Vector<Cache, 16 / sizeof(Cache)>;

    static constexpr int kHeadDim = kDim;
    static constexpr int kVectors = kVectorsOfTile;
    static constexpr int kTokens = kWarpSize;  // of one warp's tile
    static constexpr int kPack = 16 / sizeof(Cache);
    static constexpr int kPacksPerRow = kHeadDim / kPack;
    static constexpr int kRowElements = kHeadDim + kPack;
    static constexpr int kTileBytes = kTokens * kRowElements * static_cast<int>(sizeof(Cache));
    // As many warps as leave room for the rest in the 99 KiB that every GPU since sm_80 gives a CTA. It must not
    // depend on kVectors: the order of the sums does depend on it.
    static constexpr int kWarps = 4 * 2 * kTileBytes <= 80 * 1024 ? 4 : 2 * 2 * kTileBytes <= 80 * 1024 ? 2 : 1;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kRun = kWarps * kTokens;  // tokens of one round of all warps
    static constexpr int kPairsPerLane = (kHeadDim / 2 + kWarpSize - 1) / kWarpSize;  // pairs of dimensions
    static constexpr int kPartial = kHeadDim + 2;  // floats of a merged vector: output, maximum, sum

    // Shared memory: K and V tiles of each warp, then the query vectors, then each warp's probabilities. The merge
    // reuses the tiles.
    static constexpr int kQueryBytes = kVectors * kHeadDim * static_cast<int>(sizeof(float));
    static constexpr int kProbabilityBytes = kTokens * kVectors * static_cast<int>(sizeof(float));
    static constexpr int kSharedBytes = kWarps * (2 * kTileBytes + kProbabilityBytes) + kQueryBytes;

    static_assert(kHeadDim % kPack == 0 && kHeadDim % 2 == 0, "rows are whole packs and pairs");
    static_assert(kVectors % 4 == 0, "probabilities are read four at a time");
    static_assert(kSharedBytes <= 99 * 1024, "every GPU since sm_80 must be able to hold it");
    static_assert(kVectors * kPartial * static_cast<int>(sizeof(float)) <= 2 * kTileBytes,
                  "a warp's partial result must fit in its tiles");
};

// Asks for the 32 rows that start at `first_token`. `row` is where this lane's own row is. Nothing is read of a row at or
// past `end`, which comes as zeros: its slot may hold anything.
template <typename Tile>
__device__ __forceinline__ void load_rows(typename Tile::Cache* tile, const typename Tile::Cache* row, int first_token,
                                          int end, int lane) {
#pragma unroll
    for (int i = 0; i < Tile::kPacksPerRow; ++i) {
        const int index = i * kWarpSize + lane;
        const int token = index / Tile::kPacksPerRow, pack = index % Tile::kPacksPerRow;
        const auto source = reinterpret_cast<const typename Tile::Cache*>(
            __shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(row), token));
        copy_async_16(tile + token * Tile::kRowElements + pack * Tile::kPack, source + pack * Tile::kPack,
                      first_token + token < end);
    }
}

// One warp's online softmax over its tiles of tokens.
template <typename Tile>
struct WarpAttention {
    static constexpr int kVectors = Tile::kVectors;

    int lane;
    float maximum[kVectors];
    float sum[kVectors];  // of this lane's tokens
    float2 output[kVectors][Tile::kPairsPerLane];

    __device__ __forceinline__ explicit WarpAttention(int lane_) : lane(lane_) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            maximum[i] = -INFINITY;
            sum[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < Tile::kPairsPerLane; ++j) output[i][j] = make_float2(0.0f, 0.0f);
        }
    }

    // score[i] = query vector i . this lane's K row.
    __device__ __forceinline__ void score_keys(const typename Tile::Cache* keys, const float* queries,
                                               float (&score)[kVectors]) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) score[i] = 0.0f;
        const typename Tile::Cache* row = keys + lane * Tile::kRowElements;
#pragma unroll 2
        for (int d = 0; d < Tile::kHeadDim; d += Tile::kPack) {
            const auto pack = *reinterpret_cast<const typename Tile::Pack*>(row + d);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
#pragma unroll
                for (int j = 0; j < Tile::kPack; j += 4) {
                    const float4 q = *reinterpret_cast<const float4*>(queries + i * Tile::kHeadDim + d + j);
                    score[i] = fmaf(q.x, to_float(pack.elements[j]), score[i]);
                    score[i] = fmaf(q.y, to_float(pack.elements[j + 1]), score[i]);
                    score[i] = fmaf(q.z, to_float(pack.elements[j + 2]), score[i]);
                    score[i] = fmaf(q.w, to_float(pack.elements[j + 3]), score[i]);
                }
            }
        }
    }

    // Takes this lane's score of vector i in; returns its probability relative to the new maximum.
    __device__ __forceinline__ float update_softmax(int i, float score) {
        const float new_maximum = fmaxf(maximum[i], warp_max(score));
        // As long as a vector has seen nothing its maximum is -inf, and -inf - -inf would be NaN.
        const float base = new_maximum == -INFINITY ? 0.0f : new_maximum;
        const float decay = exp2f(maximum[i] - base);
        const float probability = exp2f(score - base);
        maximum[i] = new_maximum;
        sum[i] = fmaf(sum[i], decay, probability);
#pragma unroll
        for (int j = 0; j < Tile::kPairsPerLane; ++j) {
            output[i][j].x *= decay;
            output[i][j].y *= decay;
        }
        return probability;
    }

    // output[i] += sum over the tile's first `num_tokens` tokens of probabilities[token][i] * V[token].
    __device__ __forceinline__ void add_values(const typename Tile::Cache* tile, const float* probabilities,
                                               int num_tokens) {
        for (int t = 0; t < num_tokens; ++t) {
            const typename Tile::Cache* row = tile + t * Tile::kRowElements;
            float2 values[Tile::kPairsPerLane];
#pragma unroll
            for (int j = 0; j < Tile::kPairsPerLane; ++j) {
                const int d = 2 * (j * kWarpSize + lane);
                values[j] = make_float2(0.0f, 0.0f);
                if (d < Tile::kHeadDim) {
                    const auto pair = *reinterpret_cast<const Vector<typename Tile::Cache, 2>*>(row + d);
                    values[j] = make_float2(to_float(pair.elements[0]), to_float(pair.elements[1]));
                }
            }
#pragma unroll
            for (int i = 0; i < kVectors; i += 4) {
                const float4 p = *reinterpret_cast<const float4*>(probabilities + t * kVectors + i);
                const float weights[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
#pragma unroll
                    for (int j = 0; j < Tile::kPairsPerLane; ++j) {
                        output[i + k][j].x = fmaf(weights[k], values[j].x, output[i + k][j].x);
                        output[i + k][j].y = fmaf(weights[k], values[j].y, output[i + k][j].y);
                    }
                }
            }
        }
    }

    // Leaves each vector's output, maximum and sum in `partial`, [kVectors, kPartial].
    __device__ __forceinline__ void store_partial(float* partial) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const float total = warp_sum(sum[i]);
            float* vector = partial + i * Tile::kPartial;
            if (lane == 0) {
                vector[Tile::kHeadDim] = maximum[i];
                vector[Tile::kHeadDim + 1] = total;
            }
#pragma unroll
            for (int j = 0; j < Tile::kPairsPerLane; ++j) {
                const int d = 2 * (j * kWarpSize + lane);
                if (d < Tile::kHeadDim) *reinterpret_cast<float2*>(vector + d) = output[i][j];
            }
        }
    }
};

// Element d of vector `vector` over all warps' partial results, warp 0 first. `stride` counts floats between warps.
template <typename Tile>
__device__ __forceinline__ float merge_partials(const float* partials, int stride, int vector, int d) {
    const float* part = partials + vector * Tile::kPartial;
    float highest = -INFINITY;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) highest = fmaxf(highest, part[w * stride + Tile::kHeadDim]);
    float numerator = 0.0f, denominator = 0.0f;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
        const float weight = exp2f(part[w * stride + Tile::kHeadDim] - highest);
        denominator = fmaf(weight, part[w * stride + Tile::kHeadDim + 1], denominator);
        numerator = fmaf(weight, part[w * stride + d], numerator);
    }
    return numerator / denominator;
}

}  // namespace quire
