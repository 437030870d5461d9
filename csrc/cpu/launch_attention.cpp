// The launch of paged attention: check, cut the batch into query tiles, share out (tile, KV head) items.
//
// A row's result is built from segments of kSegment absolute positions, each from scratch and merged in order. Where
// there are too few items for the threads, the segments of an item are shared out as well; the thread that finishes the
// last one merges. The order of additions is the same either way.
#include <string.h>

#include <atomic>
#include <new>
#include <vector>

#include "error.h"
#include "isa.h"
#include "kernels.h"
#include "thread_pool.h"

namespace quire {

namespace {

constexpr const char* kOp = "paged_attention";

// Rows that share the conversion of a tile of K and V. More would push them out of the L2 cache.
constexpr int kTileRows = 48;

// Bounds the partial results of split items; above it items are not split.
constexpr int64_t kMaxPartialFloats = int64_t{16} << 20;

int check_shapes(const QuirePagedAttentionParams& p) {
    QUIRE_CHECK(check_dtype(kOp, "dtype", p.dtype));
    QUIRE_CHECK(check_dtype(kOp, "cache_dtype", p.cache_dtype));
    QUIRE_CHECK(check_range(kOp, "num_tokens", p.num_tokens, 0, INT32_MAX));
    QUIRE_CHECK(check_range(kOp, "num_seqs", p.num_seqs, 0, INT32_MAX));
    QUIRE_CHECK(check_range(kOp, "num_heads", p.num_heads, 1, INT32_MAX));
    QUIRE_CHECK(check_range(kOp, "num_kv_heads", p.num_kv_heads, 1, p.num_heads));
    QUIRE_CHECK(check_range(kOp, "head_dim", p.head_dim, 2, 1 << 16));
    QUIRE_CHECK(check_range(kOp, "max_blocks", p.max_blocks, 0, INT32_MAX));
    QUIRE_CHECK(check_range(kOp, "sliding_window", p.sliding_window, 0, INT32_MAX));
    if (p.head_dim % 2 != 0) return fail(QUIRE_INVALID_ARGUMENT, "%s: head_dim=%d is odd", kOp, p.head_dim);
    if (p.num_heads % p.num_kv_heads != 0) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: num_heads=%d is no multiple of num_kv_heads=%d", kOp, p.num_heads,
                    p.num_kv_heads);
    }
    if (p.num_tokens == 0) return QUIRE_OK;
    QUIRE_CHECK(check_not_null(kOp, "query", p.query));
    QUIRE_CHECK(check_not_null(kOp, "out", p.out));
    QUIRE_CHECK(check_range(kOp, "query_token_stride", p.query_token_stride, 0, INT64_MAX));
    QUIRE_CHECK(check_range(kOp, "query_head_stride", p.query_head_stride, 0, INT64_MAX));
    QUIRE_CHECK(check_range(kOp, "block_table_stride", p.block_table_stride, 0, INT64_MAX));
    QUIRE_CHECK(check_not_null(kOp, "query_start_loc", p.query_start_loc));
    QUIRE_CHECK(check_not_null(kOp, "seq_lens", p.seq_lens));
    QUIRE_CHECK(check_not_null(kOp, "block_tables", p.block_tables));
    return check_cache(kOp, p.key_cache, p.value_cache, p.num_blocks, p.block_size);
}

int check_sequences(const QuirePagedAttentionParams& p) {
    QUIRE_CHECK(check_range(kOp, "query_start_loc[0]", p.query_start_loc[0], 0, 0));
    for (int seq = 0; seq < p.num_seqs; ++seq) {
        const int begin = p.query_start_loc[seq], seq_len = p.seq_lens[seq];
        QUIRE_CHECK(check_range(kOp, "query_start_loc", p.query_start_loc[seq + 1], begin, p.num_tokens));
        const int num_rows = p.query_start_loc[seq + 1] - begin;
        QUIRE_CHECK(check_range(kOp, "rows of a sequence", num_rows, 0, p.max_query_len));
        const int64_t room = int64_t{p.max_blocks} * p.block_size;
        QUIRE_CHECK(check_range(kOp, "seq_lens", seq_len, num_rows, room < p.max_seq_len ? room : p.max_seq_len));
        if (num_rows == 0) continue;
        const int32_t* table = p.block_tables + seq * p.block_table_stride;
        for (int block = 0; block < (seq_len + p.block_size - 1) / p.block_size; ++block) {
            QUIRE_CHECK(check_range(kOp, "block_tables", table[block], 0, p.num_blocks - 1));
        }
    }
    return QUIRE_OK;
}

