// Attention of single rows over a bfloat16 KV cache.
#include "decode_attention.cuh"

namespace quire {

template int resident_decodes<__nv_bfloat16>(int, int, int*);
template int launch_decodes<__nv_bfloat16>(const DecodeArguments&, int, dim3, cudaStream_t);

}  // namespace quire
