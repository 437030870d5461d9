// Which slots hold which block. Most blocks lie on one replica: its slot then stands in the table itself.
#pragma once

#include <stdint.h>

#include <vector>

#include "block_table.h"

namespace quire {

// Slots, ascending.
using Slots = std::vector<uint32_t>;

class PrefixIndex {
public:
    struct Holders {
        const uint32_t* slots;
        size_t count;
    };

    size_t num_blocks() const { return table_.size(); }
    Holders holders(int64_t hash) const;
    void store(uint32_t slot, const int64_t* hashes, int64_t count);
    void remove(uint32_t slot, const int64_t* hashes, int64_t count);
    void prefetch(int64_t hash) const { table_.prefetch(hash); }
    void drop(uint32_t slot);

private:
    // A number in the table with this bit is that of a list, any other is the one slot.
    static constexpr uint32_t kList = 1u << 31;

    void store(uint32_t slot, int64_t hash);
    void remove(uint32_t slot, int64_t hash);

    BlockTable table_;
    std::vector<Slots> lists_;
    std::vector<uint32_t> unused_;
};

// Who of `within` holds a block in either index.
Slots holders_within(const PrefixIndex& index, const PrefixIndex& expected, int64_t hash, const Slots& within);

}  // namespace quire
