// Paged attention (§4.1, Eq. 4): the rows of one query tile over one segment of their sequence's cached tokens.
//
//   queries [rows, dim]      scaled by scale * log2(e), float32; row r is head r % group of token r / group
//   keys    [dim, kTile]     a tile of K, gathered through the block table and transposed: tokens lie in lanes
//   scores  [rows, kTile]    first q.k, then 2^(q.k - max)
//   values  kTile rows       where they lie in the cache, or gathered as [kTile, dim] where that pays
//
// A score adds its products in the order of the dimensions, a row its values in the order of the positions, whatever
// the rows around it. Rows that do not see a tile, or a token of it, get weight 0 there, which changes nothing.
#include "kernels.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

constexpr int kWidth = Vec::kWidth;
constexpr float kNothing = -__builtin_inff();
constexpr float kLog2e = 1.44269504088896341f;

// Most rows that share a load of keys or values; with their vectors they fill the registers.
constexpr int kMaxRows = kWidth == 1 ? 4 : 6;

// Vectors of accumulators a row: few rows need more, or each addition would wait for the one before.
constexpr int vectors_for(int rows) {
    if (kWidth == 16) return 4;
    return rows == 1 ? 8 : rows <= 3 ? 4 : 2;
}

template <int Rows, int Vectors>
void score_block(const float* queries, int64_t dim, const float* keys, int64_t head_dim, float* scores) {
    Vec sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j] = Vec::set1(0.0f);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
        Vec key[Vectors];
        for (int j = 0; j < Vectors; ++j) key[j] = Vec::load(keys + d * kTile + j * kWidth);
        for (int r = 0; r < Rows; ++r) {
            const Vec query = Vec::set1(queries[r * dim + d]);
            for (int j = 0; j < Vectors; ++j) sums[r][j] = fma(query, key[j], sums[r][j]);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j].store(scores + r * kTile + j * kWidth);
    }
}

template <int Rows>
void score_rows(const float* queries, int64_t dim, const float* keys, int64_t head_dim, int num_tokens, float* scores) {
    constexpr int kVectors = vectors_for(Rows);
    for (int t = 0; t < num_tokens; t += kVectors * kWidth) {
        score_block<Rows, kVectors>(queries, dim, keys + t, head_dim, scores + t);
    }
}

template <int Rows, int Vectors, typename V>
void value_block(const float* weights, const V* const* values, int num_tokens, int64_t d, float* acc, int64_t dim) {
    Vec sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j] = Vec::load(acc + r * dim + d + j * kWidth);
    }
    for (int t = 0; t < num_tokens; ++t) {
        Vec value[Vectors];
        for (int j = 0; j < Vectors; ++j) value[j] = Vec::load(values[t] + d + j * kWidth);
        for (int r = 0; r < Rows; ++r) {
            const Vec weight = Vec::set1(weights[r * kTile + t]);
            for (int j = 0; j < Vectors; ++j) sums[r][j] = fma(weight, value[j], sums[r][j]);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j].store(acc + r * dim + d + j * kWidth);
    }
}

template <int Rows, typename V>
void value_rows(const float* weights, const V* const* values, int num_tokens, float* acc, int64_t dim) {
    constexpr int kVectors = vectors_for(Rows);
    int64_t d = 0;
    for (; d + kVectors * kWidth <= dim; d += kVectors * kWidth) {
        value_block<Rows, kVectors>(weights, values, num_tokens, d, acc, dim);
    }
    for (; d + 2 * kWidth <= dim; d += 2 * kWidth) value_block<Rows, 2>(weights, values, num_tokens, d, acc, dim);
    for (; d < dim; d += kWidth) value_block<Rows, 1>(weights, values, num_tokens, d, acc, dim);
}

// Call body.run<n>(first_row) for rows 0 .. num_rows in groups of n = kMaxRows, and one of the rest.
template <typename Body>
void for_row_groups(int64_t num_rows, const Body& body) {
    int64_t row = 0;
    for (; row + kMaxRows <= num_rows; row += kMaxRows) body.template run<kMaxRows>(row);
    switch (num_rows - row) {
        case 1: body.template run<1>(row); break;
        case 2: body.template run<2>(row); break;
        case 3: body.template run<3>(row); break;
        case 4: body.template run<4>(row); break;
        case 5: body.template run<5>(row); break;
        default: break;
    }
}

struct ScoreRows {
    const float* queries;
    int64_t dim;
    const float* keys;
    int64_t head_dim;
    int num_tokens;
    float* scores;

    template <int Rows>
    void run(int64_t row) const {
        score_rows<Rows>(queries + row * dim, dim, keys, head_dim, num_tokens, scores + row * kTile);
    }
};

template <typename V>
struct ValueRows {
    const float* weights;
    const V* const* values;
    int num_tokens;
    float* acc;
    int64_t dim;

    template <int Rows>
    void run(int64_t row) const {
        value_rows<Rows>(weights + row * kTile, values, num_tokens, acc + row * dim, dim);
    }
};

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

