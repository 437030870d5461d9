// Attention over the native decoder's packed blocks (kv_layout.h): the rows of one query tile over one segment.
//
// Few rows, a decode's, multiply K and V where they lie. Many share a tile of keys [dim, kTile] and values [kTile, dim]
// converted to float32. Both add the same terms in the same order. The scales of int8 tokens multiply scores and weights.
#include "attention_segment.h"
#include "decoder_kernels.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

template <typename T>
inline void set(float value, T* out) {
    from_float(value, out);
}
inline void set(float value, int8_t* out) { *out = static_cast<int8_t>(__builtin_rintf(value)); }

// How a part of a block is read and written, by the type of its elements.
template <typename C>
struct Part {
    static constexpr bool kScaled = sizeof(C) == 1;
    static constexpr int kStep = sizeof(C) == 2 ? 2 : 1;  // values along D that lie together in K

    uint8_t* data;
    int64_t block_size;

    float* scales() const { return reinterpret_cast<float*>(data); }
    C* elements() const { return reinterpret_cast<C*>(data + (kScaled ? 4 * block_size : 0)); }
    // The step-th values of the tokens from `offset` on.
    C* key(int64_t step, int64_t offset) const { return elements() + (step * block_size + offset) * kStep; }
    C* value(int64_t offset, int64_t head_dim) const { return elements() + offset * head_dim; }
};

// The i-th of the values along D that lie together, of a vector of tokens.
inline Vec key_at(const float* p, int) { return Vec::load(p); }
inline Vec key_at(const int8_t* p, int) { return Vec::load(p); }
inline Vec key_at(const BFloat16* p, int i) {
    Vec pair[2];
    load_pairs(p, &pair[0], &pair[1]);
    return pair[i];
}

// A tile of the sequence's tokens in the cache.
template <typename C>
struct CacheTile {
    Part<C> keys[kTile];  // of the tile's blocks
    Part<C> values[kTile];
    int first_offset;  // of the tile's first token in its block
    int num_tokens;
    int block_size;
    int shift;  // block_size is 2^shift: a division for each token would cost more than the rest

    CacheTile(const DecoderAttention& a, int seq, int kv_head, int position, int tokens)
        : num_tokens(tokens), block_size(static_cast<int>(a.cache.layout->block_size)) {
        const int32_t* table = a.block_tables + seq * a.block_table_stride;
        shift = __builtin_ctz(static_cast<unsigned>(block_size));
        first_offset = position & (block_size - 1);
        const int first = position >> shift, last = (position + tokens - 1) >> shift;
        for (int block = first; block <= last; ++block) {
            keys[block - first] = {a.cache.keys(table[block], kv_head), block_size};
            values[block - first] = {a.cache.values(table[block], kv_head), block_size};
        }
    }

    int block_of(int t) const { return (first_offset + t) >> shift; }
    int offset_of(int t) const { return (first_offset + t) & (block_size - 1); }

    // Vectors of tokens do not cross blocks: tiles begin at multiples of kTile, vectors at multiples of kWidth.
    bool whole_vectors() const { return block_size >= kWidth; }

    void gather_keys(int64_t head_dim, float* keys_out) const {
        constexpr int kStep = Part<C>::kStep;
        if (!whole_vectors()) return gather_keys_slowly(head_dim, keys_out);
        for (int t = 0; t < num_tokens; t += kWidth) {
            const Part<C>& part = keys[block_of(t)];
            const int offset = offset_of(t);
            for (int64_t step = 0; step < head_dim / kStep; ++step) {
                const C* const from = part.key(step, offset);
                for (int i = 0; i < kStep; ++i) key_at(from, i).store(keys_out + (step * kStep + i) * kTile + t);
            }
        }
    }

    void gather_keys_slowly(int64_t head_dim, float* keys_out) const {
        constexpr int kStep = Part<C>::kStep;
        for (int t = 0; t < kTile; ++t) {
            const int from = t < num_tokens ? t : num_tokens - 1;  // lanes past the last token are masked later
            const Part<C>& part = keys[block_of(from)];
            for (int64_t d = 0; d < head_dim; ++d) {
                keys_out[d * kTile + t] = to_float(part.key(d / kStep, offset_of(from))[d % kStep]);
            }
        }
    }

