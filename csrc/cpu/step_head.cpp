#include "step_head.h"

#include <string.h>

#include <atomic>

#include "step_products.h"

namespace quire {

namespace {

// A stretch of another rank's logits, its rows being in full panels, into the whole rows.
void place_logits(const Step& step, int rank, int64_t offset, int64_t count, const float* values) {
    const VocabRange vocab = vocab_of(step.model, rank);
    const int64_t width = padded_to_panel(vocab.size()), end = least(offset + count, step.asked.num_logits_rows * width);
    for (int64_t at = offset; at < end;) {
        const int64_t row = at / width, column = at % width, next = least((row + 1) * width, end);
        const int64_t size = least(next - at, vocab.size() - column);
        if (size > 0) {
            memcpy(step.decoder.logits.data() + row * logits_stride(step) + vocab.begin + column, values + (at - offset),
                   sizeof(float) * static_cast<size_t>(size));
        }
        at = next;
    }
}

// Rank 0's rows filled up with what the others have computed. Its own are in place; the last panel of them reaches into
// what comes now.
int gather_logits(const Step& step) {
    QuireCommunicator* const communicator = step.model.communicator;
    if (communicator == nullptr) return QUIRE_OK;
    step.clock.spent(&QuireStepTimes::head);
    int64_t widest = 0;
    for (int rank = 1; rank < communicator->world_size(); ++rank) {
        const int64_t width = padded_to_panel(vocab_of(step.model, rank).size());
        widest = width > widest ? width : widest;
    }
    const int64_t rows = step.asked.num_logits_rows;
    QUIRE_CHECK(communicator->gather(
        step.decoder.logits.data(), rows * logits_stride(step), rows * widest,
        [](void* context, int rank, int64_t offset, int64_t count, const float* values) {
            place_logits(*static_cast<const Step*>(context), rank, offset, count, values);
        },
        const_cast<Step*>(&step)));
    step.clock.spent(&QuireStepTimes::communication);
    return QUIRE_OK;
}

}  // namespace

int64_t logits_stride(const Step& step) {
    const QuireDecoderParams& p = step.model;
    const bool whole = p.communicator == nullptr || p.communicator->rank() == 0;
    if (!whole) return padded_to_panel(own_vocab(p).size());
    // An odd number of panels: rows some power of two apart would fall into the same few lines of a cache.
    return (num_panels(p.vocab_size) | 1) * kPanel;
}

int compute_logits(const Step& step) {
    const QuireDecoderParams& p = step.model;
    const QuireDecoder& d = step.decoder;
    const int64_t count = step.asked.num_logits_rows;
    const Activations* x = &d.normed;
    if (p.project_out.data != nullptr) {
        prepare(step, d.normed, count, step.hidden(), {&p.project_out});
        multiply(step, {{&p.project_out, d.embedded.row(0), d.embedded.width, false}}, d.normed, count);
        x = &d.embedded;
    }
    prepare(step, *x, count, p.embedding_dim, {&p.head});
    multiply(step, {{&p.head, d.logits.data(), logits_stride(step), false}}, *x, count);
    return gather_logits(step);
}

int draw(const Step& step) {
    const int64_t vocab_size = step.model.vocab_size, stride = logits_stride(step);
    std::atomic<bool> no_memory{false};
    parallel_for(step.asked.num_threads, step.asked.num_samples, [&](int64_t i) {
        QuireSample& sample = step.asked.samples[i];
        float* const scratch = thread_scratch(0, 3 * vocab_size);
        if (scratch == nullptr) return no_memory.store(true);
        step.kernels.sample(step.decoder.logits.data() + sample.row * stride, vocab_size, scratch, &sample);
    });
    return no_memory.load() ? out_of_memory() : int{QUIRE_OK};
}

}  // namespace quire