// Copy to [num_tokens, dim] with zeros past head_dim.
template <typename C>
void gather_values(const C* const* rows, int num_tokens, int64_t head_dim, float* values) {
    const int64_t dim = padded_dim(head_dim);
    for (int t = 0; t < num_tokens; ++t) {
        int64_t d = 0;
        for (; d + kWidth <= head_dim; d += kWidth) Vec::load(rows[t] + d).store(values + t * dim + d);
        for (; d < head_dim; ++d) values[t * dim + d] = to_float(rows[t][d]);
        for (; d < dim; ++d) values[t * dim + d] = 0.0f;
    }
}

void scale_row(float* row, int64_t dim, float factor) {
    const Vec factors = Vec::set1(factor);
    for (int64_t d = 0; d < dim; d += kWidth) (Vec::load(row + d) * factors).store(row + d);
}

float exp2_of(float x) { return exp2(Vec::set1(x)).sum() / kWidth; }

// Online softmax (Milakov and Gimelshein, arXiv 1805.02867): turn a row's scores of tokens begin .. end into weights,
// 0 elsewhere, and rescale what the row has summed so far to the new maximum.
void weigh_row(float* scores, int begin, int end, float* max, float* sum, float* acc, int64_t dim) {
    for (int t = 0; t < begin; ++t) scores[t] = kNothing;
    for (int t = end; t < kTile; ++t) scores[t] = kNothing;
    Vec largest = Vec::load(scores);
    for (int t = kWidth; t < kTile; t += kWidth) largest = quire::QUIRE_ISA::max(largest, Vec::load(scores + t));
    const float tile_max = largest.largest();
    const float new_max = tile_max > *max ? tile_max : *max;
    const float base = new_max == kNothing ? 0.0f : new_max;  // nothing seen yet: all weights 0, not NaN

    Vec tile_sum = Vec::set1(0.0f);
    for (int t = 0; t < kTile; t += kWidth) {
        const Vec weight = exp2(Vec::load(scores + t) - Vec::set1(base));
        weight.store(scores + t);
        tile_sum = tile_sum + weight;
    }
    if (new_max != *max) {
        const float factor = exp2_of(*max - base);
        *sum *= factor;
        scale_row(acc, dim, factor);
    }
    *max = new_max;
    *sum += tile_sum.sum();
}

template <typename Q, typename C>
void attend_segment(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, int segment, float* scratch,
                    SoftmaxState state) {
    const int64_t group = p.num_heads / p.num_kv_heads, num_rows = tile.num_tokens * group;
    const int64_t head_dim = p.head_dim, dim = padded_dim(head_dim);
    float* queries = scratch;
    float* scores = queries + num_rows * dim;
    float* keys = scores + num_rows * kTile;
    float* packed = keys + kTile * dim;
    for (int64_t r = 0; r < num_rows; ++r) {
        state.max[r] = kNothing;
        state.sum[r] = 0.0f;
    }
    memset(state.acc, 0, sizeof(float) * num_rows * dim);
    gather_queries<Q>(p, tile, kv_head, queries);

    // Values are read in place where full vectors fit and they are read once or need no conversion.
    const bool in_place = head_dim % kWidth == 0 && dim == head_dim && (sizeof(C) == sizeof(float) || num_rows <= kMaxRows);
    const int last = tile.first_position + tile.num_tokens - 1;  // no row sees further
    const int oldest = p.sliding_window > 0 ? tile.first_position - p.sliding_window + 1 : 0;
    const int segment_begin = segment * kSegment;
    const int segment_end = last < segment_begin + kSegment ? last + 1 : segment_begin + kSegment;
    int position = oldest > segment_begin ? oldest / kTile * kTile : segment_begin;
    for (; position < segment_end; position += kTile) {
        const int num_tokens = segment_end - position < kTile ? segment_end - position : kTile;
        const C *rows[kTile], *value_rows[kTile];
        find_rows(p, p.key_cache, tile.seq, kv_head, position, num_tokens, rows);
        find_rows(p, p.value_cache, tile.seq, kv_head, position, num_tokens, value_rows);
        prefetch_rows(value_rows, num_tokens, head_dim);
        gather_keys(rows, num_tokens, head_dim, keys);
        const int next = position + kTile, num_next = last + 1 - next < kTile ? last + 1 - next : kTile;
        if (num_next > 0) {
            find_rows(p, p.key_cache, tile.seq, kv_head, next, num_next, rows);
            prefetch_rows(rows, num_next, head_dim);
        }
        for_row_groups(num_rows, ScoreRows{queries, dim, keys, head_dim, num_tokens, scores});

        for (int64_t r = 0; r < num_rows; ++r) {
            const int end = tile.first_position + static_cast<int>(r / group) + 1 - position;
            const int begin = p.sliding_window > 0 && end > p.sliding_window ? end - p.sliding_window : 0;
            weigh_row(scores + r * kTile, begin < kTile ? begin : kTile, end < 0 ? 0 : end < kTile ? end : kTile,
                      state.max + r, state.sum + r, state.acc + r * dim, dim);
        }

        if (in_place) {
            for_row_groups(num_rows, ValueRows<C>{scores, value_rows, num_tokens, state.acc, dim});
        } else {
            const float* values[kTile];
            for (int t = 0; t < num_tokens; ++t) values[t] = packed + t * dim;
            gather_values(value_rows, num_tokens, head_dim, packed);
            for_row_groups(num_rows, ValueRows<float>{scores, values, num_tokens, state.acc, dim});
        }
    }
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
