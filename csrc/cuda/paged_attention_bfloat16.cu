// Paged attention over a bfloat16 KV cache.
#include "paged_attention.cuh"

namespace quire {

template int launch_attention<__nv_bfloat16>(const AttentionArguments&, int, int, int, cudaStream_t);

}  // namespace quire
