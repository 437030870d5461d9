// Attention of prompts over a float16 KV cache.
#include "prefill_attention.cuh"

namespace quire {

template TileKernel<PrefillArguments> prefill_kernel<__half>(int, int);

}  // namespace quire
