/* The C ABI of Quire's kernel libraries.
 *
 * libquire_cpu.so and libquire_cuda.so export the same symbols for the same operations; engine/kernels/backend.py has
 * their meaning and engine/kernels/reference.py their specification. Nothing here knows Python or torch.
 *
 * Conventions
 *   - Each call takes one parameter struct, whose first fields are its own size and QUIRE_ABI_VERSION; the caller fills
 *     it and keeps it. Fields are ordered so that no compiler pads them: pointers and int64 first, then 32-bit ones.
 *   - Strides are int64, in elements. The last dimension of every tensor is contiguous; so is a tensor without strides.
 *   - Lengths are int32. Zero rows are allowed and do nothing.
 *   - A function returns QUIRE_OK or another QuireStatus; quire_last_error() then says what was wrong, for this thread.
 *     An argument error is found before anything is written or launched.
 *   - CPU: pointers are host memory, `stream` must be NULL, the call returns when the work is done, and `num_threads`
 *     (>= 1) counts the calling thread. CUDA: pointers are device memory, the work is queued on `stream` (a
 *     cudaStream_t) of the current device, and `num_threads` must be 0. Values that lie in device memory (positions,
 *     slots, lengths, block ids) are checked on the CPU and trusted on CUDA.
 *   - All arithmetic is in float32; a result is rounded once, to nearest even, when it is stored.
 */
#ifndef QUIRE_H
#define QUIRE_H

#include <stdint.h>

#define QUIRE_ABI_VERSION 3

#if defined(__GNUC__)
#define QUIRE_API __attribute__((visibility("default")))
#else
#define QUIRE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum QuireStatus {
    QUIRE_OK = 0,
    QUIRE_INVALID_ARGUMENT = 1, /* a null, a shape, a stride, an index out of range, a wrong size or ABI version */
    QUIRE_UNSUPPORTED = 2,      /* sound, but this library has no kernel for it (a type, an instruction set) */
    QUIRE_DEVICE_ERROR = 3,     /* the CUDA runtime failed; the message has its words */
    QUIRE_OUT_OF_MEMORY = 4,
    QUIRE_COMMUNICATION_FAILED = 5 /* another rank is lost, late or out of step; the message names it */
} QuireStatus;

typedef enum QuireDType { QUIRE_FLOAT32 = 0, QUIRE_BFLOAT16 = 1, QUIRE_FLOAT16 = 2 } QuireDType;

/* One layer's K or V in the pool: [num_blocks, num_kv_heads, block_size, head_dim], head_dim contiguous. */
typedef struct QuireCacheView {
    void* data;
    int64_t block_stride;
    int64_t head_stride;
    int64_t slot_stride;
} QuireCacheView;

/* out = x / sqrt(mean(x^2) + eps) * weight over the last dimension.
 * x: [num_rows, num_groups, dim]; groups are the heads of a q or k norm, otherwise 1. out: the same shape, contiguous.
 */
typedef struct QuireRmsNormParams {
    uint32_t size;
    uint32_t abi_version;
    const void* x;
    const void* weight; /* [dim] */
    void* out;
    void* stream;
    int64_t x_row_stride;
    int64_t x_group_stride;
    int32_t num_rows;
    int32_t num_groups;
    int32_t dim;
    int32_t dtype; /* QuireDType of x, weight and out */
    float eps;
    int32_t num_threads;
} QuireRmsNormParams;

/* residual += x, rounded to its type; out = rms_norm(residual). x, residual: [num_rows, dim]; out: contiguous. */
typedef struct QuireAddRmsNormParams {
    uint32_t size;
    uint32_t abi_version;
    const void* x;
    void* residual;
    const void* weight; /* [dim] */
    void* out;
    void* stream;
    int64_t x_row_stride;
    int64_t residual_row_stride;
    int32_t num_rows;
    int32_t dim;
    int32_t dtype;
    float eps;
    int32_t num_threads;
    int32_t reserved; /* 0 */
} QuireAddRmsNormParams;

/* out = silu(gate) * up. gate_up: [num_rows, 2 * dim], gate first; out: [num_rows, dim], contiguous. */
typedef struct QuireSiluAndMulParams {
    uint32_t size;
    uint32_t abi_version;
    const void* gate_up;
    void* out;
    void* stream;
    int64_t gate_up_row_stride;
    int32_t num_rows;
    int32_t dim;
    int32_t dtype;
    int32_t num_threads;
} QuireSiluAndMulParams;

/* Rotate query and key in place (half-split), then write key and value to their slots, as stored and converted to the
 * cache's type. A slot is block * block_size + offset; -1 skips the write, not the rotation. Without a table (cos_sin is
 * NULL and max_positions 0) nothing is rotated: query, key and positions are not touched. */
typedef struct QuireRotateAndCacheParams {
    uint32_t size;
    uint32_t abi_version;
    void* query;       /* [num_tokens, num_heads, head_dim] */
    void* key;         /* [num_tokens, num_kv_heads, head_dim] */
    const void* value; /* as key */
    const float* cos_sin;        /* [max_positions, head_dim]: head_dim / 2 cosines, then the sines; or NULL */
    const int64_t* positions;    /* [num_tokens], 0 <= position < max_positions */
    const int64_t* slot_mapping; /* [num_tokens] */
    void* stream;
    QuireCacheView key_cache;
    QuireCacheView value_cache;
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t key_token_stride;
    int64_t key_head_stride;
    int64_t value_token_stride;
    int64_t value_head_stride;
    int32_t num_tokens;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim; /* even */
    int32_t num_blocks;
    int32_t block_size; /* a power of two from 1 to 256 */
    int32_t max_positions; /* 0 rotates nothing */
    int32_t dtype;       /* of query, key, value */
    int32_t cache_dtype; /* of both caches */
    int32_t num_threads;
} QuireRotateAndCacheParams;

