/* A whole decoder step in one call: CPU library only.
 *
 * A model is a table of packed weights and options; nothing here knows architectures. The caller packs weights into
 * memory of its own (a mapped file that processes share), describes the decoder once, and then makes one call a step over
 * the scheduler's arrays. The conventions of quire.h hold: structs carry size and ABI version, strides are in elements,
 * an argument error is found before anything is written.
 */
#ifndef QUIRE_DECODER_H
#define QUIRE_DECODER_H

#include "quire.h"
#include "quire_communicator.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How values are stored before packing: the GGUF types of those names. */
typedef enum QuireSourceType {
    QUIRE_SOURCE_F32 = 0,
    QUIRE_SOURCE_F16 = 1,
    QUIRE_SOURCE_Q4_0 = 2,
    QUIRE_SOURCE_Q4_1 = 3,
    QUIRE_SOURCE_Q5_0 = 6,
    QUIRE_SOURCE_Q5_1 = 7,
    QUIRE_SOURCE_Q8_0 = 8,
    QUIRE_SOURCE_Q4_K = 12,
    QUIRE_SOURCE_Q5_K = 13,
    QUIRE_SOURCE_Q6_K = 14,
    QUIRE_SOURCE_BF16 = 30
} QuireSourceType;

/* How values are stored once packed: the number of bits of a code; with a minimum a scale, or symmetric; values a scale
 * 32, or 16 where the name says so. csrc/cpu/packed.h draws the layout. */
typedef enum QuireWeightType {
    QUIRE_WEIGHT_FLOAT32 = 0,
    QUIRE_WEIGHT_BFLOAT16 = 1,
    QUIRE_WEIGHT_U4 = 2,
    QUIRE_WEIGHT_U4_MIN = 3,
    QUIRE_WEIGHT_U5 = 4,
    QUIRE_WEIGHT_U5_MIN = 5,
    QUIRE_WEIGHT_U6_16 = 6,
    QUIRE_WEIGHT_U8 = 7
} QuireWeightType;

/* Pack a matrix [num_rows, num_columns] from a source [source_rows, source_columns] stored row after row. Packed row i is
 * source row `row_order[i]`; its columns are the source's from `first_column` on, both ends at borders of 32 if the
 * source is quantised.
 * From a quantised source to its own packed type the codes are kept as they are: Q4_0 is U4, Q4_1 and Q4_K U4_MIN, Q5_0
 * U5, Q5_1 and Q5_K U5_MIN, Q6_K U6_16, Q8_0 U8. From any source to FLOAT32, BFLOAT16 or U8 the values are converted. */
typedef struct QuirePackParams {
    uint32_t size;
    uint32_t abi_version;
    const void* source;
    const int32_t* row_order; /* [num_rows], or NULL: the first num_rows as they are */
    void* packed;             /* quire_packed_bytes() of it, 64-byte aligned */
    int64_t source_bytes;
    int64_t packed_bytes;
    int32_t source_type; /* QuireSourceType */
    int32_t weight_type; /* QuireWeightType */
    int32_t num_rows;
    int32_t num_columns;
    int32_t source_rows;
    int32_t source_columns;
    int32_t first_column;
    int32_t transposed; /* the source is [source_columns, source_rows]; F32, F16 and BF16 only */
    int32_t num_threads;
    int32_t reserved; /* 0 */
} QuirePackParams;

QUIRE_API int quire_packed_bytes(int32_t weight_type, int32_t num_rows, int32_t num_columns, int64_t* bytes);
QUIRE_API int quire_pack(const QuirePackParams* params);

/* y = x W^T + bias; W [n, k], packed. data NULL: the decoder has no such weight. */
typedef struct QuireWeight {
    const void* data;
    const float* bias; /* [n], or NULL */
    int32_t type;      /* QuireWeightType */
    int32_t n;
    int32_t k;
    int32_t reserved; /* 0 */
} QuireWeight;

/* weight[dim], and for a LayerNorm bias[dim]. weight NULL: no such norm. */
typedef struct QuireNorm {
    const float* weight;
    const float* bias;
} QuireNorm;

