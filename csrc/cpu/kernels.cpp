// The table of one instruction set.
#include "kernels.h"

#include "decoder_kernels.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

void rms_norm(const QuireRmsNormParams& p, int64_t begin, int64_t end);
void add_rms_norm(const QuireAddRmsNormParams& p, int64_t begin, int64_t end);
void silu_and_mul(const QuireSiluAndMulParams& p, int64_t begin, int64_t end);
void rotate_and_cache(const QuireRotateAndCacheParams& p, int64_t begin, int64_t end);
void attend(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, int segment, float* scratch,
            SoftmaxState state);
void merge(int64_t rows, int64_t head_dim, SoftmaxState into, SoftmaxState from);
void finish(const QuirePagedAttentionParams& p, const QueryTile& tile, int kv_head, SoftmaxState state);

void matmul_float(const QuireWeight& w, const float* x, int64_t x_stride, const MatmulRange& range, const MatmulOutput& y);
void matmul_quantized(const QuireWeight& w, const QuantizedRows& x, const MatmulRange& range, const MatmulOutput& y);
#if defined(QUIRE_AVX512_BF16)
void matmul_bfloat16(const QuireWeight& w, const RoundedRows& x, const MatmulRange& range, const MatmulOutput& y);
void decoder_round(const float* x, int64_t row, int64_t begin, int64_t end, const RoundedRows& out);
#else
constexpr decltype(DecoderKernels::matmul_bfloat16) matmul_bfloat16 = nullptr;
constexpr decltype(DecoderKernels::round) decoder_round = nullptr;
#endif
void decoder_quantize(const float* x, int64_t row, int64_t begin, int64_t end, const QuantizedRows& out);
void decoder_norm(const float* x, const NormArguments& norm, int64_t dim, float* out);
void decoder_add(float* x, const float* y, int64_t n);
void decoder_activate(float* gate, const float* up, int64_t n, int kind);
void decoder_rotate(float* head, const float* cos_sin, int64_t head_dim);
void store_kv(const LayerCache& cache, int64_t kv_head, int64_t slot, const float* key, const float* value);
void decoder_attend(const DecoderAttention& a, const QueryTile& tile, int kv_head, int segment, float* scratch,
                    SoftmaxState state);
void decoder_finish(const DecoderAttention& a, const QueryTile& tile, int kv_head, SoftmaxState state);
void decoder_sample(const float* logits, int64_t vocab_size, float* scratch, QuireSample* sample);

#define QUIRE_STRING_OF(x) #x
#define QUIRE_STRING(x) QUIRE_STRING_OF(x)

const Kernels kernels = {
    QUIRE_STRING(QUIRE_ISA), rms_norm, add_rms_norm, silu_and_mul, rotate_and_cache, attend, merge, finish,
};

const DecoderKernels decoder_kernels = {
    matmul_float,     matmul_quantized, matmul_bfloat16, decoder_quantize, decoder_round,
    decoder_norm,     decoder_add,      decoder_activate, decoder_rotate,  store_kv,
    decoder_attend,   merge,            decoder_finish,   decoder_sample,
};

}  // namespace QUIRE_ISA
}  // namespace quire
