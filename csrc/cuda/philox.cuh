// The counter-based generator of engine/decoding/random.py: Philox4x32-10 (Salmon et al., SC'11).
#pragma once

#include <cstdint>

namespace quire {

// 53 random bits, a pure function of (seed, sample index, position).
__device__ __forceinline__ uint64_t philox_bits(uint64_t seed, uint64_t sample_index, uint64_t position) {
    uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
    uint32_t c2 = static_cast<uint32_t>(sample_index), c3 = static_cast<uint32_t>(sample_index >> 32);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
        const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return (static_cast<uint64_t>(c0) << 21) ^ (c1 >> 11);
}

}  // namespace quire
