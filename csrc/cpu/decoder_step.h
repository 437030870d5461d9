#pragma once

#include "quire_decoder.h"

namespace quire {

// Compute a step whose arguments are sound. Returns a QuireStatus; may throw std::bad_alloc.
int run_step(QuireDecoder* decoder, const QuireStepParams& step);

}  // namespace quire
