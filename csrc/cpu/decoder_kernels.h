// What each instruction set provides to a decoder step: the inner part of every phase, over one work item.
//
// All activations are float32 between phases. A matrix's product is of quantised rows if its weights are codes, of rounded
// ones if they are bfloat16 and the set multiplies that.
#pragma once

#include <stdint.h>

#include "kernels.h"
#include "kv_layout.h"
#include "quantized_rows.h"
#include "quire_decoder.h"

namespace quire {

// Rows and panels of one item.
struct MatmulRange {
    int64_t first_row;
    int64_t end_row;
    int64_t first_panel;
    int64_t end_panel;
};

// Column 0 of `data` is the range's first; columns are written in panels of 16, so that the last may write past n.
struct MatmulOutput {
    float* data;
    int64_t stride;
    const float* bias;  // of the range's first column on, in full panels; or NULL
    bool add;           // to what is there, rather than overwrite it
};

// One layer's attention over packed blocks.
struct DecoderAttention {
    const float* query;  // [tokens, num_heads * head_dim], rotated
    float* out;          // likewise
    int64_t query_stride;
    int64_t out_stride;
    LayerCache cache;
    const int32_t* block_tables;
    int64_t block_table_stride;
    int32_t group;  // query heads of a KV head
    int32_t sliding_window;
    float scale;
};

struct NormArguments {
    const float* weight;
    const float* bias;  // NULL: RMSNorm
    float eps;
    bool layer_norm;
};

struct DecoderKernels {
    // Products of rows with panels of a weight; see MatmulOutput.
    void (*matmul_float)(const QuireWeight& w, const float* x, int64_t x_stride, const MatmulRange& range,
                         const MatmulOutput& y);
    void (*matmul_quantized)(const QuireWeight& w, const QuantizedRows& x, const MatmulRange& range,
                             const MatmulOutput& y);
    // Likewise of rounded rows with bfloat16 weights. NULL if the set has no instruction for it; matmul_float then widens
    // the weights.
    void (*matmul_bfloat16)(const QuireWeight& w, const RoundedRows& x, const MatmulRange& range, const MatmulOutput& y);
    // Columns begin .. end of a row of x into x's codes; begin is a multiple of 32, as is end unless it is x's.
    void (*quantize)(const float* x, int64_t row, int64_t begin, int64_t end, const QuantizedRows& out);
    // Likewise rounded to bfloat16. NULL as matmul_bfloat16.
    void (*round)(const float* x, int64_t row, int64_t begin, int64_t end, const RoundedRows& out);
    // out = norm(x); out may be x.
    void (*norm)(const float* x, const NormArguments& norm, int64_t dim, float* out);
    // x += y
    void (*add)(float* x, const float* y, int64_t n);
    // gate = activation(gate) * up, or activation(gate) if up is NULL; `kind` is a QuireActivation.
    void (*activate)(float* gate, const float* up, int64_t n, int kind);
    // Half-split rotation of one head.
    void (*rotate)(float* head, const float* cos_sin, int64_t head_dim);
    // One token's K and V of one head into their slot.
    void (*store_kv)(const LayerCache& cache, int64_t kv_head, int64_t slot, const float* key, const float* value);
    // As attend, merge and finish of Kernels.
    void (*attend)(const DecoderAttention& a, const QueryTile& tile, int kv_head, int segment, float* scratch,
                   SoftmaxState state);
    void (*merge)(int64_t rows, int64_t head_dim, SoftmaxState into, SoftmaxState from);
    void (*finish)(const DecoderAttention& a, const QueryTile& tile, int kv_head, SoftmaxState state);
    // What a sample asks of its logits; scratch is 3 * vocab_size floats.
    void (*sample)(const float* logits, int64_t vocab_size, float* scratch, QuireSample* sample);
};

namespace scalar {
extern const DecoderKernels decoder_kernels;
}
namespace avx2 {
extern const DecoderKernels decoder_kernels;
}
namespace avx512 {
extern const DecoderKernels decoder_kernels;
}
namespace avx512_bf16 {
extern const DecoderKernels decoder_kernels;
}

}  // namespace quire
