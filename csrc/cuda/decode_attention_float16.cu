// Attention of single rows over a float16 KV cache.
#include "decode_attention.cuh"

namespace quire {

template int resident_decodes<__half>(int, int, int*);
template int launch_decodes<__half>(const DecodeArguments&, int, dim3, cudaStream_t);

}  // namespace quire
