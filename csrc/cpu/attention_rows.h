// The rows of a query tile against a tile of keys and values: scores, weights, sums. Included by sources compiled once per
// instruction set (vec.h).
//
//   queries [rows, dim]      scaled by scale * log2(e); row r is head r % group of token r / group
//   keys    [dim, kTile]     tokens lie in lanes
//   scores  [rows, kTile]    first q.k, then 2^(q.k - max)
#pragma once

#include "kernels.h"
#include "prefetch.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

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

// sums[r][j] += row(r) * vector(j). What there is fewer of is held, and the other one at a time: sums and operands fit the
// registers, or each sum would wait for its way through memory.
template <int Rows, int Vectors, typename Row, typename Vector>
inline void add_outer(Vec (&sums)[Rows][Vectors], const Row& row, const Vector& vector) {
    if constexpr (Rows <= Vectors) {
        Vec rows[Rows];
        for (int r = 0; r < Rows; ++r) rows[r] = row(r);
        for (int j = 0; j < Vectors; ++j) {
            const Vec one = vector(j);
            for (int r = 0; r < Rows; ++r) sums[r][j] = fma(rows[r], one, sums[r][j]);
        }
    } else {
        Vec vectors[Vectors];
        for (int j = 0; j < Vectors; ++j) vectors[j] = vector(j);
        for (int r = 0; r < Rows; ++r) {
            const Vec one = row(r);
            for (int j = 0; j < Vectors; ++j) sums[r][j] = fma(one, vectors[j], sums[r][j]);
        }
    }
}

template <int Rows, int Vectors>
inline void score_block(const float* queries, int64_t dim, const float* keys, int64_t head_dim, float* scores) {
    Vec sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j] = Vec::set1(0.0f);
    }
    for (int64_t d = 0; d < head_dim; ++d) {
        add_outer(
            sums, [&](int r) { return Vec::set1(queries[r * dim + d]); },
            [&](int j) { return Vec::load(keys + d * kTile + j * kWidth); });
    }
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j].store(scores + r * kTile + j * kWidth);
    }
}

template <int Rows>
inline void score_rows(const float* queries, int64_t dim, const float* keys, int64_t head_dim, int num_tokens, float* scores) {
    constexpr int kVectors = vectors_for(Rows);
    for (int t = 0; t < num_tokens; t += kVectors * kWidth) {
        score_block<Rows, kVectors>(queries, dim, keys + t, head_dim, scores + t);
    }
}

// A tile's blocks at most: no kernel takes smaller ones in place.
using TilePrefetch = Prefetch<kTile / 8>;

// Lines asked for with each value of a tile of keys, and each token of its values: with wider vectors a tile is passed over
// in fewer steps.
constexpr int kLinesAStep = kWidth == 16 ? 2 : 1;

template <int Rows, int Vectors, typename V>
inline void value_block(const float* weights, const V* const* values, int num_tokens, int64_t d, float* acc, int64_t dim,
                        TilePrefetch* next) {
    Vec sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j] = Vec::load(acc + r * dim + d + j * kWidth);
    }
    for (int t = 0; t < num_tokens; ++t) {
        next->ask(kLinesAStep);
        add_outer(
            sums, [&](int r) { return Vec::set1(weights[r * kTile + t]); },
            [&](int j) { return Vec::load(values[t] + d + j * kWidth); });
    }
    for (int r = 0; r < Rows; ++r) {
        for (int j = 0; j < Vectors; ++j) sums[r][j].store(acc + r * dim + d + j * kWidth);
    }
}

template <int Rows, typename V>
inline void value_rows(const float* weights, const V* const* values, int num_tokens, float* acc, int64_t dim,
                       TilePrefetch* next) {
    constexpr int kVectors = vectors_for(Rows);
    int64_t d = 0;
    for (; d + kVectors * kWidth <= dim; d += kVectors * kWidth) {
        value_block<Rows, kVectors>(weights, values, num_tokens, d, acc, dim, next);
    }
    for (; d + 2 * kWidth <= dim; d += 2 * kWidth) value_block<Rows, 2>(weights, values, num_tokens, d, acc, dim, next);
    for (; d < dim; d += kWidth) value_block<Rows, 1>(weights, values, num_tokens, d, acc, dim, next);
}

// Call body.run<n>(first_row) for rows 0 .. num_rows in groups of n = kMaxRows, and one of the rest.
template <typename Body>
inline void for_row_groups(int64_t num_rows, const Body& body) {
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
    TilePrefetch* next;

    template <int Rows>
    void run(int64_t row) const {
        value_rows<Rows>(weights + row * kTile, values, num_tokens, acc + row * dim, dim, next);
    }
};

inline float to_float(int8_t x) { return static_cast<float>(x); }

// Copy rows to [num_tokens, dim] with zeros past head_dim.
template <typename C>
inline void gather_values(const C* const* rows, int num_tokens, int64_t head_dim, float* values) {
    const int64_t dim = padded_dim(head_dim);
    for (int t = 0; t < num_tokens; ++t) {
        int64_t d = 0;
        for (; d + kWidth <= head_dim; d += kWidth) Vec::load(rows[t] + d).store(values + t * dim + d);
        for (; d < head_dim; ++d) values[t * dim + d] = to_float(rows[t][d]);
        for (; d < dim; ++d) values[t * dim + d] = 0.0f;
    }
}

inline void scale_row(float* row, int64_t dim, float factor) {
    const Vec factors = Vec::set1(factor);
    for (int64_t d = 0; d < dim; d += kWidth) (Vec::load(row + d) * factors).store(row + d);
}

inline float exp2_of(float x) { return exp2(Vec::set1(x)).sum() / kWidth; }

// Online softmax (Milakov and Gimelshein, arXiv 1805.02867): turn a row's scores of tokens begin .. end into weights,
// 0 elsewhere, and rescale what the row has summed so far to the new maximum.
inline void weigh_row(float* scores, int begin, int end, float* max, float* sum, float* acc, int64_t dim) {
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

}  // namespace QUIRE_ISA
}  // namespace quire
