// Attention of single rows over a bfloat16 KV cache.
#include "decode_attention.cuh"

namespace quire {

template TileKernel<DecodeArguments> decode_kernel<__nv_bfloat16>(int, int);

}  // namespace quire
