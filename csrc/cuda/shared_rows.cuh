// Rows of a head's 16-bit elements in shared memory, laid out so that neither whole rows nor matrices of 8 rows meet in
// a bank.
//
// A row is cut into chunks of 16 bytes, and 8 rows of one chunk column are what load_matrices() reads at once: they must
// lie in 8 different groups of 4 banks, chunk places mod 8. Where a row has a multiple of 8 chunks (head_dim 64, 128, 256)
// the chunks of row r change places by XOR with r % 8; elsewhere (80, 96) rows are padded to an odd number of chunks:
//
//   head_dim 64    row 0   c0 c1 c2 c3 c4 c5 c6 c7        head_dim 80    row 0   c0 c1 c2 ... c8 c9  -
//                  row 1   c1 c0 c3 c2 c5 c4 c7 c6                       row 1   c0 c1 c2 ... c8 c9  -
//                  row 2   c2 c3 c0 c1 c6 c7 c4 c5                       row 2   c0 c1 c2 ... c8 c9  -
#pragma once

#include "async_copy.cuh"
#include "numeric.cuh"

namespace quire {

template <int kHeadDim>
struct SharedRows {
    static constexpr int kChunk = 8;  // elements
    static constexpr int kChunks = kHeadDim / kChunk;
    static constexpr bool kSwizzled = kChunks % 8 == 0;
    static constexpr int kRowBytes = 16 * (kSwizzled ? kChunks : kChunks | 1);

    static_assert(kHeadDim % 16 == 0, "the matrix units take 16 elements at a time");

    __device__ __forceinline__ static unsigned char* at(unsigned char* rows, int row, int chunk) {
        return rows + row * kRowBytes + 16 * (kSwizzled ? chunk ^ (row & 7) : chunk);
    }
    __device__ __forceinline__ static const unsigned char* at(const unsigned char* rows, int row, int chunk) {
        return rows + row * kRowBytes + 16 * (kSwizzled ? chunk ^ (row & 7) : chunk);
    }
};

// Asks for the 16 K rows and the 16 V rows of one KV head that start at `key` and `value`, for one block's tokens, with
// `kThreads` threads of which this is `thread`. Rows from `valid` on are not read, their slots may hold anything: they
// come as zeros, since a weight of 0 would not undo a NaN.
template <int kHeadDim, int kThreads, typename Element>
__device__ __forceinline__ void load_16_tokens(unsigned char* key_rows, unsigned char* value_rows, const Element* key,
                                               const Element* value, int64_t key_stride, int64_t value_stride,
                                               int valid, int thread) {
    using Rows = SharedRows<kHeadDim>;
    constexpr int kHalf = 16 * Rows::kChunks;  // chunks of K, then as many of V
#pragma unroll
    for (int i = 0; i < 2 * kHalf; i += kThreads) {
        const int index = i + thread;
        if (2 * kHalf % kThreads != 0 && index >= 2 * kHalf) break;
        const bool is_value = kHalf % kThreads == 0 ? i >= kHalf : index >= kHalf;
        const int within = index - (is_value ? kHalf : 0);
        const int row = within / Rows::kChunks, chunk = within % Rows::kChunks;
        const Element* source = (is_value ? value + row * value_stride : key + row * key_stride) + chunk * Rows::kChunk;
        copy_async_16(Rows::at(is_value ? value_rows : key_rows, row, chunk), source, row < valid);
    }
}

}  // namespace quire
