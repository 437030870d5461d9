// A step's logits and what is drawn from them.
#pragma once

#include "step.h"

namespace quire {

// Floats of a row of logits: rank 0 has room for those of all ranks.
int64_t logits_stride(const Step& step);

// The logits of the rows in `normed`; on rank 0 those of all ranks. A status.
int compute_logits(const Step& step);

// Fill the samples from the logits. A status.
int draw(const Step& step);

}  // namespace quire
