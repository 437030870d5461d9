// One row of logits as the tokens of a distribution, and the searches in it that a CTA does together.
//
// Probabilities are whole numbers, e^((logit - largest) / temperature) * 2^44: their sums are exact, so no result depends
// on the order in which threads add, and a row of 2^18 tokens cannot overflow. Tokens are ranked by logit, equal ones by
// id. Nothing is sorted: a search finds the logit at which a running sum over the ranked tokens passes a target, by
// histograms over ever finer digits of the logit, and then the token among the few that have this logit.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.cuh"

namespace quire {

constexpr int kSampleThreads = 256;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
constexpr int kBins = 2048;
constexpr int kBinsPerThread = kBins / kSampleThreads;
constexpr int kBinsPerNat = 64;      // of the first digit: bins of equal ratios, among which real logits spread evenly
constexpr float kOne = 17592186044416.0f;  // 2^44

using Mass = unsigned long long;

// Unsigned integers in the order of the floats; -0 is 0.
__device__ __forceinline__ uint32_t key_of(float logit) {
    uint32_t bits;
    if (logit == 0.0f) logit = 0.0f;
    memcpy(&bits, &logit, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

// The best ranked tokens: all above `key`, and of those that equal it the first `ties` by id. {0, 0} is all tokens.
struct Kept {
    uint32_t key;
    Mass ties;
};

// Where a running sum over ranked tokens passes a target: at the tokens of this key, before which it was `before`.
struct Crossing {
    uint32_t key;
    Mass before;
};

// A CTA's scratch in shared memory.
struct SampleScratch {
    Mass histogram[kBins];
    Mass warps[kSampleWarps];
    Mass before;
    uint32_t index;
};

__device__ __forceinline__ Mass warp_running_sum(Mass value) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const Mass other = __shfl_up_sync(kFullWarp, value, offset);
        if (lane >= offset) value += other;
    }
    return value;
}

// The sum over the CTA; `before` becomes the sum over the threads in front of this one.
__device__ __forceinline__ Mass cta_running_sum(Mass value, SampleScratch& scratch, Mass* before) {
    const Mass inclusive = warp_running_sum(value);
    if (threadIdx.x % kWarpSize == kWarpSize - 1) scratch.warps[threadIdx.x / kWarpSize] = inclusive;
    __syncthreads();
    Mass total = 0;
    *before = inclusive - value;
    for (int warp = 0; warp < kSampleWarps; ++warp) {
        if (warp < static_cast<int>(threadIdx.x) / kWarpSize) *before += scratch.warps[warp];
        total += scratch.warps[warp];
    }
    __syncthreads();
    return total;
}

template <typename T>
struct LogitsRow {
    const T* logits;
    int vocab_size;
    float largest;
    float sharpness;  // 1 / temperature
    float min_p;  // tokens less likely than this fraction of the likeliest weigh nothing

    __device__ __forceinline__ float logit(int token) const { return to_float(logits[token]); }

    __device__ __forceinline__ Mass mass(float logit) const {
        const float weight = expf((logit - largest) * sharpness);
        return weight >= min_p ? static_cast<Mass>(weight * kOne) : 0;
    }

    // The first digit of a logit: bins of equal width below the largest, the likeliest first, the last one open.
    __device__ __forceinline__ uint32_t bin(float logit) const {
        const float distance = (largest - logit) * sharpness * kBinsPerNat;
        return distance < kBins - 1 ? static_cast<uint32_t>(distance) : kBins - 1;
    }

    // The sum of `measure(logit)` over the CTA's row.
    template <typename Measure>
    __device__ __forceinline__ Mass sum(const Measure& measure, SampleScratch& scratch) const {
        Mass own = 0, before;
        for (int token = threadIdx.x; token < vocab_size; token += kSampleThreads) own += measure(logit(token));
        return cta_running_sum(own, scratch, &before);
    }

