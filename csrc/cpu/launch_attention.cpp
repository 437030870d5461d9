// The launch of paged attention: check, then share out.
#include <string.h>

#include <new>

#include "attention_plan.h"
#include "error.h"
#include "isa.h"
#include "kernels.h"

namespace quire {

namespace {

constexpr const char* kOp = "paged_attention";

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
    QUIRE_CHECK(check_range(kOp, "split_tokens", p.split_tokens, 0, 0));  // no result depends on the batch anyway
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

void zero_rows_of_no_sequence(const QuirePagedAttentionParams& p) {
    const int64_t row_bytes = int64_t{p.num_heads} * p.head_dim * (p.dtype == QUIRE_FLOAT32 ? 4 : 2);
    const int64_t used = p.num_seqs > 0 ? p.query_start_loc[p.num_seqs] : 0;
    memset(static_cast<char*>(p.out) + used * row_bytes, 0, static_cast<size_t>((p.num_tokens - used) * row_bytes));
}

// The item's kernels on the caller's arrays.
class Work {
public:
    explicit Work(const QuirePagedAttentionParams& p) : p_(p), kernels_(active_kernels()) {}

    AttentionShape shape() const {
        return {p_.num_heads / p_.num_kv_heads, p_.num_kv_heads, p_.head_dim, p_.num_threads};
    }
    int window() const { return p_.sliding_window; }
    int64_t scratch_floats(int64_t rows) const { return attend_scratch_floats(rows, p_.head_dim); }

    void attend(const QueryTile& tile, int kv_head, int segment, float* scratch, SoftmaxState state) const {
        kernels_.attend(p_, tile, kv_head, segment, scratch, state);
    }
    void merge(int64_t rows, SoftmaxState into, SoftmaxState from) const {
        kernels_.merge(rows, p_.head_dim, into, from);
    }
    void finish(const QueryTile& tile, int kv_head, SoftmaxState state) const {
        kernels_.finish(p_, tile, kv_head, state);
    }

private:
    const QuirePagedAttentionParams& p_;
    const Kernels& kernels_;
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
        cut_tiles({p.query_start_loc, p.seq_lens, p.num_seqs}, p.num_heads / p.num_kv_heads, &tiles);
        const Work work(p);
        return run_attention(work, tiles) ? int{QUIRE_OK} : fail(QUIRE_OUT_OF_MEMORY, "%s: no memory for scratch", kOp);
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
