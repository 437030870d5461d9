// Tokens drawn on the device, as engine/decoding/sampler.py draws them: one CTA for each draw, no word from the host.
#include "host.h"
#include "logits_row.cuh"
#include "philox.cuh"
#include "quire_cuda.h"

namespace quire {
namespace {

struct One {
    __device__ __forceinline__ Mass operator()(float) const { return 1; }
};

template <typename T>
struct Weight {
    LogitsRow<T> row;
    __device__ __forceinline__ Mass operator()(float logit) const { return row.mass(logit); }
};

// Tokens of one logit.
struct Equal {
    uint32_t key;
    __device__ __forceinline__ Mass operator()(float logit) const { return key_of(logit) == key; }
};

// How often `part` is in `whole`, fewer than 2^18 times. The hardware's own division of 64 bits is a subroutine.
__device__ __forceinline__ Mass quotient(Mass whole, Mass part) {
    Mass result = 0;
    for (Mass bit = 1 << 17; bit > 0; bit /= 2) {
        if ((result + bit) * part <= whole) result += bit;
    }
    return result;
}

// What of a row the kept tokens weigh.
template <typename T>
__device__ __forceinline__ Mass kept_mass(const LogitsRow<T>& row, const Kept& kept, SampleScratch& scratch) {
    const uint32_t key = kept.key;
    const auto above = [&row, key](float logit) { return key_of(logit) > key ? row.mass(logit) : Mass{0}; };
    const Mass total = row.sum(above, scratch);
    return kept.ties == 0 ? total : total + kept.ties * row.mass(logit_of(key));
}

// The tokens that top-k and top-p leave, best first, and one of them drawn.
template <typename T>
__device__ __forceinline__ int draw_from_best(LogitsRow<T> row, const QuireDraw& draw, Mass bits, SampleScratch& scratch) {
    const float min_p = row.min_p;
    row.min_p = 0.0f;
    Kept kept{0, 0};
    if (draw.top_k > 0 && draw.top_k < row.vocab_size) {
        const Crossing at = row.find(One{}, draw.top_k - 1, kept, scratch);
        kept = {at.key, draw.top_k - at.before};
    }
    if (draw.top_p < 1.0) {
        // A token is kept while the mass before it is below top_p of what top-k left.
        const Mass total = kept_mass(row, kept, scratch);
        const Mass limit = static_cast<Mass>(ceil(draw.top_p * static_cast<double>(total)));
        const Mass last = min(max(limit, Mass{1}), total) - 1;
        const Crossing at = row.find(Weight<T>{row}, last, kept, scratch);
        kept = {at.key, quotient(last - at.before, row.mass(logit_of(at.key))) + 1};
    }
    row.min_p = min_p;
    const Mass target = __umul64hi(bits << 11, kept_mass(row, kept, scratch));
    const Crossing at = row.find(Weight<T>{row}, target, kept, scratch);
    const Mass tie = quotient(target - at.before, row.mass(logit_of(at.key)));
    return row.find_by_id(Equal{at.key}, tie, scratch);
}

// A token of the whole vocabulary, by id.
template <typename T>
__device__ __forceinline__ int draw_from_all(const LogitsRow<T>& row, Mass bits, SampleScratch& scratch) {
    const Weight<T> weight{row};
    const Mass target = __umul64hi(bits << 11, row.sum(weight, scratch));
    return row.find_by_id(weight, target, scratch);
}

// Sorts `size` entries, a power of two, largest first.
__device__ __forceinline__ void sort_down(Mass* entries, int size) {
    for (int run = 2; run <= size; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            for (int i = threadIdx.x; i < size; i += kSampleThreads) {
                const int other = i ^ distance;
                if (other > i && (entries[i] < entries[other]) == ((i & run) == 0)) {
                    const Mass moved = entries[i];
                    entries[i] = entries[other];
                    entries[other] = moved;
                }
            }
            __syncthreads();
        }
    }
}

// The `count` best tokens in order.
template <typename T>
__device__ __forceinline__ void list_best(const LogitsRow<T>& row, int count, QuireDrawnCandidate* out, SampleScratch& scratch) {
    __shared__ Mass entries[QUIRE_MAX_CANDIDATES];
    __shared__ unsigned num_entries;
    const Crossing at = row.find(One{}, count - 1, Kept{0, 0}, scratch);
    const int last_tie = row.find_by_id(Equal{at.key}, count - 1 - at.before, scratch);
    int size = 1;
    while (size < count) size *= 2;
    for (int i = threadIdx.x; i < size; i += kSampleThreads) entries[i] = 0;
    if (threadIdx.x == 0) num_entries = 0;
    __syncthreads();
    for (int token = threadIdx.x; token < row.vocab_size; token += kSampleThreads) {
        const uint32_t key = key_of(row.logit(token));
        if (key > at.key || (key == at.key && token <= last_tie)) {
            // Whatever order they come in: as one number each they sort by rank, equal logits by id.
            entries[atomicAdd(&num_entries, 1u)] = static_cast<Mass>(key) << 32 | ~static_cast<uint32_t>(token);
        }
    }
    __syncthreads();
    sort_down(entries, size);
    for (int i = threadIdx.x; i < count; i += kSampleThreads) {
        out[i].logit = logit_of(static_cast<uint32_t>(entries[i] >> 32));
        out[i].token_id = static_cast<int32_t>(~static_cast<uint32_t>(entries[i]));
    }
    __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 2)
    sample_kernel(const T* __restrict__ logits, int64_t row_stride, int vocab_size,
                  const QuireDraw* __restrict__ draws, QuireDrawn* drawn, QuireDrawnCandidate* candidates,
                  int max_candidates) {
    __shared__ SampleScratch scratch;
    const QuireDraw draw = draws[blockIdx.x];
    LogitsRow<T> row{logits + draw.row * row_stride, vocab_size, 0.0f, 1.0f, 0.0f};
    const int largest = row.find_largest(scratch);
    row.largest = row.logit(largest);
    const Mass mass = draw.wants_normalizer ? row.sum(Weight<T>{row}, scratch) : 0;
    if (draw.num_candidates > 0) {
        list_best(row, draw.num_candidates, candidates + static_cast<int64_t>(blockIdx.x) * max_candidates, scratch);
    }
    int token = largest;
    if (draw.sharpness > 0.0f) {
        row.sharpness = draw.sharpness;
        row.min_p = draw.min_p;
        const Mass bits = philox_bits(draw.seed, draw.sample_index, draw.position);
        const bool limited = draw.top_p < 1.0 || (draw.top_k > 0 && draw.top_k < vocab_size);
        token = limited ? draw_from_best(row, draw, bits, scratch) : draw_from_all(row, bits, scratch);
    }
    if (threadIdx.x == 0) drawn[blockIdx.x] = {mass, token, row.logit(token), row.largest, 0};
}

}  // namespace
}  // namespace quire