/* Causal attention of each row over its sequence's cached tokens, its own included.
 *
 * Sequence i owns rows query_start_loc[i] .. query_start_loc[i + 1]; they are its last tokens. Rows of no sequence
 * (past query_start_loc[num_seqs]) come out zero. Query head h reads KV head h / (num_heads / num_kv_heads).
 * Slots at or past seq_lens[i], and table entries past the last block, are never used: they may hold anything.
 *
 * CUDA: what is launched follows from the struct alone, never from what lies in device memory, so that a captured graph
 * computes on whatever lengths are there at a replay, within max_query_len, max_seq_len and num_tokens. Long sequences
 * are cut up for several CTAs: with split_tokens 0 where it suits the batch, so that the last bits of a row may depend
 * on it; otherwise at multiples of split_tokens (itself a multiple of 64), and a row's result is bitwise the same alone,
 * in any batch and in any chunk.
 */
typedef struct QuirePagedAttentionParams {
    uint32_t size;
    uint32_t abi_version;
    const void* query;              /* [num_tokens, num_heads, head_dim] */
    void* out;                      /* as query, contiguous */
    const int32_t* query_start_loc; /* [num_seqs + 1], from 0, never falling */
    const int32_t* seq_lens;        /* [num_seqs] */
    const int32_t* block_tables;    /* [num_seqs, max_blocks] */
    void* workspace;                /* scratch of workspace_bytes, 16-byte aligned; NULL if none is needed */
    void* stream;
    QuireCacheView key_cache;
    QuireCacheView value_cache;
    int64_t query_token_stride;
    int64_t query_head_stride;
    int64_t block_table_stride; /* elements from one sequence's table to the next */
    int64_t workspace_bytes;
    int32_t num_tokens;
    int32_t num_seqs;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim; /* even */
    int32_t num_blocks;
    int32_t block_size; /* a power of two from 1 to 256 */
    int32_t max_blocks;
    int32_t max_query_len; /* at least the longest run of rows of one sequence */
    int32_t max_seq_len;   /* at least the largest of seq_lens */
    int32_t sliding_window; /* a row sees this many last tokens, its own included; 0 is all */
    float scale;
    int32_t dtype;       /* of query and out */
    int32_t cache_dtype; /* of both caches */
    int32_t num_threads;
    int32_t split_tokens; /* CUDA: see above; CPU: 0 */
} QuirePagedAttentionParams;

/* Copy whole blocks within the pool, in order: a block written by one pair is what a later pair reads. */
typedef struct QuireCopyBlocksParams {
    uint32_t size;
    uint32_t abi_version;
    void* pool;           /* [num_blocks, block_bytes] */
    const int64_t* pairs; /* [num_pairs, 2]: source, destination */
    void* stream;
    int64_t block_bytes;
    int32_t num_blocks;
    int32_t num_pairs;
    int32_t num_threads;
    int32_t reserved; /* 0 */
} QuireCopyBlocksParams;

QUIRE_API int32_t quire_abi_version(void);
QUIRE_API const char* quire_backend_name(void); /* "cpu" or "cuda" */

/* What was wrong with this thread's last call that failed; "" before the first. Valid until its next failure. */
QUIRE_API const char* quire_last_error(void);

QUIRE_API int quire_rms_norm(const QuireRmsNormParams* params);
QUIRE_API int quire_add_rms_norm(const QuireAddRmsNormParams* params);
QUIRE_API int quire_silu_and_mul(const QuireSiluAndMulParams* params);
QUIRE_API int quire_rotate_and_cache(const QuireRotateAndCacheParams* params);
QUIRE_API int quire_paged_attention(const QuirePagedAttentionParams* params);
QUIRE_API int quire_copy_blocks(const QuireCopyBlocksParams* params);

/* Scratch that quire_paged_attention needs for this struct, whose pointers are not followed; the CPU needs none. Its
 * contents do not matter, and calls on one stream can share it. */
QUIRE_API int quire_paged_attention_workspace(const QuirePagedAttentionParams* params, int64_t* bytes);

/* CPU library only. The instruction set in use: "scalar", "avx2" or "avx512". It is the best that the machine has,
 * unless the environment variable QUIRE_CPU_ISA named another when the library was loaded, or quire_cpu_set_isa did
 * since (process-wide; not while a kernel runs). Setting one that the machine lacks returns QUIRE_UNSUPPORTED. */
QUIRE_API const char* quire_cpu_isa(void);
QUIRE_API int quire_cpu_set_isa(const char* name);

/* CPU library only: what the machine can do at most, whatever instruction set is in use. The memory's read bandwidth over
 * `bytes` (take several times the last-level cache), and the rate of a dot product's multiplications and additions from
 * registers: float32 FMA, VDPBF16PS, and VPDPBUSD or, without it, VPMADDUBSW with VPMADDWD. QUIRE_UNSUPPORTED where
 * there is no such instruction. Each takes the fastest of several tries, a tenth of a second or so. */
typedef enum QuireRateKind { QUIRE_RATE_FLOAT32 = 0, QUIRE_RATE_BFLOAT16 = 1, QUIRE_RATE_INT8 = 2 } QuireRateKind;

QUIRE_API int quire_cpu_measure_bandwidth(int64_t bytes, int32_t num_threads, double* bytes_per_s);
QUIRE_API int quire_cpu_measure_rate(int32_t kind, int32_t num_threads, double* operations_per_s);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_H */