// The tiles of all sequences, of each sequence the last first: it is the longest, and best not begun last.
void cut_tiles(const QuirePagedAttentionParams& p, std::vector<QueryTile>* tiles) {
    const int group = p.num_heads / p.num_kv_heads;
    const int tile_tokens = group < kTileRows ? kTileRows / group : 1;
    tiles->clear();
    for (int seq = 0; seq < p.num_seqs; ++seq) {
        const int begin = p.query_start_loc[seq], num_rows = p.query_start_loc[seq + 1] - begin;
        for (int first = (num_rows - 1) / tile_tokens * tile_tokens; first >= 0 && num_rows > 0; first -= tile_tokens) {
            const int num_tokens = num_rows - first < tile_tokens ? num_rows - first : tile_tokens;
            tiles->push_back({seq, begin + first, num_tokens, p.seq_lens[seq] - num_rows + first});
        }
    }
}

int first_segment(const QuirePagedAttentionParams& p, const QueryTile& tile) {
    const int oldest = p.sliding_window > 0 ? tile.first_position - p.sliding_window + 1 : 0;
    return oldest > 0 ? oldest / kSegment : 0;
}

int last_segment(const QueryTile& tile) { return (tile.first_position + tile.num_tokens - 1) / kSegment; }

void zero_rows_of_no_sequence(const QuirePagedAttentionParams& p) {
    const int64_t row_bytes = int64_t{p.num_heads} * p.head_dim * (p.dtype == QUIRE_FLOAT32 ? 4 : 2);
    const int64_t used = p.num_seqs > 0 ? p.query_start_loc[p.num_seqs] : 0;
    memset(static_cast<char*>(p.out) + used * row_bytes, 0, static_cast<size_t>((p.num_tokens - used) * row_bytes));
}

class Launch {
public:
    Launch(const QuirePagedAttentionParams& p, const std::vector<QueryTile>& tiles)
        : p_(p), kernels_(active_kernels()), tiles_(tiles), group_(p.num_heads / p.num_kv_heads) {
        for (const QueryTile& tile : tiles) {
            const int64_t rows = rows_of(tile);
            if (rows > max_rows_) max_rows_ = rows;
            const int segments = last_segment(tile) - first_segment(p, tile) + 1;
            if (segments > max_segments_) max_segments_ = segments;
        }
    }

    int run() {
        const int64_t num_items = static_cast<int64_t>(tiles_.size()) * p_.num_kv_heads;
        const int64_t partial_floats = num_items * max_segments_ * state_floats(max_rows_, p_.head_dim);
        const bool split = p_.num_threads > 1 && max_segments_ > 1 && num_items < 4 * int64_t{p_.num_threads} &&
                           partial_floats <= kMaxPartialFloats;
        return split ? run_split(num_items, partial_floats) : run_whole(num_items);
    }

private:
    int64_t rows_of(const QueryTile& tile) const { return int64_t{tile.num_tokens} * group_; }

    const QueryTile& tile_of(int64_t item) const { return tiles_[static_cast<size_t>(item / p_.num_kv_heads)]; }
    int kv_head_of(int64_t item) const { return static_cast<int>(item % p_.num_kv_heads); }

    int run_whole(int64_t num_items) {
        parallel_for(p_.num_threads, num_items, [this](int64_t item) { attend_whole(item); });
        return status();
    }

