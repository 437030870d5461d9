// Attention of prompts over a float16 KV cache.
#include "prefill_attention.cuh"

namespace quire {

template int resident_prefills<__half>(int, int, int*);
template int launch_prefills<__half>(const PrefillArguments&, int, dim3, cudaStream_t);

}  // namespace quire
