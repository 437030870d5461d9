// Attention of prompts over a bfloat16 KV cache.
#include "prefill_attention.cuh"

namespace quire {

template TileKernel<PrefillArguments> prefill_kernel<__nv_bfloat16>(int, int);

}  // namespace quire
