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
        if (shard.entries.empty()) return nullptr;
        const size_t mask = shard.entries.size() - 1;
        for (size_t at = mixed & mask;; at = (at + 1) & mask) {
            const Entry& entry = shard.entries[at];
            if (entry.value == kNone) return nullptr;
            if (entry.hash == hash) return &entry.value;
        }
    }

    uint32_t* find(int64_t hash) { return const_cast<uint32_t*>(static_cast<const BlockTable*>(this)->find(hash)); }

    // A hash will soon be looked for, put or erased: in a large table that is a miss of all caches.
    void prefetch(int64_t hash) const {
        const uint64_t mixed = mix(hash);
        const Shard& shard = shards_[mixed >> 56];
        if (!shard.entries.empty()) __builtin_prefetch(&shard.entries[mixed & (shard.entries.size() - 1)]);
    }

    // Add a hash that is not there.
    void put(int64_t hash, uint32_t value) {
        const uint64_t mixed = mix(hash);
        Shard& shard = shards_[mixed >> 56];
        if (4 * (shard.used + 1) > 3 * shard.entries.size()) shard.grow();
        shard.put(hash, mixed, value);
        ++shard.used;
    }

    // Take out a hash that is there; those behind it move up, so that no search stops too early.
    void erase(int64_t hash) {
        const uint64_t mixed = mix(hash);
        Shard& shard = shards_[mixed >> 56];
        std::vector<Entry>& entries = shard.entries;
        const size_t mask = entries.size() - 1;
        size_t hole = mixed & mask;
        while (entries[hole].hash != hash || entries[hole].value == kNone) hole = (hole + 1) & mask;
        for (size_t at = (hole + 1) & mask; entries[at].value != kNone; at = (at + 1) & mask) {
            const size_t home = mix(entries[at].hash) & mask;
            if (((at - home) & mask) < ((at - hole) & mask)) continue;
            entries[hole] = entries[at];
            hole = at;
        }
        entries[hole].value = kNone;
        --shard.used;
    }

    // Every hash there is, with its number.
    template <typename Visit>
    void each(Visit visit) const {
        for (const Shard& shard : shards_) {
            for (const Entry& entry : shard.entries) {
                if (entry.value != kNone) visit(entry.hash, entry.value);
            }
        }
    }

private:
    struct Entry {
        int64_t hash = 0;
        uint32_t value = kNone;
    };

    struct Shard {
        std::vector<Entry> entries;
        size_t used = 0;

        void put(int64_t hash, uint64_t mixed, uint32_t value) {
            const size_t mask = entries.size() - 1;
            size_t at = mixed & mask;
            while (entries[at].value != kNone) at = (at + 1) & mask;
            entries[at] = {hash, value};
        }

        void grow() {
            Shard larger;
            larger.entries.resize(entries.empty() ? 16 : 2 * entries.size());
            for (const Entry& entry : entries) {
                if (entry.value != kNone) larger.put(entry.hash, mix(entry.hash), entry.value);
            }
            entries.swap(larger.entries);
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
