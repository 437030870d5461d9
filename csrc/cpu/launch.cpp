// The launches of all operations but attention: check the arguments, then share out the rows.
#include <string.h>

#include "error.h"
#include "isa.h"
#include "kernels.h"
#include "thread_pool.h"

namespace quire {

namespace {

// Elements one item should have, so that waking a helper pays.
constexpr int64_t kItemElements = 16384;
constexpr int64_t kItemBytes = 65536;

// kernel(params, begin, end) over ranges of rows.
template <typename Params>
void for_rows(void (*kernel)(const Params&, int64_t, int64_t), const Params& p, int64_t num_rows, int64_t row_elements) {
    const int64_t rows_per_item = row_elements < kItemElements ? kItemElements / row_elements : 1;
    const int64_t num_items = (num_rows + rows_per_item - 1) / rows_per_item;
    parallel_for(p.num_threads, num_items, [&](int64_t item) {
        const int64_t begin = item * rows_per_item, end = begin + rows_per_item;
        kernel(p, begin, end < num_rows ? end : num_rows);
    });
}

int check_inplace_rows(const char* operation, const char* field, int64_t num_rows, int64_t stride, int64_t dim) {
    return num_rows > 1 ? check_range(operation, field, stride, dim, INT64_MAX) : QUIRE_OK;
}

int check_rotate(const QuireRotateAndCacheParams& p) {
    const char* op = "rotate_and_cache";
    QUIRE_CHECK(check_dtype(op, "dtype", p.dtype));
    QUIRE_CHECK(check_dtype(op, "cache_dtype", p.cache_dtype));
    QUIRE_CHECK(check_range(op, "num_tokens", p.num_tokens, 0, INT32_MAX));
    QUIRE_CHECK(check_range(op, "num_heads", p.num_heads, 1, INT32_MAX));
    QUIRE_CHECK(check_range(op, "num_kv_heads", p.num_kv_heads, 1, INT32_MAX));
    QUIRE_CHECK(check_range(op, "head_dim", p.head_dim, 2, 1 << 16));
    if (p.head_dim % 2 != 0) return fail(QUIRE_INVALID_ARGUMENT, "%s: head_dim=%d is odd", op, p.head_dim);
    if (p.num_tokens == 0) return QUIRE_OK;
    QUIRE_CHECK(check_cache(op, p.key_cache, p.value_cache, p.num_blocks, p.block_size));
    QUIRE_CHECK(check_range(op, "max_positions", p.max_positions, p.cos_sin == nullptr ? 0 : 1, INT32_MAX));
    const bool rotates = p.max_positions > 0;
    QUIRE_CHECK(check_not_null(op, "query", p.query));
    QUIRE_CHECK(check_not_null(op, "key", p.key));
    QUIRE_CHECK(check_not_null(op, "value", p.value));
    if (rotates) {
        QUIRE_CHECK(check_not_null(op, "cos_sin", p.cos_sin));
        QUIRE_CHECK(check_not_null(op, "positions", p.positions));
    }
    QUIRE_CHECK(check_not_null(op, "slot_mapping", p.slot_mapping));
    QUIRE_CHECK(check_inplace_rows(op, "query_token_stride", p.num_tokens, p.query_token_stride, p.head_dim));
    QUIRE_CHECK(check_inplace_rows(op, "query_head_stride", p.num_heads, p.query_head_stride, p.head_dim));
    QUIRE_CHECK(check_inplace_rows(op, "key_token_stride", p.num_tokens, p.key_token_stride, p.head_dim));
    QUIRE_CHECK(check_inplace_rows(op, "key_head_stride", p.num_kv_heads, p.key_head_stride, p.head_dim));
    QUIRE_CHECK(check_range(op, "value_token_stride", p.value_token_stride, 0, INT64_MAX));
    QUIRE_CHECK(check_range(op, "value_head_stride", p.value_head_stride, 0, INT64_MAX));
    const int64_t num_slots = int64_t{p.num_blocks} * p.block_size;
    for (int64_t i = 0; i < p.num_tokens; ++i) {
        if (rotates) QUIRE_CHECK(check_range(op, "position", p.positions[i], 0, p.max_positions - 1));
        QUIRE_CHECK(check_range(op, "slot", p.slot_mapping[i], -1, num_slots - 1));
    }
    return QUIRE_OK;
}

}  // namespace

}  // namespace quire

using namespace quire;

int32_t quire_abi_version(void) { return QUIRE_ABI_VERSION; }

const char* quire_backend_name(void) { return "cpu"; }

int quire_rms_norm(const QuireRmsNormParams* params) {
    const char* op = "rms_norm";
    QUIRE_CHECK(check_isa());
    QUIRE_CHECK(check_call(op, params));
    const QuireRmsNormParams& p = *params;
    QUIRE_CHECK(check_dtype(op, "dtype", p.dtype));
    QUIRE_CHECK(check_range(op, "num_rows", p.num_rows, 0, INT32_MAX));
    QUIRE_CHECK(check_range(op, "num_groups", p.num_groups, 1, INT32_MAX));
    QUIRE_CHECK(check_range(op, "dim", p.dim, 1, INT32_MAX));
    if (p.num_rows == 0) return QUIRE_OK;
    QUIRE_CHECK(check_not_null(op, "x", p.x));
    QUIRE_CHECK(check_not_null(op, "weight", p.weight));
    QUIRE_CHECK(check_not_null(op, "out", p.out));
    QUIRE_CHECK(check_range(op, "x_row_stride", p.x_row_stride, 0, INT64_MAX));
    QUIRE_CHECK(check_range(op, "x_group_stride", p.x_group_stride, 0, INT64_MAX));
    for_rows(active_kernels().rms_norm, p, int64_t{p.num_rows} * p.num_groups, p.dim);
    return QUIRE_OK;
}

