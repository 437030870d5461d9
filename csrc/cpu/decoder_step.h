#pragma once

#include "quire_decoder.h"

namespace quire {

// Compute a step whose arguments are sound. False if there was no memory; throws std::bad_alloc likewise.
bool run_step(QuireDecoder* decoder, const QuireStepParams& step);

}  // namespace quire
