// Paged attention (§4.1, Eq. 4): the rows of one query tile over one segment of their sequence's cached tokens.
//
//   queries [rows, dim]      scaled by scale * log2(e), float32; row r is head r % group of token r / group
//   keys    [dim, kTile]     a tile of K, gathered through the block table and transposed: tokens lie in lanes
//   scores  [rows, kTile]    first q.k, then 2^(q.k - max)
//   values  kTile rows       where they lie in the cache, or gathered as [kTile, dim] where that pays
//
// A score adds its products in the order of the dimensions, a row its values in the order of the positions, whatever
// the rows around it. Rows that do not see a tile, or a token of it, get weight 0 there, which changes nothing.
#include "attention_segment.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

template <typename Q>
void gather_queries(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, float* queries) {
    const int64_t group = p.num_heads / p.num_kv_heads, dim = padded_dim(p.head_dim);
    const Q* query = static_cast<const Q*>(p.query) + kv_head * group * p.query_head_stride;
    const float scale = p.scale * kLog2e;
    for (int64_t r = 0; r < tile.num_tokens * group; ++r) {
        const Q* from = query + (tile.first_token + r / group) * p.query_token_stride + r % group * p.query_head_stride;
        float* to = queries + r * dim;
        for (int64_t d = 0; d < p.head_dim; ++d) to[d] = to_float(from[d]) * scale;
    }
}

// Where each of the tile's tokens lies in the cache.
template <typename C>
void find_rows(const QuirePagedAttentionParams& p, const QuireCacheView& cache, int seq, int kv_head, int position,
               int num_tokens, const C** rows) {
    const int32_t* table = p.block_tables + seq * p.block_table_stride;
    const C* base = static_cast<const C*>(cache.data) + kv_head * cache.head_stride;
    for (int t = 0; t < num_tokens;) {
        const int block = (position + t) / p.block_size, offset = (position + t) % p.block_size;
        const C* row = base + table[block] * cache.block_stride + offset * cache.slot_stride;
        for (int i = offset; i < p.block_size && t < num_tokens; ++i, ++t, row += cache.slot_stride) rows[t] = row;
    }
}

// Ask for rows of the cache before they are needed: a block is too short a run for the hardware to foresee the next.
template <typename C>
void prefetch_rows(const C* const* rows, int num_tokens, int64_t head_dim) {
    constexpr int64_t kLine = 64 / sizeof(C);
    for (int t = 0; t < num_tokens; ++t) {
        for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(rows[t] + d);
    }
}

template <typename C>
void gather_keys(const C* const* rows, int num_tokens, int64_t head_dim, float* keys) {
    for (int t = 0; t < num_tokens; t += kWidth) {
        const C* row[kWidth];  // lanes past the last token repeat it; their scores are masked
        for (int i = 0; i < kWidth; ++i) row[i] = rows[t + i < num_tokens ? t + i : num_tokens - 1];
        int64_t d = 0;
        for (; d + kWidth <= head_dim; d += kWidth) {
            Vec square[kWidth];
            for (int i = 0; i < kWidth; ++i) square[i] = Vec::load(row[i] + d);
            transpose(square);
            for (int i = 0; i < kWidth; ++i) square[i].store(keys + (d + i) * kTile + t);
        }
        for (; d < head_dim; ++d) {
            for (int i = 0; i < kWidth; ++i) keys[d * kTile + t + i] = to_float(row[i][d]);
        }
    }
}

template <typename Q, typename C>
void attend_segment(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, int segment, float* scratch,
                    SoftmaxState state) {
    const SegmentRows rows(tile, p.num_heads / p.num_kv_heads, p.sliding_window, p.head_dim, scratch, state);
    gather_queries<Q>(p, tile, kv_head, rows.queries);
    rows.for_tiles(segment, [&](int position, int num_tokens) {
        const C *keys[kTile], *values[kTile];
        find_rows(p, p.key_cache, tile.seq, kv_head, position, num_tokens, keys);
        find_rows(p, p.value_cache, tile.seq, kv_head, position, num_tokens, values);
        prefetch_rows(values, num_tokens, rows.head_dim);
        gather_keys(keys, num_tokens, rows.head_dim, rows.keys);
        const int next = position + kTile, left = rows.last() + 1 - next, num_next = left < kTile ? left : kTile;
        if (num_next > 0) {
            find_rows(p, p.key_cache, tile.seq, kv_head, next, num_next, keys);
            prefetch_rows(keys, num_next, rows.head_dim);
        }
        for_row_groups(rows.num_rows,
                       ScoreRows{rows.queries, rows.dim, rows.keys, rows.head_dim, num_tokens, rows.scores});
        rows.weigh(position, nullptr, nullptr);
        TilePrefetch nothing(0);
        rows.add_values(values, num_tokens, &nothing);
    });
}

template <typename Q>
void finish_rows(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, SoftmaxState state) {
    const int64_t group = p.num_heads / p.num_kv_heads, dim = padded_dim(p.head_dim);
    for (int64_t r = 0; r < tile.num_tokens * group; ++r) {
        const int64_t head = kv_head * group + r % group;
        Q* out = static_cast<Q*>(p.out) + ((tile.first_token + r / group) * p.num_heads + head) * p.head_dim;
        const float* acc = state.acc + r * dim;
        const float inverse = 1.0f / state.sum[r];
        // Adding 0 makes a -0 a +0, which tokens of weight 0 may or may not have done.
        for (int64_t d = 0; d < p.head_dim; ++d) from_float(acc[d] * inverse + 0.0f, out + d);
    }
}

}  // namespace

void attend(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, int segment, float* scratch,
            SoftmaxState state) {
    if (p.dtype == QUIRE_FLOAT32 && p.cache_dtype == QUIRE_FLOAT32) {
        attend_segment<float, float>(p, tile, kv_head, segment, scratch, state);
    } else if (p.dtype == QUIRE_FLOAT32) {
        attend_segment<float, BFloat16>(p, tile, kv_head, segment, scratch, state);
    } else if (p.cache_dtype == QUIRE_FLOAT32) {
        attend_segment<BFloat16, float>(p, tile, kv_head, segment, scratch, state);
    } else {
        attend_segment<BFloat16, BFloat16>(p, tile, kv_head, segment, scratch, state);
    }
}

void merge(int64_t rows, int64_t head_dim, SoftmaxState into, SoftmaxState from) {
    const int64_t dim = padded_dim(head_dim);
    for (int64_t r = 0; r < rows; ++r) {
        const float new_max = from.max[r] > into.max[r] ? from.max[r] : into.max[r];
        const float base = new_max == kNothing ? 0.0f : new_max;
        const float old_factor = exp2_of(into.max[r] - base), new_factor = exp2_of(from.max[r] - base);
        into.max[r] = new_max;
        into.sum[r] = into.sum[r] * old_factor + from.sum[r] * new_factor;
        for (int64_t d = 0; d < dim; d += kWidth) {
            float* acc = into.acc + r * dim + d;
            const Vec old = Vec::load(acc) * Vec::set1(old_factor);
            fma(Vec::load(from.acc + r * dim + d), Vec::set1(new_factor), old).store(acc);
        }
    }
}

void finish(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, SoftmaxState state) {
    if (p.dtype == QUIRE_FLOAT32) {
        finish_rows<float>(p, tile, kv_head, state);
    } else {
        finish_rows<BFloat16>(p, tile, kv_head, state);
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