    // Where the running sum of `measure(logit)` over the kept tokens, best first, passes `target`. The whole sum does.
    template <typename Measure>
    __device__ __forceinline__ Crossing find(const Measure& measure, Mass target, const Kept& kept, SampleScratch& scratch) const {
        Crossing at{0, 0};
        uint32_t first_bin = 0, prefix = 0;
        // The bin, then 11, 11 and 10 bits of the key, each among the tokens that share all digits before it.
        for (int digit = 0; digit < 4; ++digit) {
            const int shift = digit == 0 ? 32 : digit == 1 ? 21 : digit == 2 ? 10 : 0;
            const int bits = digit == 3 ? 10 : 11;
            for (int i = threadIdx.x; i < kBins; i += kSampleThreads) scratch.histogram[i] = 0;
            __syncthreads();
            for (int token = threadIdx.x; token < vocab_size; token += kSampleThreads) {
                const float value = logit(token);
                const uint32_t key = key_of(value);
                if (key <= kept.key) continue;  // those that equal it come last, below
                const uint32_t own_bin = bin(value);
                if (digit > 0 && own_bin != first_bin) continue;
                if (digit > 1 && key >> (shift + bits) != prefix) continue;
                // Falling index, rising likelihood: the running sum goes from index 0 on.
                const uint32_t index = digit == 0 ? own_bin : kBins - 1 - (key >> shift & ((1u << bits) - 1));
                if (const Mass amount = measure(value)) atomicAdd(&scratch.histogram[index], amount);
            }
            __syncthreads();
            if (!cross(target, &at.before, scratch)) return {kept.key, at.before};
            const uint32_t index = scratch.index;
            if (digit == 0) {
                first_bin = index;
            } else {
                prefix = prefix << bits | (kBins - 1 - index);
            }
            __syncthreads();
        }
        at.key = prefix;
        return at;
    }

    // The first token by id at which the running sum of `measure(logit)` passes `target`. The whole sum does.
    template <typename Measure>
    __device__ __forceinline__ int find_by_id(const Measure& measure, Mass target, SampleScratch& scratch) const {
        // Each warp has a run of tokens.
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        const int run = (vocab_size + kSampleThreads - 1) / kSampleThreads * kWarpSize;
        const int begin = warp * run, end = min(begin + run, vocab_size);
        Mass own = 0, before;
        if (threadIdx.x == 0) scratch.index = 0;
        for (int token = begin + lane; token < end; token += kWarpSize) own += measure(logit(token));
        cta_running_sum(own, scratch, &before);
        Mass running = __shfl_sync(kFullWarp, before, 0);
        const Mass after = __shfl_sync(kFullWarp, before + own, kWarpSize - 1);
        if (running <= target && target < after) {
            for (int tile = begin; tile < end && running <= target; tile += kWarpSize) {
                const int token = tile + lane;
                const Mass amount = token < end ? measure(logit(token)) : 0;
                const Mass inclusive = running + warp_running_sum(amount);
                if (inclusive > target && inclusive - amount <= target) scratch.index = static_cast<uint32_t>(token);
                running = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
            }
        }
        __syncthreads();
        const int found = static_cast<int>(scratch.index);
        __syncthreads();
        return found;
    }

    // The likeliest token.
    __device__ __forceinline__ int find_largest(SampleScratch& scratch) const {
        // Key and inverted id in one number, whose maximum is the first token by rank.
        Mass best = 0;
        for (int token = threadIdx.x; token < vocab_size; token += kSampleThreads) {
            best = max(best, static_cast<Mass>(key_of(logit(token))) << 32 | ~static_cast<uint32_t>(token));
        }
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
            best = max(best, __shfl_xor_sync(kFullWarp, best, offset));
        }
        if (threadIdx.x % kWarpSize == 0) scratch.warps[threadIdx.x / kWarpSize] = best;
        __syncthreads();
        for (int warp = 0; warp < kSampleWarps; ++warp) best = max(best, scratch.warps[warp]);
        __syncthreads();
        return static_cast<int>(~static_cast<uint32_t>(best));
    }

private:
    // The histogram's index at which the running sum, `*before` at first, passes `target`, into `scratch.index`, and
    // what the sum was before it. False, and the whole sum, if it does not pass it.
    __device__ __forceinline__ static bool cross(Mass target, Mass* before, SampleScratch& scratch) {
        const int first = threadIdx.x * kBinsPerThread;
        Mass own = 0, in_front;
        for (int i = 0; i < kBinsPerThread; ++i) own += scratch.histogram[first + i];
        const Mass end = *before + cta_running_sum(own, scratch, &in_front);
        Mass running = *before + in_front;
        if (running <= target && target < running + own) {
            int i = first;
            while (running + scratch.histogram[i] <= target) running += scratch.histogram[i++];
            scratch.index = static_cast<uint32_t>(i);
            scratch.before = running;
        }
        __syncthreads();
        const bool passes = target < end;
        *before = passes ? scratch.before : end;
        return passes;
    }
};

}  // namespace quire