int quire_add_rms_norm(const QuireAddRmsNormParams* params) {
    const char* op = "add_rms_norm";
    QUIRE_CHECK(check_isa());
    QUIRE_CHECK(check_call(op, params));
    const QuireAddRmsNormParams& p = *params;
    QUIRE_CHECK(check_dtype(op, "dtype", p.dtype));
    QUIRE_CHECK(check_range(op, "num_rows", p.num_rows, 0, INT32_MAX));
    QUIRE_CHECK(check_range(op, "dim", p.dim, 1, INT32_MAX));
    if (p.num_rows == 0) return QUIRE_OK;
    QUIRE_CHECK(check_not_null(op, "x", p.x));
    QUIRE_CHECK(check_not_null(op, "residual", p.residual));
    QUIRE_CHECK(check_not_null(op, "weight", p.weight));
    QUIRE_CHECK(check_not_null(op, "out", p.out));
    QUIRE_CHECK(check_range(op, "x_row_stride", p.x_row_stride, 0, INT64_MAX));
    QUIRE_CHECK(check_inplace_rows(op, "residual_row_stride", p.num_rows, p.residual_row_stride, p.dim));
    for_rows(active_kernels().add_rms_norm, p, p.num_rows, p.dim);
    return QUIRE_OK;
}

int quire_silu_and_mul(const QuireSiluAndMulParams* params) {
    const char* op = "silu_and_mul";
    QUIRE_CHECK(check_isa());
    QUIRE_CHECK(check_call(op, params));
    const QuireSiluAndMulParams& p = *params;
    QUIRE_CHECK(check_dtype(op, "dtype", p.dtype));
    QUIRE_CHECK(check_range(op, "num_rows", p.num_rows, 0, INT32_MAX));
    QUIRE_CHECK(check_range(op, "dim", p.dim, 1, INT32_MAX));
    if (p.num_rows == 0) return QUIRE_OK;
    QUIRE_CHECK(check_not_null(op, "gate_up", p.gate_up));
    QUIRE_CHECK(check_not_null(op, "out", p.out));
    QUIRE_CHECK(check_range(op, "gate_up_row_stride", p.gate_up_row_stride, 0, INT64_MAX));
    for_rows(active_kernels().silu_and_mul, p, p.num_rows, 2 * int64_t{p.dim});
    return QUIRE_OK;
}

int quire_rotate_and_cache(const QuireRotateAndCacheParams* params) {
    QUIRE_CHECK(check_isa());
    QUIRE_CHECK(check_call("rotate_and_cache", params));
    const QuireRotateAndCacheParams& p = *params;
    QUIRE_CHECK(check_rotate(p));
    for_rows(active_kernels().rotate_and_cache, p, p.num_tokens,
             (int64_t{p.num_heads} + 2 * int64_t{p.num_kv_heads}) * p.head_dim);
    return QUIRE_OK;
}

// Items are ranges of bytes within a block, and each does all pairs, so that the pairs' order holds for every byte.
int quire_copy_blocks(const QuireCopyBlocksParams* params) {
    const char* op = "copy_blocks";
    QUIRE_CHECK(check_call(op, params));
    const QuireCopyBlocksParams& p = *params;
    QUIRE_CHECK(check_range(op, "num_pairs", p.num_pairs, 0, INT32_MAX));
    QUIRE_CHECK(check_range(op, "block_bytes", p.block_bytes, 1, INT64_MAX));
    QUIRE_CHECK(check_range(op, "num_blocks", p.num_blocks, 0, INT32_MAX));
    if (p.num_pairs == 0) return QUIRE_OK;
    QUIRE_CHECK(check_not_null(op, "pool", p.pool));
    QUIRE_CHECK(check_not_null(op, "pairs", p.pairs));
    for (int64_t i = 0; i < 2 * int64_t{p.num_pairs}; ++i) {
        QUIRE_CHECK(check_range(op, i % 2 == 0 ? "source" : "destination", p.pairs[i], 0, int64_t{p.num_blocks} - 1));
    }
    const int64_t num_items = (p.block_bytes + kItemBytes - 1) / kItemBytes;
    parallel_for(p.num_threads, num_items, [&p](int64_t item) {
        const int64_t begin = item * kItemBytes, rest = p.block_bytes - begin;
        char* column = static_cast<char*>(p.pool) + begin;
        for (int64_t i = 0; i < p.num_pairs; ++i) {
            const int64_t source = p.pairs[2 * i], destination = p.pairs[2 * i + 1];
            if (source == destination) continue;
            memcpy(column + destination * p.block_bytes, column + source * p.block_bytes,
                   static_cast<size_t>(rest < kItemBytes ? rest : kItemBytes));
        }
    });
    return QUIRE_OK;
}