    void find_values(int64_t head_dim, const C** rows) const {
        for (int t = 0; t < num_tokens;) {
            const C* row = values[block_of(t)].value(offset_of(t), head_dim);
            for (int i = offset_of(t); i < block_size && t < num_tokens; ++i, ++t, row += head_dim) rows[t] = row;
        }
    }

    void gather_scales(float* key_scales, float* value_scales) const {
        for (int t = 0; t < kTile; ++t) {
            const int from = t < num_tokens ? t : num_tokens - 1;
            key_scales[t] = keys[block_of(from)].scales()[offset_of(from)];
            value_scales[t] = values[block_of(from)].scales()[offset_of(from)];
        }
    }
};

// Scores of `Rows` queries for `Vectors` vectors of tokens, read where they lie.
template <int Rows, int Vectors, typename C>
void score_in_place(const float* queries, int64_t dim, int64_t head_dim, const CacheTile<C>& tile, int t, float* scores,
                    TilePrefetch* next) {
    constexpr int kStep = Part<C>::kStep;
    const C* from[Vectors];
    for (int j = 0; j < Vectors; ++j) {
        const int token = t + j * kWidth < tile.num_tokens ? t + j * kWidth : t;
        from[j] = tile.keys[tile.block_of(token)].key(0, tile.offset_of(token));
    }
    const int64_t stride = int64_t{tile.block_size} * kStep;
    Vec sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j] = Vec::set1(0.0f);
    }
    for (int64_t d = 0; d < head_dim; d += kStep) {
        next->ask(kStep * kLinesAStep);
        for (int i = 0; i < kStep; ++i) {
            add_outer(
                sums, [&](int r) { return Vec::set1(queries[r * dim + d + i]); },
                [&](int j) { return key_at(from[j], i); });
        }
        for (int j = 0; j < Vectors; ++j) from[j] += stride;
    }
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j].store(scores + r * kTile + t + j * kWidth);
    }
}

template <typename C>
struct ScoreInPlace {
    const float* queries;
    int64_t dim;
    int64_t head_dim;
    const CacheTile<C>& tile;
    float* scores;
    TilePrefetch* next;

    template <int Rows>
    void run(int64_t row) const {
        constexpr int kVectors = Rows <= 3 ? 4 : 1;
        for (int t = 0; t < tile.num_tokens; t += kVectors * kWidth) {
            score_in_place<Rows, kVectors>(queries + row * dim, dim, head_dim, tile, t, scores + row * kTile, next);
        }
    }
};

void gather_queries(const DecoderAttention& a, const QueryTile& tile, int kv_head, int64_t head_dim, float* queries) {
    const int64_t dim = padded_dim(head_dim);
    const float scale = a.scale * kLog2e;
    for (int64_t r = 0; r < tile.num_tokens * int64_t{a.group}; ++r) {
        const int64_t head = int64_t{kv_head} * a.group + r % a.group;
        const float* from = a.query + (tile.first_token + r / a.group) * a.query_stride + head * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) queries[r * dim + d] = from[d] * scale;
    }
}

// The blocks of the tile at `position`; after the sequence's end those of the next head's first tile, which lie beside
// this one's.
void find_next(const DecoderAttention& a, const QueryTile& tile, int num_tokens, int kv_head, int position,
               TilePrefetch* next) {
    if (position >= num_tokens) {
        position = a.sliding_window > 0 && num_tokens > a.sliding_window ? num_tokens - a.sliding_window : 0;
        if (++kv_head == a.cache.layout->num_kv_heads) return;
    }
    const int32_t* table = a.block_tables + tile.seq * a.block_table_stride;
    const int block_size = static_cast<int>(a.cache.layout->block_size);
    const int end = position + kTile < num_tokens ? position + kTile : num_tokens;
    for (int at = position; at < end; at += block_size) next->add(a.cache.keys(table[at / block_size], kv_head));
}

