#include "prefix_index.h"

#include <algorithm>
#include <iterator>

namespace quire {

namespace {

// Do something with each hash of many; those further on are on their way from memory meanwhile.
template <typename Action>
void each_ahead(const BlockTable& table, const int64_t* hashes, int64_t count, Action action) {
    constexpr int64_t kAhead = 12;
    for (int64_t at = 0; at < std::min(count, kAhead); ++at) table.prefetch(hashes[at]);
    for (int64_t at = 0; at < count; ++at) {
        if (at + kAhead < count) table.prefetch(hashes[at + kAhead]);
        action(hashes[at]);
    }
}

}  // namespace

void PrefixIndex::store(uint32_t slot, const int64_t* hashes, int64_t count) {
    each_ahead(table_, hashes, count, [&](int64_t hash) { store(slot, hash); });
}

void PrefixIndex::remove(uint32_t slot, const int64_t* hashes, int64_t count) {
    each_ahead(table_, hashes, count, [&](int64_t hash) { remove(slot, hash); });
}

PrefixIndex::Holders PrefixIndex::holders(int64_t hash) const {
    const uint32_t* found = table_.find(hash);
    if (found == nullptr) return {nullptr, 0};
    if (*found & kList) {
        const Slots& list = lists_[*found & ~kList];
        return {list.data(), list.size()};
    }
    return {found, 1};
}

void PrefixIndex::store(uint32_t slot, int64_t hash) {
    uint32_t* found = table_.find(hash);
    if (found == nullptr) {
        table_.put(hash, slot);
        return;
    }
    if (*found & kList) {
        Slots& list = lists_[*found & ~kList];
        const auto at = std::lower_bound(list.begin(), list.end(), slot);
        if (at == list.end() || *at != slot) list.insert(at, slot);
        return;
    }
    if (*found == slot) return;
    if (unused_.empty()) {
        unused_.push_back(static_cast<uint32_t>(lists_.size()));
        lists_.emplace_back();
    }
    const uint32_t number = unused_.back();
    lists_[number] = {std::min(*found, slot), std::max(*found, slot)};
    unused_.pop_back();
    *found = number | kList;
}

void PrefixIndex::remove(uint32_t slot, int64_t hash) {
    uint32_t* found = table_.find(hash);
    if (found == nullptr) return;
    if (!(*found & kList)) {
        if (*found == slot) table_.erase(hash);
        return;
    }
    const uint32_t number = *found & ~kList;
    Slots& list = lists_[number];
    const auto at = std::lower_bound(list.begin(), list.end(), slot);
    if (at == list.end() || *at != slot) return;
    list.erase(at);
    if (list.size() > 1) return;
    *found = list.front();
    Slots().swap(list);
    unused_.push_back(number);
}

void PrefixIndex::drop(uint32_t slot) {
    std::vector<int64_t> held;
    table_.each([&](int64_t hash, uint32_t value) {
        if (value & kList) {
            const Slots& list = lists_[value & ~kList];
            if (std::binary_search(list.begin(), list.end(), slot)) held.push_back(hash);
        } else if (value == slot) {
            held.push_back(hash);
        }
    });
    for (int64_t hash : held) remove(slot, hash);
}

Slots holders_within(const PrefixIndex& index, const PrefixIndex& expected, int64_t hash, const Slots& within) {
    const PrefixIndex::Holders stored = index.holders(hash), coming = expected.holders(hash);
    Slots found;
    const auto take_from = [&](const PrefixIndex::Holders& holders, Slots& into) {
        const uint32_t *begin = holders.slots, *end = holders.slots + holders.count;
        // The shorter of the two is gone through, the longer searched.
        if (holders.count < within.size()) {
            for (const uint32_t* slot = begin; slot != end; ++slot) {
                if (std::binary_search(within.begin(), within.end(), *slot)) into.push_back(*slot);
            }
        } else {
            for (uint32_t slot : within) {
                if (std::binary_search(begin, end, slot)) into.push_back(slot);
            }
        }
    };
    take_from(stored, found);
    if (coming.count != 0) {
        Slots more, both;
        take_from(coming, more);
        std::set_union(found.begin(), found.end(), more.begin(), more.end(), std::back_inserter(both));
        found.swap(both);
    }
    return found;
}

}  // namespace quire
