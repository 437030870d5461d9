// The step in hand: whose it is, what was asked, and how rows are shared out over the threads. step_products.h has its
// matrix products, step_attention.h its attention, step_head.h its logits, decoder_step.cpp the order of all of it.
#pragma once

#include <time.h>

#include "decoder.h"
#include "error.h"
#include "thread_pool.h"

namespace quire {

constexpr int64_t kInlineElements = 8192;  // smaller phases are not worth waking a helper

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int out_of_memory() { return fail(QUIRE_OUT_OF_MEMORY, "decoder_step: no memory for activations"); }

// Books a step's time by phase, if `times` is not NULL.
class PhaseClock {
public:
    explicit PhaseClock(QuireStepTimes* times) : times_(times), began_(now()), mark_(began_) {}

    // The time since the last call was this phase's.
    void spent(int64_t QuireStepTimes::*phase) {
        if (times_ == nullptr) return;
        const int64_t time = now();
        times_->*phase += time - mark_;
        mark_ = time;
    }
    void end() {
        if (times_ != nullptr) times_->total += now() - began_;
    }

private:
    static int64_t now() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
    }

    QuireStepTimes* const times_;
    const int64_t began_;
    int64_t mark_;
};

struct Step {
    QuireDecoder& decoder;
    const QuireDecoderParams& model;
    const QuireStepParams& asked;
    const DecoderKernels& kernels;
    PhaseClock& clock;

    int64_t rows() const { return asked.num_tokens; }
    int64_t hidden() const { return model.hidden_size; }
    int64_t residual_stride() const { return padded_to_panel(hidden()); }
    float* residual(int64_t row) const { return decoder.residual.data() + row * residual_stride(); }

    // body(row) for each row, each of about `width` elements.
    template <typename Body>
    void for_rows(int64_t count, int64_t width, const Body& body) const {
        if (count * width < kInlineElements) {
            for (int64_t row = 0; row < count; ++row) body(row);
            return;
        }
        const int64_t block = width < kInlineElements / 4 ? kInlineElements / 4 / width : 1;
        parallel_for(asked.num_threads, (count + block - 1) / block, [&](int64_t item) {
            for (int64_t row = item * block; row < (item + 1) * block && row < count; ++row) body(row);
        });
    }
};

}  // namespace quire
