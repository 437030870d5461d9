// silu(gate) * up, where a row is its gates followed by its ups.
#include "kernels.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

Vec silu(Vec x) { return x / (Vec::set1(1.0f) + exp(Vec::set1(0.0f) - x)); }

template <typename T>
void silu_and_mul_rows(const QuireSiluAndMulParams& p, int64_t begin, int64_t end) {
    const int64_t dim = p.dim;
    for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride;
        const T* up = gate + dim;
        T* out = static_cast<T*>(p.out) + row * dim;
        int64_t i = 0;
        for (; i + Vec::kWidth <= dim; i += Vec::kWidth) {
            (silu(Vec::load(gate + i)) * Vec::load(up + i)).store(out + i);
        }
        if (i < dim) {
            const int64_t rest = dim - i;
            store_partial(silu(load_partial(gate + i, rest)) * load_partial(up + i, rest), out + i, rest);
        }
    }
}

}  // namespace

void silu_and_mul(const QuireSiluAndMulParams& p, int64_t begin, int64_t end) {
    if (p.dtype == QUIRE_FLOAT32) {
        silu_and_mul_rows<float>(p, begin, end);
    } else {
        silu_and_mul_rows<BFloat16>(p, begin, end);
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