template <typename C>
void attend_segment(const DecoderAttention& a, const QueryTile& tile, int kv_head, int segment, float* scratch,
                    SoftmaxState state) {
    const SegmentRows rows(tile, a.group, a.sliding_window, a.cache.layout->head_dim, scratch, state);
    gather_queries(a, tile, kv_head, rows.head_dim, rows.queries);
    rows.for_tiles(segment, [&](int position, int num_tokens) {
        const CacheTile<C> cache(a, tile.seq, kv_head, position, num_tokens);
        TilePrefetch next(a.cache.layout->head_bytes());
        find_next(a, tile, rows.last() + 1, kv_head, position + kTile, &next);
        if (rows.num_rows <= kMaxRows && cache.whole_vectors()) {
            for_row_groups(rows.num_rows, ScoreInPlace<C>{rows.queries, rows.dim, rows.head_dim, cache, rows.scores, &next});
        } else {
            cache.gather_keys(rows.head_dim, rows.keys);
            for_row_groups(rows.num_rows,
                           ScoreRows{rows.queries, rows.dim, rows.keys, rows.head_dim, num_tokens, rows.scores});
        }
        if constexpr (Part<C>::kScaled) {
            float key_scales[kTile], value_scales[kTile];
            cache.gather_scales(key_scales, value_scales);
            rows.weigh(position, key_scales, value_scales);
        } else {
            rows.weigh(position, nullptr, nullptr);
        }
        const C* values[kTile];
        cache.find_values(rows.head_dim, values);
        rows.add_values(values, num_tokens, &next);
    });
}

template <typename C>
void store_parts(const LayerCache& cache, int64_t kv_head, int64_t slot, const float* key, const float* value) {
    constexpr int kStep = Part<C>::kStep;
    const int64_t block_size = cache.layout->block_size, head_dim = cache.layout->head_dim;
    const int64_t block = slot / block_size, offset = slot % block_size;
    const Part<C> keys{cache.keys(block, kv_head), block_size}, values{cache.values(block, kv_head), block_size};
    float key_factor = 1.0f, value_factor = 1.0f;
    if (Part<C>::kScaled) {
        float largest_key = 0.0f, largest_value = 0.0f;
        for (int64_t d = 0; d < head_dim; ++d) {
            largest_key = __builtin_fabsf(key[d]) > largest_key ? __builtin_fabsf(key[d]) : largest_key;
            largest_value = __builtin_fabsf(value[d]) > largest_value ? __builtin_fabsf(value[d]) : largest_value;
        }
        keys.scales()[offset] = largest_key / 127.0f;
        values.scales()[offset] = largest_value / 127.0f;
        key_factor = largest_key > 0.0f ? 127.0f / largest_key : 0.0f;
        value_factor = largest_value > 0.0f ? 127.0f / largest_value : 0.0f;
    }
    for (int64_t d = 0; d < head_dim; ++d) set(key[d] * key_factor, keys.key(d / kStep, offset) + d % kStep);
    C* const row = values.value(offset, head_dim);
    for (int64_t d = 0; d < head_dim; ++d) set(value[d] * value_factor, row + d);
}

}  // namespace

void decoder_attend(const DecoderAttention& a, const QueryTile& tile, int kv_head, int segment, float* scratch,
                    SoftmaxState state) {
    switch (a.cache.layout->kv_type) {
        case QUIRE_KV_FLOAT32: return attend_segment<float>(a, tile, kv_head, segment, scratch, state);
        case QUIRE_KV_BFLOAT16: return attend_segment<BFloat16>(a, tile, kv_head, segment, scratch, state);
        default: return attend_segment<int8_t>(a, tile, kv_head, segment, scratch, state);
    }
}

void decoder_finish(const DecoderAttention& a, const QueryTile& tile, int kv_head, SoftmaxState state) {
    const int64_t head_dim = a.cache.layout->head_dim, dim = padded_dim(head_dim);
    for (int64_t r = 0; r < tile.num_tokens * int64_t{a.group}; ++r) {
        const int64_t head = int64_t{kv_head} * a.group + r % a.group;
        float* out = a.out + (tile.first_token + r / a.group) * a.out_stride + head * head_dim;
        const float inverse = 1.0f / state.sum[r];
        // Adding 0 makes a -0 a +0, which tokens of weight 0 may or may not have done.
        for (int64_t d = 0; d < head_dim; ++d) out[d] = state.acc[r * dim + d] * inverse + 0.0f;
    }
}

void store_kv(const LayerCache& cache, int64_t kv_head, int64_t slot, const float* key, const float* value) {
    switch (cache.layout->kv_type) {
        case QUIRE_KV_FLOAT32: return store_parts<float>(cache, kv_head, slot, key, value);
        case QUIRE_KV_BFLOAT16: return store_parts<BFloat16>(cache, kv_head, slot, key, value);
        default: return store_parts<int8_t>(cache, kv_head, slot, key, value);
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
