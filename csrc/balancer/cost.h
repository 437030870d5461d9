// What a request would cost on a replica, in seconds: cost_s of app/balancer/cost.py, operation for operation, so that
// both make the same choice.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>

#include "quire_balancer.h"

namespace quire {

inline double wait_s(const QuireFleetView& view, uint32_t slot, double now) {
    return std::max(view.free_at[slot] - now, 0.0);
}

// Whether the request is for an adapter that is neither there nor on its way.
inline bool lacks_adapter(const QuirePlaceParams& request, uint32_t slot) {
    if (request.adapter_holders == nullptr) return false;
    const int64_t byte = slot >> 3;
    return byte >= request.adapter_bytes || !(request.adapter_holders[byte] >> (slot & 7) & 1);
}

inline double adapter_s(const QuireFleetView& view, const QuirePlaceParams& request, uint32_t slot) {
    if (!lacks_adapter(request, slot)) return 0.0;
    const double wait_s = view.num_free_adapter_slots[slot] != 0
                              ? 0.0
                              : static_cast<double>(request.output_tokens) * view.decode_step_s[slot];
    return view.adapter_load_s[slot] + wait_s;
}

inline double cost_s(const QuireFleetView& view, const QuirePlaceParams& request, uint32_t slot, int64_t num_cached) {
    const double rate = view.prefill_rates[slot];
    const int64_t uncached = std::max<int64_t>(request.prompt_tokens - num_cached * request.block_size, 1);
    const double prefill_s = static_cast<double>(uncached) / rate;
    const double silence_s = request.now - view.heard_at[slot];
    double cost = wait_s(view, slot, request.now) + (silence_s > request.silent_after_s ? silence_s : 0.0) +
                  prefill_s * (1.0 + request.crowding);
    const int64_t num_sequences = view.num_sequences[slot];
    if (num_sequences != 0) {
        const int64_t tokens = 2 * request.output_tokens * request.num_sequences * num_sequences;
        cost += static_cast<double>(tokens) * view.decode_sequence_s[slot];
    }
    const int64_t block_size = view.block_sizes[slot];
    const int64_t taken = view.num_blocks_taken[slot];
    const int64_t free_blocks = std::max<int64_t>(view.num_free_blocks[slot] - taken, 0);
    const int64_t empty_blocks = std::max<int64_t>(view.num_empty_blocks[slot] - taken, 0);
    const int64_t new_blocks = (request.prompt_tokens + block_size - 1) / block_size - num_cached;
    const int64_t evicted = std::min(new_blocks, free_blocks) - empty_blocks;
    if (evicted > 0 && request.reuse != 0.0) {
        const double reuse = request.reuse * std::exp2(-view.cache_age_s[slot] / request.reuse_half_life_s);
        cost += static_cast<double>(evicted) * reuse * static_cast<double>(block_size) / rate;
    }
    if (new_blocks > free_blocks) {
        const int64_t missing = (new_blocks - free_blocks) * block_size;
        cost += static_cast<double>(missing) * view.decode_step_s[slot] /
                static_cast<double>(std::max<int64_t>(num_sequences, 1));
    }
    return cost + adapter_s(view, request, slot);
}

}  // namespace quire
