// How paged attention is shared out over CTAs. Plain arithmetic, for host, device and tests.
//
// A CUDA graph replays a grid of a fixed size over sequences of other lengths, so what depends on lengths is worked out
// by each CTA from what lies in device memory, and what the host plans depends on shapes and upper bounds only.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define QUIRE_HOST_DEVICE __host__ __device__
#else
#define QUIRE_HOST_DEVICE
#endif

namespace quire {

// Decodes. The tokens of all sequences of one KV head stand in one line, counted in runs of tokens, and the line is cut
// into equal shares, one a CTA: however unequal the sequences, the CTAs read equally much.
//
//   sequence   0         1   2                 3
//   runs       |---------|---|-----------------|-----|
//   shares     |-----0----|-----1----|-----2----|--3-|     (equal, but for one run)
//
// A sequence that lies in several shares has a partial result in each of them. All CTAs but the first of a sequence
// keep it in their first place, the first one, which goes on from another sequence or starts with this one, in its
// second.
struct Shares {
    int64_t runs;
    int64_t count;

    QUIRE_HOST_DEVICE int64_t begin(int64_t share) const { return share < count ? runs * share / count : runs; }
    QUIRE_HOST_DEVICE int64_t of_run(int64_t run) const { return ((run + 1) * count - 1) / runs; }
};

// Shares of fewer runs than this cost more to merge than they save.
constexpr int64_t kMinRunsOfShare = 2;

QUIRE_HOST_DEVICE inline Shares cut_shares(int64_t runs, int64_t max_shares) {
    const int64_t wanted = runs / kMinRunsOfShare;
    return {runs, wanted < 1 ? 1 : wanted < max_shares ? wanted : max_shares};
}

// Shares of each KV head, when `ctas` CTAs fit on the device at once and work on `num_heads` KV heads.
inline int64_t max_shares_of_head(int64_t ctas, int64_t num_heads) { return ctas < num_heads ? 1 : ctas / num_heads; }

// Prompts. Each tile of query vectors is one CTA's, unless the sequences are cut at multiples of `tokens`; then `count`
// CTAs share the tile, and a row that sees tokens of several splits is merged from their partial results.
struct Splits {
    int32_t tokens;
    int32_t count;
};

constexpr int32_t kSplitGrain = 64;       // splits are multiples of a tile of keys
constexpr int32_t kMinSplitTokens = 512;  // shorter ones cost more to merge than they save

// `busy_ctas` is what the batch keeps busy without splits, `ctas` what fits on the device at once. With `fixed_tokens`
// the splits do not depend on the batch.
inline Splits plan_splits(int64_t busy_ctas, int64_t ctas, int32_t max_seq_len, int32_t fixed_tokens) {
    const int64_t length = max_seq_len > 1 ? max_seq_len : 1;
    int64_t tokens = fixed_tokens;
    if (tokens == 0) {
        const int64_t useful = length / kMinSplitTokens, free = ctas / (busy_ctas > 1 ? busy_ctas : 1);
        const int64_t wanted = useful < free ? useful : free;
        tokens = wanted > 1 ? (length + wanted - 1) / wanted : length;
        tokens = (tokens + kSplitGrain - 1) / kSplitGrain * kSplitGrain;
        if (tokens > INT32_MAX) tokens = INT32_MAX / kSplitGrain * kSplitGrain;
    }
    return {static_cast<int32_t>(tokens), static_cast<int32_t>((length + tokens - 1) / tokens)};
}

}  // namespace quire