typedef struct QuireDecoderLayer {
    QuireWeight query;
    QuireWeight key;
    QuireWeight value;
    QuireWeight attention_out;
    QuireWeight gate; /* none: a plain MLP */
    QuireWeight up;
    QuireWeight down;
    QuireNorm attention_norm; /* before attention, or after the sum (post_norm) */
    QuireNorm query_norm;     /* [head_dim], over each head */
    QuireNorm key_norm;
    QuireNorm attention_out_norm; /* of what attention adds to the stream */
    QuireNorm mlp_norm;
    QuireNorm mlp_out_norm;
    const float* cos_sin; /* [max_positions, head_dim]: cosines, then sines; NULL: no rotation */
    int32_t sliding_window; /* 0 is all */
    int32_t reserved;       /* 0 */
} QuireDecoderLayer;

typedef enum QuireActivation {
    QUIRE_ACTIVATION_SILU = 0,
    QUIRE_ACTIVATION_RELU = 1,
    QUIRE_ACTIVATION_GELU = 2,     /* by erf */
    QUIRE_ACTIVATION_GELU_TANH = 3 /* its tanh approximation */
} QuireActivation;

typedef enum QuireKVType { QUIRE_KV_FLOAT32 = 0, QUIRE_KV_BFLOAT16 = 1, QUIRE_KV_INT8 = 2 } QuireKVType;

/* With a communicator this is one rank's part of a model: num_heads, num_kv_heads and intermediate_size are its own,
 * attention_out and down are summed over the ranks (and so have a bias on one of them only), and embedding and head hold
 * the rows vocab_starts[rank] up to vocab_starts[rank + 1] of the vocabulary. */
typedef struct QuireDecoderParams {
    uint32_t size;
    uint32_t abi_version;
    const QuireDecoderLayer* layers;
    QuireCommunicator* communicator; /* or NULL */
    const int32_t* vocab_starts;     /* [world_size + 1], from 0 to vocab_size; NULL without a communicator */
    QuireWeight embedding;           /* [vocab_size, embedding_dim], or this rank's rows */
    QuireWeight head;                /* likewise; the embedding itself if tied */
    QuireWeight project_in;  /* [hidden_size, embedding_dim], or none */
    QuireWeight project_out; /* [embedding_dim, hidden_size], or none */
    const float* positions;  /* [max_positions, hidden_size] added to the embedding, or NULL */
    QuireNorm final_norm;
    void* kv_pool; /* [num_blocks, block_bytes]; see quire_kv_block_bytes() */
    int32_t num_layers;
    int32_t vocab_size;
    int32_t embedding_dim;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t max_positions; /* of tables; positions are below it */
    int32_t activation;    /* QuireActivation */
    int32_t layer_norm;    /* LayerNorm rather than RMSNorm, but for query_norm and key_norm */
    int32_t post_norm;     /* attention_norm and mlp_norm norm the sums after attention and MLP */
    int32_t kv_type;       /* QuireKVType */
    int32_t num_blocks;
    int32_t block_size; /* a power of two from 1 to 256 */
    float norm_eps;
    float embedding_scale;
    float attention_scale;
} QuireDecoderParams;

typedef struct QuireCandidate {
    float logit;
    int32_t token_id;
} QuireCandidate;

/* One token to draw from a row's logits, and what else the row is to give. Several samples may share a row.
 *
 * temperature 0 takes the arg-max. Otherwise logits are divided by it, and top_k, top_p and min_p are applied in this
 * order, each to what the one before left: the smallest set of most likely tokens whose mass reaches top_p; tokens with
 * at least min_p times the largest probability. `draw` then picks by the cumulative distribution: over token ids if
 * neither top_k nor top_p limits, else over tokens from the most likely down. */
typedef struct QuireSample {
    float* logits;              /* out: [vocab_size], or NULL */
    QuireCandidate* candidates; /* out: [num_candidates], most likely first, equal ones by id */
    double draw;                /* from 0 up to 1 */
    double log_normalizer;      /* out: log of the sum of e^logit, if wanted */
    int32_t row;                /* index into logits_rows */
    int32_t num_candidates;     /* 0 to vocab_size */
    int32_t wants_normalizer;   /* 0 or 1 */
    int32_t top_k;              /* 0 is all */
    float temperature;
    float top_p;
    float min_p;
    int32_t token_id;  /* out */
    float token_logit; /* out */
    int32_t reserved;  /* 0 */
} QuireSample;

