// Attention of single rows over a float16 KV cache.
#include "decode_attention.cuh"

namespace quire {

template TileKernel<DecodeArguments> decode_kernel<__half>(int, int);

}  // namespace quire
