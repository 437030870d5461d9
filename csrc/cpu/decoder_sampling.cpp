// Tokens drawn from a row of logits, and the most likely ones.
#include "decoder_kernels.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

constexpr int kWidth = Vec::kWidth;

inline bool less_likely(QuireCandidate a, QuireCandidate b) { return a.logit < b.logit || (a.logit == b.logit && a.token_id > b.token_id); }

void sift_down(QuireCandidate* heap, int count, int at) {
    for (;;) {
        int least = at;
        for (int child = 2 * at + 1; child <= 2 * at + 2 && child < count; ++child) {
            if (less_likely(heap[child], heap[least])) least = child;
        }
        if (least == at) return;
        const QuireCandidate moved = heap[at];
        heap[at] = heap[least];
        heap[least] = moved;
        at = least;
    }
}

// The count most likely, most likely first, equal ones by id: a heap of the ones kept, the least of them on top.
void most_likely(const float* logits, int64_t vocab_size, QuireCandidate* heap, int count) {
    for (int i = 0; i < count; ++i) heap[i] = {logits[i], i};
    for (int i = count / 2 - 1; i >= 0; --i) sift_down(heap, count, i);
    for (int64_t i = count; i < vocab_size;) {
        // Most vectors hold nothing that could enter.
        if (i + kWidth <= vocab_size && Vec::load(logits + i).largest() <= heap[0].logit) {
            i += kWidth;
            continue;
        }
        const int64_t end = i + kWidth < vocab_size ? i + kWidth : vocab_size;
        for (; i < end; ++i) {
            if (logits[i] > heap[0].logit) {
                heap[0] = {logits[i], static_cast<int32_t>(i)};
                sift_down(heap, count, 0);
            }
        }
    }
    for (int left = count - 1; left > 0; --left) {
        const QuireCandidate least = heap[0];
        heap[0] = heap[left];
        heap[left] = least;
        sift_down(heap, left, 0);
    }
}

float largest_of(const float* logits, int64_t n) {
    int64_t i = 0;
    float largest = logits[0];
    if (n >= kWidth) {
        Vec lanes = Vec::load(logits);
        for (i = kWidth; i + kWidth <= n; i += kWidth) lanes = quire::QUIRE_ISA::max(lanes, Vec::load(logits + i));
        largest = lanes.largest();
    }
    for (; i < n; ++i) largest = logits[i] > largest ? logits[i] : largest;
    return largest;
}

// out = e^((logit - largest) * factor); returns the sum, in blocks so that the small ones count.
double exponentials(const float* logits, int64_t n, float largest, float factor, float* out) {
    double total = 0.0;
    for (int64_t begin = 0; begin < n; begin += 1024) {
        const int64_t end = begin + 1024 < n ? begin + 1024 : n;
        Vec sum = Vec::set1(0.0f);
        for (int64_t i = begin; i < end; i += kWidth) {
            const bool whole = end - i >= kWidth;
            const Vec x = whole ? Vec::load(logits + i) : load_partial(logits + i, end - i);
            Vec value = exp((x - Vec::set1(largest)) * Vec::set1(factor));
            if (!whole) {
                float lanes[kWidth];
                value.store(lanes);
                value = load_partial(lanes, end - i);  // lanes past the end are zero
            }
            sum = sum + value;
            if (out != nullptr) whole ? value.store(out + i) : store_partial(value, out + i, end - i);
        }
        total += static_cast<double>(sum.sum());
    }
    return total;
}

// The first index at which the running sum of the weights not below `least` exceeds `target`; the last such if none does.
int64_t pick(const float* weights, int64_t n, float least, double target) {
    double running = 0.0;
    int64_t last = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (weights[i] < least) continue;
        running += static_cast<double>(weights[i]);
        last = i;
        if (running > target) break;
    }
    return last;
}