    void attend_whole(int64_t item) {
        const QueryTile& tile = tile_of(item);
        const int64_t rows = rows_of(tile), floats = state_floats(rows, p_.head_dim);
        float* memory = thread_scratch(0, 2 * floats + attend_scratch_floats(rows, p_.head_dim));
        if (memory == nullptr) return out_of_memory_.store(true);
        const SoftmaxState total = state_at(memory, rows, p_.head_dim);
        const SoftmaxState part = state_at(memory + floats, rows, p_.head_dim);
        const int first = first_segment(p_, tile);
        for (int segment = first; segment <= last_segment(tile); ++segment) {
            const SoftmaxState state = segment == first ? total : part;
            kernels_.attend(p_, tile, kv_head_of(item), segment, memory + 2 * floats, state);
            if (segment != first) kernels_.merge(rows, p_.head_dim, total, part);
        }
        kernels_.finish(p_, tile, kv_head_of(item), total);
    }

    int run_split(int64_t num_items, int64_t partial_floats) {
        partials_ = thread_scratch(1, partial_floats);
        std::vector<std::atomic<int>> done(static_cast<size_t>(num_items));
        if (partials_ == nullptr) return fail(QUIRE_OUT_OF_MEMORY, "%s: no memory for partial results", kOp);
        parallel_for(p_.num_threads, num_items * max_segments_, [this, &done](int64_t index) {
            const int64_t item = index / max_segments_;
            attend_part(item, static_cast<int>(index % max_segments_), &done[static_cast<size_t>(item)]);
        });
        return status();
    }

    SoftmaxState partial(int64_t item, int segment, int64_t rows) const {
        const int64_t floats = state_floats(max_rows_, p_.head_dim);
        return state_at(partials_ + (item * max_segments_ + segment) * floats, rows, p_.head_dim);
    }

    void attend_part(int64_t item, int index, std::atomic<int>* done) {
        const QueryTile& tile = tile_of(item);
        const int first = first_segment(p_, tile), num_segments = last_segment(tile) - first + 1;
        if (index >= num_segments) return;
        const int64_t rows = rows_of(tile);
        float* scratch = thread_scratch(0, attend_scratch_floats(rows, p_.head_dim));
        if (scratch == nullptr) return out_of_memory_.store(true);
        kernels_.attend(p_, tile, kv_head_of(item), first + index, scratch, partial(item, index, rows));
        if (done->fetch_add(1, std::memory_order_acq_rel) + 1 < num_segments) return;
        const SoftmaxState total = partial(item, 0, rows);
        for (int i = 1; i < num_segments; ++i) kernels_.merge(rows, p_.head_dim, total, partial(item, i, rows));
        kernels_.finish(p_, tile, kv_head_of(item), total);
    }

    int status() const {
        return out_of_memory_.load() ? fail(QUIRE_OUT_OF_MEMORY, "%s: no memory for scratch", kOp) : int{QUIRE_OK};
    }

    const QuirePagedAttentionParams& p_;
    const Kernels& kernels_;
    const std::vector<QueryTile>& tiles_;
    const int64_t group_;
    int64_t max_rows_ = 0;
    int max_segments_ = 0;
    float* partials_ = nullptr;
    std::atomic<bool> out_of_memory_{false};
};

}  // namespace

}  // namespace quire

using namespace quire;

int quire_paged_attention(const QuirePagedAttentionParams* params) {
    QUIRE_CHECK(check_isa());
    QUIRE_CHECK(check_call(kOp, params));
    const QuirePagedAttentionParams& p = *params;
    QUIRE_CHECK(check_shapes(p));
    if (p.num_tokens == 0) return QUIRE_OK;
    QUIRE_CHECK(check_sequences(p));
    zero_rows_of_no_sequence(p);
    try {
        thread_local std::vector<QueryTile> tiles;
        cut_tiles(p, &tiles);
        return Launch(p, tiles).run();
    } catch (const std::bad_alloc&) {
        return fail(QUIRE_OUT_OF_MEMORY, "%s: no memory for the list of work items", kOp);
    }
}

int quire_paged_attention_workspace(const QuirePagedAttentionParams* params, int64_t* bytes) {
    QUIRE_CHECK(check_call("paged_attention_workspace", params));
    QUIRE_CHECK(check_not_null("paged_attention_workspace", "bytes", bytes));
    *bytes = 0;
    return QUIRE_OK;
}
