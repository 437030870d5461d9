// Attention shared out: the batch is cut into query tiles, and items are a tile and a KV head.
//
// A row's result is built from segments of kSegment absolute positions, each from scratch and merged in order. Where
// there are too few items for the threads, the segments of an item are shared out as well; the thread that finishes the
// last one merges. The order of additions is the same either way.
#pragma once

#include <atomic>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace quire {

// Rows that share the conversion of a tile of K and V. More would push them out of the L2 cache.
constexpr int kTileRows = 48;

// Bounds the partial results of split items; above it items are not split.
constexpr int64_t kMaxPartialFloats = int64_t{16} << 20;

// Sequence i owns rows query_start_loc[i] .. query_start_loc[i + 1], its last tokens.
struct Sequences {
    const int32_t* query_start_loc;
    const int32_t* seq_lens;
    int num_seqs;
};

// The tiles of all sequences, of each sequence the last first: it is the longest, and best not begun last.
inline void cut_tiles(const Sequences& batch, int group, std::vector<QueryTile>* tiles) {
    const int tile_tokens = group < kTileRows ? kTileRows / group : 1;
    tiles->clear();
    for (int seq = 0; seq < batch.num_seqs; ++seq) {
        const int begin = batch.query_start_loc[seq], num_rows = batch.query_start_loc[seq + 1] - begin;
        for (int first = (num_rows - 1) / tile_tokens * tile_tokens; first >= 0 && num_rows > 0; first -= tile_tokens) {
            const int num_tokens = num_rows - first < tile_tokens ? num_rows - first : tile_tokens;
            tiles->push_back({seq, begin + first, num_tokens, batch.seq_lens[seq] - num_rows + first});
        }
    }
}

struct AttentionShape {
    int group;  // query heads of a KV head
    int num_kv_heads;
    int head_dim;
    int num_threads;
};

// Work: shape(), window() (0 is all), scratch_floats(rows), and attend(), merge() and finish() as in Kernels.
template <typename Work>
class AttentionLaunch {
public:
    AttentionLaunch(const Work& work, const std::vector<QueryTile>& tiles)
        : work_(work), shape_(work.shape()), tiles_(tiles) {
        for (const QueryTile& tile : tiles) {
            const int64_t rows = rows_of(tile);
            if (rows > max_rows_) max_rows_ = rows;
            const int segments = last_segment(tile) - first_segment(tile) + 1;
            if (segments > max_segments_) max_segments_ = segments;
        }
    }

    // False if there was no memory for scratch.
    bool run() {
        const int64_t num_items = static_cast<int64_t>(tiles_.size()) * shape_.num_kv_heads;
        const int64_t partial_floats = num_items * max_segments_ * state_floats(max_rows_, shape_.head_dim);
        const bool split = shape_.num_threads > 1 && max_segments_ > 1 && num_items < 4 * int64_t{shape_.num_threads} &&
                           partial_floats <= kMaxPartialFloats;
        split ? run_split(num_items, partial_floats) : run_whole(num_items);
        return !out_of_memory_.load();
    }

private:
    int first_segment(const QueryTile& tile) const {
        const int oldest = work_.window() > 0 ? tile.first_position - work_.window() + 1 : 0;
        return oldest > 0 ? oldest / kSegment : 0;
    }

    static int last_segment(const QueryTile& tile) { return (tile.first_position + tile.num_tokens - 1) / kSegment; }

    int64_t rows_of(const QueryTile& tile) const { return int64_t{tile.num_tokens} * shape_.group; }

    const QueryTile& tile_of(int64_t item) const { return tiles_[static_cast<size_t>(item / shape_.num_kv_heads)]; }
    int kv_head_of(int64_t item) const { return static_cast<int>(item % shape_.num_kv_heads); }

    // Where tiles are enough for the threads, one takes all heads of a tile: they lie beside each other in a block.
    void run_whole(int64_t num_items) {
        const int64_t num_tiles = static_cast<int64_t>(tiles_.size());
        const int64_t together = num_tiles < 4 * int64_t{shape_.num_threads} ? 1 : shape_.num_kv_heads;
        parallel_for(shape_.num_threads, num_items / together, [this, together](int64_t index) {
            for (int64_t item = index * together; item < (index + 1) * together; ++item) attend_whole(item);
        });
    }

    void attend_whole(int64_t item) {
        const QueryTile& tile = tile_of(item);
        const int64_t rows = rows_of(tile), floats = state_floats(rows, shape_.head_dim);
        float* memory = thread_scratch(0, 2 * floats + work_.scratch_floats(rows));
        if (memory == nullptr) return out_of_memory_.store(true);
        const SoftmaxState total = state_at(memory, rows, shape_.head_dim);
        const SoftmaxState part = state_at(memory + floats, rows, shape_.head_dim);
        const int first = first_segment(tile);
        for (int segment = first; segment <= last_segment(tile); ++segment) {
            const SoftmaxState state = segment == first ? total : part;
            work_.attend(tile, kv_head_of(item), segment, memory + 2 * floats, state);
            if (segment != first) work_.merge(rows, total, part);
        }
        work_.finish(tile, kv_head_of(item), total);
    }

    void run_split(int64_t num_items, int64_t partial_floats) {
        partials_ = thread_scratch(1, partial_floats);
        if (partials_ == nullptr) return out_of_memory_.store(true);
        std::vector<std::atomic<int>> done(static_cast<size_t>(num_items));
        parallel_for(shape_.num_threads, num_items * max_segments_, [this, &done](int64_t index) {
            const int64_t item = index / max_segments_;
            attend_part(item, static_cast<int>(index % max_segments_), &done[static_cast<size_t>(item)]);
        });
    }

    SoftmaxState partial(int64_t item, int segment, int64_t rows) const {
        const int64_t floats = state_floats(max_rows_, shape_.head_dim);
        return state_at(partials_ + (item * max_segments_ + segment) * floats, rows, shape_.head_dim);
    }

    void attend_part(int64_t item, int index, std::atomic<int>* done) {
        const QueryTile& tile = tile_of(item);
        const int first = first_segment(tile), num_segments = last_segment(tile) - first + 1;
        if (index >= num_segments) return;
        const int64_t rows = rows_of(tile);
        float* scratch = thread_scratch(0, work_.scratch_floats(rows));
        if (scratch == nullptr) return out_of_memory_.store(true);
        work_.attend(tile, kv_head_of(item), first + index, scratch, partial(item, index, rows));
        if (done->fetch_add(1, std::memory_order_acq_rel) + 1 < num_segments) return;
        const SoftmaxState total = partial(item, 0, rows);
        for (int i = 1; i < num_segments; ++i) work_.merge(rows, total, partial(item, i, rows));
        work_.finish(tile, kv_head_of(item), total);
    }

    const Work& work_;
    const AttentionShape shape_;
    const std::vector<QueryTile>& tiles_;
    int64_t max_rows_ = 0;
    int max_segments_ = 0;
    float* partials_ = nullptr;
    std::atomic<bool> out_of_memory_{false};
};

template <typename Work>
bool run_attention(const Work& work, const std::vector<QueryTile>& tiles) {
    return AttentionLaunch<Work>(work, tiles).run();
}

}  // namespace quire
