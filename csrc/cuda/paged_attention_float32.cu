// Paged attention over a float32 KV cache.
#include "paged_attention.cuh"

namespace quire {

template int launch_attention<float>(const AttentionArguments&, int, int, int, cudaStream_t);

}  // namespace quire