/* Nanoseconds that steps spent, added up by the library; the caller zeroes them. */
typedef struct QuireStepTimes {
    int64_t matrices;
    int64_t head;
    int64_t attention;
    int64_t communication; /* collectives, the wait for other ranks included */
    int64_t other;
    int64_t total;
} QuireStepTimes;

/* What an adapter (LoRA, arXiv 2106.09685) adds to matrices that read one input: y_i += (x A_i^T) B_i^T, its scale being in
 * B. `a` is [the ranks' sum, k], the A of each matrix in the order of `b`; b[i] is [n, its rank]. data NULL: nothing is
 * added, and the rank is 0. All are FLOAT32 or all BFLOAT16, without a bias. */
typedef struct QuireAdapterGroup {
    QuireWeight a;
    QuireWeight b[3];
} QuireAdapterGroup;

typedef struct QuireAdapterLayer {
    QuireAdapterGroup attention_in; /* query, key, value */
    QuireAdapterGroup attention_out;
    QuireAdapterGroup mlp_in; /* gate, up */
    QuireAdapterGroup down;
} QuireAdapterLayer;

typedef struct QuireAdapterParams {
    uint32_t size;
    uint32_t abi_version;
    const QuireAdapterLayer* layers; /* [num_layers], or NULL: the slot is empty from now on */
    int32_t num_layers;
    int32_t slot; /* 0 to 4095 */
} QuireAdapterParams;

typedef struct QuireStepParams {
    uint32_t size;
    uint32_t abi_version;
    const int32_t* token_ids;       /* [num_tokens], sequence after sequence */
    const int32_t* query_start_loc; /* [num_seqs + 1], as in quire_paged_attention */
    const int32_t* seq_lens;        /* [num_seqs], tokens cached once this step's are written */
    const int32_t* block_tables;    /* [num_seqs, max_blocks] */
    const int32_t* logits_rows;     /* [num_logits_rows], the rows of the batch whose logits are needed */
    const int32_t* adapter_slots;   /* [num_seqs], -1 for the model as it is; NULL: all are */
    QuireSample* samples;           /* [num_samples] */
    QuireStepTimes* times;          /* or NULL */
    int64_t block_table_stride;
    int32_t num_tokens;
    int32_t num_seqs;
    int32_t max_blocks;
    int32_t num_logits_rows;
    int32_t num_samples;
    int32_t num_threads;
} QuireStepParams;

typedef struct QuireDecoder QuireDecoder;

/* Bytes of one block of all layers: a layer has, for each KV head, its K, then its V (csrc/cpu/kv_layout.h). */
QUIRE_API int quire_kv_block_bytes(int32_t kv_type, int32_t num_layers, int32_t num_kv_heads, int32_t head_dim,
                                   int32_t block_size, int64_t* bytes);

/* The decoder keeps the pointers; the table of layers itself is copied. */
QUIRE_API int quire_decoder_create(const QuireDecoderParams* params, QuireDecoder** decoder);
QUIRE_API void quire_decoder_destroy(QuireDecoder* decoder);

/* Put an adapter into a slot, or empty it. The decoder keeps the pointers of the weights; the table itself is copied. */
QUIRE_API int quire_decoder_set_adapter(QuireDecoder* decoder, const QuireAdapterParams* params);

/* Compute the rows of a step: write their K and V, and fill the samples. One call at a time for a decoder. A sequence's
 * results do not depend on the batch, on how its prompt was cut into chunks, or on num_threads; nor on others' adapters,
 * but sequences of one adapter cost less if they stand side by side.
 * With a communicator all ranks make the call with the same rows and logits_rows; only rank 0 may have samples. */
QUIRE_API int quire_decoder_step(QuireDecoder* decoder, const QuireStepParams* params);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_DECODER_H */
