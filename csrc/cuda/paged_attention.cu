// Checks paged attention's arguments and chooses the kernels: tensor cores where they take the call, CUDA cores elsewhere.
#include "matrix_attention.h"
#include "paged_attention.cuh"

namespace quire {

extern template int launch_attention<__nv_bfloat16>(const AttentionArguments&, int, int, int, cudaStream_t);
extern template int launch_attention<__half>(const AttentionArguments&, int, int, int, cudaStream_t);
extern template int launch_attention<float>(const AttentionArguments&, int, int, int, cudaStream_t);

namespace {

constexpr const char* kName = "paged_attention";

// The kernels read the cache in runs of 16 bytes.
int check_view(const QuireCacheView& view, const char* field, int dtype) {
    QUIRE_REQUIRE(view.data != nullptr, "%s: %s is null", kName, field);
    const int64_t bytes = dtype_bytes(dtype);
    if (!is_aligned(view.data, 16) || view.block_stride * bytes % 16 != 0 || view.head_stride * bytes % 16 != 0 ||
        view.slot_stride * bytes % 16 != 0) {
        return fail(QUIRE_UNSUPPORTED,
                    "%s: %s must start, and stride over blocks (%lld), heads (%lld) and slots (%lld), at multiples of 16 "
                    "bytes",
                    kName, field, static_cast<long long>(view.block_stride), static_cast<long long>(view.head_stride),
                    static_cast<long long>(view.slot_stride));
    }
    return QUIRE_OK;
}

int check_shapes(const QuirePagedAttentionParams& p) {
    QUIRE_REQUIRE_DTYPE(kName, "dtype", p.dtype);
    QUIRE_REQUIRE_DTYPE(kName, "cache_dtype", p.cache_dtype);
    QUIRE_REQUIRE(p.num_tokens >= 0 && p.num_seqs >= 0, "%s: num_tokens=%d and num_seqs=%d must not be negative", kName,
                  p.num_tokens, p.num_seqs);
    QUIRE_REQUIRE(p.num_heads >= 1 && p.num_kv_heads >= 1 && p.num_heads % p.num_kv_heads == 0,
                  "%s: num_heads=%d must be a positive multiple of num_kv_heads=%d", kName, p.num_heads,
                  p.num_kv_heads);
    QUIRE_REQUIRE(p.num_kv_heads <= 65535, "%s: num_kv_heads=%d exceeds 65535", kName, p.num_kv_heads);
    QUIRE_REQUIRE(p.head_dim >= 2 && p.head_dim % 2 == 0, "%s: head_dim=%d must be even and positive", kName,
                  p.head_dim);
    QUIRE_REQUIRE(is_power_of_two(p.block_size) && p.block_size <= 256,
                  "%s: block_size=%d must be a power of two from 1 to 256", kName, p.block_size);
    QUIRE_REQUIRE(p.num_blocks >= 1 && p.max_blocks >= 0, "%s: num_blocks=%d and max_blocks=%d must be at least 1 and 0",
                  kName, p.num_blocks, p.max_blocks);
    QUIRE_REQUIRE(p.sliding_window >= 0, "%s: sliding_window=%d must not be negative", kName, p.sliding_window);
    QUIRE_REQUIRE(p.max_query_len >= 0 && p.max_seq_len >= 0,
                  "%s: max_query_len=%d and max_seq_len=%d must not be negative", kName, p.max_query_len, p.max_seq_len);
    QUIRE_REQUIRE(static_cast<int64_t>(p.max_blocks) * p.block_size >= p.max_seq_len,
                  "%s: max_seq_len=%d does not fit in max_blocks=%d blocks of %d", kName, p.max_seq_len, p.max_blocks,
                  p.block_size);
    QUIRE_REQUIRE(p.split_tokens >= 0 && p.split_tokens % kSplitGrain == 0,
                  "%s: split_tokens=%d must be 0 or a positive multiple of %d", kName, p.split_tokens, kSplitGrain);
    return QUIRE_OK;
}

int check_pointers(const QuirePagedAttentionParams& p) {
    QUIRE_REQUIRE(p.query != nullptr && p.out != nullptr && p.query_start_loc != nullptr,
                  "%s: query, out or query_start_loc is null", kName);
    QUIRE_REQUIRE(p.num_seqs == 0 || (p.seq_lens != nullptr && p.block_tables != nullptr),
                  "%s: seq_lens or block_tables is null", kName);
    if (int status = check_view(p.key_cache, "key_cache", p.cache_dtype)) return status;
    return check_view(p.value_cache, "value_cache", p.cache_dtype);
}

AttentionArguments arguments_of(const QuirePagedAttentionParams& p) {
    constexpr float kLog2E = 1.4426950408889634f;
    AttentionArguments args;
    args.query = p.query;
    args.out = p.out;
    args.query_start_loc = p.query_start_loc;
    args.seq_lens = p.seq_lens;
    args.block_tables = p.block_tables;
    args.key_cache = p.key_cache;
    args.value_cache = p.value_cache;
    args.query_token_stride = p.query_token_stride;
    args.query_head_stride = p.query_head_stride;
    args.block_table_stride = p.block_table_stride;
    args.num_tokens = p.num_tokens;
    args.num_seqs = p.num_seqs;
    args.num_heads = p.num_heads;
    args.group = p.num_heads / p.num_kv_heads;
    args.block_shift = __builtin_ctz(static_cast<unsigned>(p.block_size));
    args.sliding_window = p.sliding_window;
    args.dtype = p.dtype;
    args.scale_log2 = p.scale * kLog2E;
    return args;
}

}  // namespace
}  // namespace quire

int quire_paged_attention(const QuirePagedAttentionParams* params) {
    using namespace quire;
    if (int status = check_params(params, kName)) return status;
    const QuirePagedAttentionParams& p = *params;
    if (int status = check_shapes(p)) return status;
    if (p.num_tokens == 0) return QUIRE_OK;
    if (int status = check_pointers(p)) return status;
    const AttentionArguments args = arguments_of(p);
    if (matrix_attention_takes(p)) return launch_matrix_attention(p, args);
    const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);
    return with_dtype(p.cache_dtype, [&](auto zero) {
        return launch_attention<decltype(zero)>(args, p.num_kv_heads, p.head_dim, p.max_query_len, stream);
    });
}

int quire_paged_attention_workspace(const QuirePagedAttentionParams* params, int64_t* bytes) {
    using namespace quire;
    if (int status = check_params(params, "paged_attention_workspace")) return status;
    QUIRE_REQUIRE(bytes != nullptr, "paged_attention_workspace: bytes is null");
    if (int status = check_shapes(*params)) return status;
    *bytes = 0;
    const bool takes = params->num_tokens > 0 && matrix_attention_takes(*params);
    return takes ? matrix_attention_workspace(*params, arguments_of(*params), bytes) : QUIRE_OK;
}
