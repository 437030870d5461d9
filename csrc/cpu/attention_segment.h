// A segment walked tile by tile: which tiles, what each row sees of a tile, and where the values' sums go. Included by
// sources compiled once per instruction set (vec.h).
#pragma once

#include "attention_rows.h"

namespace quire {
namespace QUIRE_ISA {

// The rows of a query tile and the scratch of its scores.
struct SegmentRows {
    const QueryTile& tile;
    int64_t group;
    int window;  // 0 is all
    int64_t num_rows;
    int64_t head_dim;
    int64_t dim;  // padded
    float* queries;
    float* scores;
    float* keys;    // [dim, kTile], where they are gathered
    float* values;  // [kTile, dim], likewise
    SoftmaxState state;

    SegmentRows(const QueryTile& rows_of, int64_t query_heads, int sliding_window, int64_t head_size, float* scratch,
                SoftmaxState into)
        : tile(rows_of),
          group(query_heads),
          window(sliding_window),
          num_rows(rows_of.num_tokens * query_heads),
          head_dim(head_size),
          dim(padded_dim(head_size)),
          queries(scratch),
          scores(queries + num_rows * dim),
          keys(scores + num_rows * kTile),
          values(keys + kTile * dim),
          state(into) {
        for (int64_t r = 0; r < num_rows; ++r) {
            state.max[r] = kNothing;
            state.sum[r] = 0.0f;
        }
        memset(state.acc, 0, sizeof(float) * num_rows * dim);
    }

    int last() const { return tile.first_position + tile.num_tokens - 1; }  // no row sees further

    // body(position, num_tokens) for each tile of keys in the segment of which some row sees something.
    template <typename Body>
    void for_tiles(int segment, const Body& body) const {
        const int oldest = window > 0 ? tile.first_position - window + 1 : 0;
        const int begin = segment * kSegment, end = last() < begin + kSegment ? last() + 1 : begin + kSegment;
        for (int position = oldest > begin ? oldest / kTile * kTile : begin; position < end; position += kTile) {
            body(position, end - position < kTile ? end - position : kTile);
        }
    }

    // Scores of the tile at `position` into weights; those of int8 tokens are scaled before, and the weights after.
    void weigh(int position, const float* key_scales, const float* value_scales) const {
        for (int64_t r = 0; r < num_rows; ++r) {
            float* const row = scores + r * kTile;
            const int end = tile.first_position + static_cast<int>(r / group) + 1 - position;
            const int begin = window > 0 && end > window ? end - window : 0;
            if (key_scales != nullptr) multiply_tile(row, key_scales);
            weigh_row(row, begin < kTile ? begin : kTile, end < 0 ? 0 : end < kTile ? end : kTile, state.max + r,
                      state.sum + r, state.acc + r * dim, dim);
            if (value_scales != nullptr) multiply_tile(row, value_scales);
        }
    }

    // Add the tokens' values, by the weights: read in place where full vectors fit and they are read once or need no
    // conversion. Meanwhile `next` is fetched.
    template <typename C>
    void add_values(const C* const* rows, int num_tokens, TilePrefetch* next) const {
        const bool in_place = dim == head_dim && (num_rows <= kMaxRows || sizeof(C) == sizeof(float));
        if (in_place) {
            for_row_groups(num_rows, ValueRows<C>{scores, rows, num_tokens, state.acc, dim, next});
            return;
        }
        const float* gathered[kTile];
        for (int t = 0; t < num_tokens; ++t) gathered[t] = values + t * dim;
        gather_values(rows, num_tokens, head_dim, values);
        for_row_groups(num_rows, ValueRows<float>{scores, gathered, num_tokens, state.acc, dim, next});
    }

private:
    static void multiply_tile(float* row, const float* scales) {
        for (int t = 0; t < kTile; t += kWidth) (Vec::load(row + t) * Vec::load(scales + t)).store(row + t);
    }
};

}  // namespace QUIRE_ISA
}  // namespace quire
