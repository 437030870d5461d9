// Attention of prompts over a bfloat16 KV cache.
#include "prefill_attention.cuh"

namespace quire {

template int resident_prefills<__nv_bfloat16>(int, int, int*);
template int launch_prefills<__nv_bfloat16>(const PrefillArguments&, int, dim3, cudaStream_t);

}  // namespace quire