double sum_of_at_least(const float* weights, int64_t n, float least) {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        if (weights[i] >= least) total += static_cast<double>(weights[i]);
    }
    return total;
}

int32_t draw_from_all(const float* logits, int64_t vocab_size, const QuireSample& sample, float* weights) {
    const float largest = largest_of(logits, vocab_size);
    double total = exponentials(logits, vocab_size, largest, 1.0f / sample.temperature, weights);
    if (sample.min_p > 0.0f) total = sum_of_at_least(weights, vocab_size, sample.min_p);
    return static_cast<int32_t>(pick(weights, vocab_size, sample.min_p, sample.draw * total));
}

// How many of the most likely tokens top_p keeps, or -1 if it needs more than `count` of `most`.
int64_t kept_by_top_p(const float* weights, int64_t count, int64_t most, double limit) {
    double before = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        if (i > 0 && before >= limit) return i;  // kept while the mass before a token is below the limit
        before += static_cast<double>(weights[i]);
    }
    return before >= limit || count == most ? count : -1;
}

int32_t draw_from_most_likely(const float* logits, int64_t vocab_size, const QuireSample& sample, float* scratch) {
    const int64_t most = sample.top_k > 0 && sample.top_k < vocab_size ? sample.top_k : vocab_size;
    const float factor = 1.0f / sample.temperature;
    float* const weights = scratch;
    QuireCandidate* const tokens = reinterpret_cast<QuireCandidate*>(scratch + vocab_size);
    // Few tokens nearly always hold the mass that top_p wants.
    const bool all = most == vocab_size;  // then top_p counts the mass of the whole vocabulary
    for (int64_t count = all && most > 256 ? 256 : most;; count = count * 16 < most ? count * 16 : most) {
        most_likely(logits, vocab_size, tokens, static_cast<int>(count));
        for (int64_t i = 0; i < count; ++i) weights[i] = tokens[i].logit;
        const double held = exponentials(weights, count, tokens[0].logit, factor, weights);
        int64_t kept = count;
        if (sample.top_p < 1.0f) {
            const double total = all ? exponentials(logits, vocab_size, tokens[0].logit, factor, nullptr) : held;
            kept = kept_by_top_p(weights, count, most, static_cast<double>(sample.top_p) * total);
            if (kept < 0) continue;
        }
        const double total = sum_of_at_least(weights, kept, sample.min_p);
        return tokens[pick(weights, kept, sample.min_p, sample.draw * total)].token_id;
    }
}

int32_t most_likely_token(const float* logits, int64_t vocab_size) {
    QuireCandidate best;
    most_likely(logits, vocab_size, &best, 1);
    return best.token_id;
}

}  // namespace

void decoder_sample(const float* logits, int64_t vocab_size, float* scratch, QuireSample* sample) {
    if (sample->logits != nullptr) memcpy(sample->logits, logits, sizeof(float) * static_cast<size_t>(vocab_size));
    if (sample->num_candidates > 0) most_likely(logits, vocab_size, sample->candidates, sample->num_candidates);
    if (sample->wants_normalizer) {
        const float largest = largest_of(logits, vocab_size);
        const double total = exponentials(logits, vocab_size, largest, 1.0f, nullptr);
        sample->log_normalizer = static_cast<double>(largest) + __builtin_log(total);
    }
    const bool limited = sample->top_p < 1.0f || (sample->top_k > 0 && sample->top_k < vocab_size);
    if (sample->temperature == 0.0f) {
        sample->token_id = sample->num_candidates > 0 ? sample->candidates[0].token_id
                                                      : most_likely_token(logits, vocab_size);
    } else if (limited) {
        sample->token_id = draw_from_most_likely(logits, vocab_size, *sample, scratch);
    } else {
        sample->token_id = draw_from_all(logits, vocab_size, *sample, scratch);
    }
    sample->token_logit = logits[sample->token_id];
}

}  // namespace QUIRE_ISA
}  // namespace quire