int quire_sample(const QuireSampleParams* params) {
    using namespace quire;
    if (int status = check_params(params, "sample")) return status;
    const QuireSampleParams& p = *params;
    QUIRE_REQUIRE_DTYPE("sample", "dtype", p.dtype);
    QUIRE_REQUIRE(p.num_draws >= 0, "sample: num_draws=%d must not be negative", p.num_draws);
    // A row's whole mass fits its 64 bits.
    QUIRE_REQUIRE(p.vocab_size >= 1 && p.vocab_size <= 1 << 18, "sample: vocab_size=%d must be from 1 to %d",
                  p.vocab_size, 1 << 18);
    QUIRE_REQUIRE(p.max_candidates >= 0 && p.max_candidates <= QUIRE_MAX_CANDIDATES && p.max_candidates <= p.vocab_size,
                  "sample: max_candidates=%d must be from 0 to %d and at most vocab_size=%d", p.max_candidates,
                  QUIRE_MAX_CANDIDATES, p.vocab_size);
    QUIRE_REQUIRE(p.logits_row_stride >= p.vocab_size, "sample: logits_row_stride=%lld is below vocab_size=%d",
                  static_cast<long long>(p.logits_row_stride), p.vocab_size);
    QUIRE_REQUIRE(p.reserved == 0, "sample: reserved=%d must be 0", p.reserved);
    if (p.num_draws == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.logits != nullptr && p.draws != nullptr && p.drawn != nullptr,
                  "sample: logits, draws or drawn is null");
    QUIRE_REQUIRE(p.candidates != nullptr || p.max_candidates == 0, "sample: candidates is null");
    return with_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        sample_kernel<T><<<static_cast<unsigned>(p.num_draws), kSampleThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
            static_cast<const T*>(p.logits), p.logits_row_stride, p.vocab_size, p.draws, p.drawn, p.candidates,
            p.max_candidates);
        return check_launch("sample");
    });
}
