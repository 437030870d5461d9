// From block hashes to small numbers: open addressing in 256 tables, so that growing one stops nobody for long.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <array>
#include <vector>

namespace quire {

class BlockTable {
public:
    static constexpr uint32_t kNone = UINT32_MAX;

    size_t size() const {
        size_t total = 0;
        for (const Shard& shard : shards_) total += shard.used;
        return total;
    }

    // The number under a hash, kNone if there is none; valid until the next put or erase.
    const uint32_t* find(int64_t hash) const {
        const uint64_t mixed = mix(hash);
        const Shard& shard = shards_[mixed >> 56];
        if (shard.values.empty()) return nullptr;
        const size_t mask = shard.values.size() - 1;
        for (size_t at = mixed & mask;; at = (at + 1) & mask) {
            if (shard.values[at] == kNone) return nullptr;
            if (shard.hashes[at] == hash) return &shard.values[at];
        }
    }

    uint32_t* find(int64_t hash) { return const_cast<uint32_t*>(static_cast<const BlockTable*>(this)->find(hash)); }

    // Add a hash that is not there.
    void put(int64_t hash, uint32_t value) {
        const uint64_t mixed = mix(hash);
        Shard& shard = shards_[mixed >> 56];
        if (4 * (shard.used + 1) > 3 * shard.values.size()) shard.grow();
        shard.put(hash, mixed, value);
        ++shard.used;
    }

    // Take out a hash that is there; those behind it move up, so that no search stops too early.
    void erase(int64_t hash) {
        const uint64_t mixed = mix(hash);
        Shard& shard = shards_[mixed >> 56];
        const size_t mask = shard.values.size() - 1;
        size_t hole = mixed & mask;
        while (shard.hashes[hole] != hash || shard.values[hole] == kNone) hole = (hole + 1) & mask;
        for (size_t at = (hole + 1) & mask; shard.values[at] != kNone; at = (at + 1) & mask) {
            const size_t home = mix(shard.hashes[at]) & mask;
            if (((at - home) & mask) < ((at - hole) & mask)) continue;
            shard.hashes[hole] = shard.hashes[at];
            shard.values[hole] = shard.values[at];
            hole = at;
        }
        shard.values[hole] = kNone;
        --shard.used;
    }

    // Every hash there is, with its number.
    template <typename Visit>
    void each(Visit visit) const {
        for (const Shard& shard : shards_) {
            for (size_t at = 0; at < shard.values.size(); ++at) {
                if (shard.values[at] != kNone) visit(shard.hashes[at], shard.values[at]);
            }
        }
    }

private:
    struct Shard {
        std::vector<int64_t> hashes;
        std::vector<uint32_t> values;
        size_t used = 0;

        void put(int64_t hash, uint64_t mixed, uint32_t value) {
            const size_t mask = values.size() - 1;
            size_t at = mixed & mask;
            while (values[at] != kNone) at = (at + 1) & mask;
            hashes[at] = hash;
            values[at] = value;
        }

        void grow() {
            Shard larger;
            const size_t capacity = values.empty() ? 16 : 2 * values.size();
            larger.hashes.resize(capacity);
            larger.values.resize(capacity, kNone);
            for (size_t at = 0; at < values.size(); ++at) {
                if (values[at] != kNone) larger.put(hashes[at], mix(hashes[at]), values[at]);
            }
            hashes.swap(larger.hashes);
            values.swap(larger.values);
        }
    };

    // The finalizer of SplitMix64: hashes of a simulation are consecutive numbers.
    static uint64_t mix(int64_t hash) {
        uint64_t x = static_cast<uint64_t>(hash);
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
        return x ^ (x >> 31);
    }

    std::array<Shard, 256> shards_;
};

}  // namespace quire
