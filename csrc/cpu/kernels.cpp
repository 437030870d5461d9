// The table of one instruction set.
#include "kernels.h"

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

#define QUIRE_STRING_OF(x) #x
#define QUIRE_STRING(x) QUIRE_STRING_OF(x)

const Kernels kernels = {
    QUIRE_STRING(QUIRE_ISA), rms_norm, add_rms_norm, silu_and_mul, rotate_and_cache, attend, merge, finish,
};

}  // namespace QUIRE_ISA
}  // namespace quire
