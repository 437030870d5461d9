// Which instruction set the kernels run on.
#pragma once

#include "decoder_kernels.h"
#include "kernels.h"

namespace quire {

// The kernels in use: the best that the machine has, unless QUIRE_CPU_ISA or quire_cpu_set_isa said otherwise.
const Kernels& active_kernels();
const DecoderKernels& active_decoder_kernels();

// QUIRE_OK, or why QUIRE_CPU_ISA could not be obeyed. Launches check it first.
int check_isa();

}  // namespace quire
