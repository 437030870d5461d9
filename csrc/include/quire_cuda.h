/* The C ABI of what only the CUDA library has: tokens drawn on the device, and blocks moved to the host and back.
 *
 * The conventions are those of quire.h.
 */
#ifndef QUIRE_CUDA_H
#define QUIRE_CUDA_H

#include "quire.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QUIRE_MAX_CANDIDATES 1024

/* One token to draw, as engine/decoding/sampler.py draws it: temperature, then top-k, top-p and min-p, each on what the
 * one before left; the number from 0 up to 1 is Philox4x32-10 of (seed, sample_index, position). */
typedef struct QuireDraw {
    uint64_t seed;
    uint64_t sample_index;
    uint64_t position;
    double top_p;             /* 1 keeps all */
    float sharpness;          /* 1 / temperature, at most 1e30; 0 takes the most likely token */
    float min_p;              /* 0 keeps all */
    int32_t top_k;            /* 0 keeps all */
    int32_t row;              /* of the logits */
    int32_t num_candidates;   /* most likely tokens to report, 0 to max_candidates */
    int32_t wants_normalizer; /* 0 or 1 */
} QuireDraw;

typedef struct QuireDrawn {
    uint64_t mass; /* sum of e^(logit - largest) * 2^44, if the normalizer is wanted; else 0 */
    int32_t token_id;
    float token_logit;
    float largest; /* logit of the row */
    int32_t reserved;
} QuireDrawn;

typedef struct QuireDrawnCandidate {
    float logit;
    int32_t token_id;
} QuireDrawnCandidate;

/* Draw a token for each of `draws`, several of which may share a row. The result does not depend on the other draws. */
typedef struct QuireSampleParams {
    uint32_t size;
    uint32_t abi_version;
    const void* logits;              /* [num_rows, vocab_size]; below infinity, one of each row above -infinity */
    const QuireDraw* draws;          /* [num_draws] */
    QuireDrawn* drawn;               /* [num_draws] */
    QuireDrawnCandidate* candidates; /* [num_draws, max_candidates], most likely first, equal ones by id; or NULL */
    void* stream;
    int64_t logits_row_stride;
    int32_t num_draws;
    int32_t vocab_size;
    int32_t max_candidates; /* 0 to vocab_size and QUIRE_MAX_CANDIDATES */
    int32_t dtype;          /* of the logits */
    int32_t num_threads;    /* 0 */
    int32_t reserved;       /* 0 */
} QuireSampleParams;

/* What is changed of one logit of a row before a token is drawn from it, as engine/decoding/penalties.py changes it. */
typedef struct QuireAdjustment {
    int32_t token_id; /* each once in a row */
    int32_t count;    /* of the token in the output so far: frequency and presence penalties, if above 0 */
    int32_t seen;     /* 0 or 1: in prompt or output, for the repetition penalty */
    float bias;       /* added last; -infinity bans the token */
} QuireAdjustment;

typedef struct QuireAdjustedRow {
    double frequency_penalty;
    double presence_penalty;
    float repetition_penalty; /* above 0 */
    int32_t first;            /* of the row's adjustments */
    int32_t num_adjustments;
    int32_t awaited; /* the draw whose token is the output's last, not yet in the adjustments; -1: they are complete */
} QuireAdjustedRow;

typedef struct QuireAdjustLogitsParams {
    uint32_t size;
    uint32_t abi_version;
    float* logits;                      /* [num_rows, vocab_size], changed in place */
    const QuireAdjustedRow* rows;       /* [num_rows] */
    const QuireAdjustment* adjustments; /* of all rows, one after another */
    const QuireDrawn* drawn;            /* of the step before, for awaited tokens; or NULL */
    void* stream;
    int32_t num_rows;
    int32_t vocab_size;
    int32_t num_threads; /* 0 */
    int32_t reserved;    /* 0 */
} QuireAdjustLogitsParams;

/* How blocks move between device and host. */
typedef enum QuireSwapMethod {
    QUIRE_SWAP_COPY_ENGINE = 0, /* one batched copy; takes no multiprocessor from what computes meanwhile */
    QUIRE_SWAP_KERNEL = 1       /* one kernel that reads and writes the host's memory: for blocks of few KiB */
} QuireSwapMethod;

/* Move whole blocks between the device's pool and the host's, all of them in one operation on `stream`. The pairs are
 * read before the call returns; no block is a destination twice, or both source and destination. */
typedef struct QuireSwapBlocksParams {
    uint32_t size;
    uint32_t abi_version;
    void* device_pool;    /* [num_device_blocks, block_bytes] */
    void* host_pool;      /* [num_host_blocks, block_bytes], pinned and mapped */
    const int64_t* pairs; /* host memory, [num_pairs, 2]: source, destination. The kernel reads them: pinned, and kept
                             until the operation is done */
    void* stream;
    int64_t block_bytes;
    int64_t num_device_blocks;
    int64_t num_host_blocks;
    int32_t num_pairs;
    int32_t to_host; /* 1: device to host; 0: host to device */
    int32_t method;  /* QuireSwapMethod */
    int32_t num_threads; /* 0 */
} QuireSwapBlocksParams;

QUIRE_API int quire_sample(const QuireSampleParams* params);
QUIRE_API int quire_adjust_logits(const QuireAdjustLogitsParams* params);
QUIRE_API int quire_swap_blocks(const QuireSwapBlocksParams* params);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_CUDA_H */
