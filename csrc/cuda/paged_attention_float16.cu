// Paged attention over a float16 KV cache.
#include "paged_attention.cuh"

namespace quire {

template int launch_attention<__half>(const AttentionArguments&, int, int, int, cudaStream_t);

}  // namespace quire
