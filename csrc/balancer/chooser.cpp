#include "chooser.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "cost.h"

namespace quire {

namespace {

// As in app/balancer/policy.py.
constexpr size_t kMaxPriced = 3;
constexpr size_t kMaxSorted = 12;
constexpr double kLongPrompt = 3.2;
constexpr double kLongOutOfLane = 1.05;
constexpr double kShortOutOfLane = 0.07;

class Bitmap {
public:
    Bitmap(const uint8_t* bytes, int64_t num_bytes) : words_(static_cast<size_t>(num_bytes + 7) / 8) {
        std::copy(bytes, bytes + num_bytes, reinterpret_cast<uint8_t*>(words_.data()));
    }

    bool has(uint32_t slot) const { return (slot >> 6) < words_.size() && (words_[slot >> 6] >> (slot & 63) & 1); }
    void clear(uint32_t slot) { words_[slot >> 6] &= ~(uint64_t{1} << (slot & 63)); }

    // Those of these that `other` has too.
    Bitmap within(const uint8_t* other, int64_t num_bytes) const {
        Bitmap found(other, num_bytes);
        found.words_.resize(words_.size());
        for (size_t at = 0; at < words_.size(); ++at) found.words_[at] &= words_[at];
        return found;
    }

    // The others than `part`, which is of these.
    Bitmap without(const Bitmap& part) const {
        Bitmap found = *this;
        for (size_t at = 0; at < words_.size(); ++at) found.words_[at] ^= part.words_[at];
        return found;
    }

    // Whether there are at most `limit`.
    bool has_at_most(size_t limit) const {
        size_t total = 0;
        for (size_t at = 0; at < words_.size() && total <= limit; ++at) {
            total += static_cast<size_t>(__builtin_popcountll(words_[at]));
        }
        return total <= limit;
    }

    Slots slots() const {
        Slots found;
        for (size_t at = 0; at < words_.size(); ++at) {
            for (uint64_t word = words_[at]; word != 0; word &= word - 1) {
                found.push_back(static_cast<uint32_t>(64 * at) + static_cast<uint32_t>(__builtin_ctzll(word)));
            }
        }
        return found;
    }

private:
    // The bytes as they come, lowest first, as on every machine that this runs on.
    std::vector<uint64_t> words_;
};

// Who holds how much of a chain. Holders only dwindle along it, so it is searched by halves.
class Search {
public:
    Search(const PrefixIndex& index, const PrefixIndex& expected, const QuirePlaceParams& params)
        : index_(index), expected_(expected), chain_(params.chain) {}

    Slots at(int64_t block, const Slots& within) const {
        return holders_within(index_, expected_, chain_[block], within);
    }

    // Those who hold block `low` but not block `high`, deepest first.
    void between(int64_t low, const Slots& at_low, int64_t high, const Slots& at_high, std::vector<Overlap>& found) {
        if (at_low == at_high) return;
        if (high - low == 1) {
            Slots rest;
            std::set_difference(at_low.begin(), at_low.end(), at_high.begin(), at_high.end(), std::back_inserter(rest));
            if (!rest.empty()) found.push_back({low + 1, std::move(rest)});
            return;
        }
        const int64_t middle = (low + high) / 2;
        const Slots at_middle = at(middle, at_low);
        between(middle, at_middle, high, at_high, found);
        between(low, at_low, middle, at_middle, found);
    }

private:
    const PrefixIndex& index_;
    const PrefixIndex& expected_;
    const int64_t* chain_;
};

// Those of `among` that hold a block.
Slots holders_among(const PrefixIndex& index, const PrefixIndex& expected, int64_t hash, const Bitmap& among) {
    const PrefixIndex::Holders stored = index.holders(hash), coming = expected.holders(hash);
    Slots all, found;
    std::set_union(stored.slots, stored.slots + stored.count, coming.slots, coming.slots + coming.count,
                   std::back_inserter(all));
    for (uint32_t slot : all) {
        if (among.has(slot)) found.push_back(slot);
    }
    return found;
}

class Cheapest {
public:
    Cheapest(const QuireFleetView& view, QuirePlaceParams& params) : view_(view), params_(params) {
        params.slot = -1;
        params.num_cached_blocks = 0;
        params.cost_s = std::numeric_limits<double>::infinity();
    }

    // Price the emptiest of `holders`: those that have the request's adapter, and those that have not.
    void consider(Slots holders, int64_t num_blocks) {
        if (params_.adapter_holders != nullptr) {
            const auto has_it = [&](uint32_t slot) { return !lacks_adapter(params_, slot); };
            const auto middle = std::stable_partition(holders.begin(), holders.end(), has_it);
            Slots lacking(middle, holders.end());
            holders.erase(middle, holders.end());
            if (!holders.empty()) consider_alike(std::move(holders), num_blocks);
            if (!lacking.empty()) consider_alike(std::move(lacking), num_blocks);
            return;
        }
        consider_alike(std::move(holders), num_blocks);
    }

    // The same of all slots in `rest`, found by the order of the fleet.
    void consider_rest(const Bitmap& rest, const LoadOrder& order) {
        if (params_.adapter_holders != nullptr) {
            const Bitmap having = rest.within(params_.adapter_holders, params_.adapter_bytes);
            consider_rest_alike(having, order);
            consider_rest_alike(rest.without(having), order);
            return;
        }
        consider_rest_alike(rest, order);
    }

private:
    void consider_alike(Slots holders, int64_t num_blocks) {
        if (holders.size() > kMaxSorted) {
            Slots even, odd;
            for (uint32_t slot : holders) (slot & 1 ? odd : even).push_back(slot);
            holders.clear();
            for (Slots* lane : {&even, &odd}) {
                const size_t count = std::min(kMaxPriced, lane->size());
                std::partial_sort(lane->begin(), lane->begin() + static_cast<ptrdiff_t>(count), lane->end(), emptier());
                holders.insert(holders.end(), lane->begin(), lane->begin() + static_cast<ptrdiff_t>(count));
            }
        }
        price(std::move(holders), num_blocks);
    }

    void consider_rest_alike(const Bitmap& rest, const LoadOrder& order) {
        if (rest.has_at_most(kMaxSorted)) {
            price(rest.slots(), 0);
            return;
        }
        Slots found;
        for (int parity : {0, 1}) {
            size_t taken = 0;
            for (const auto& [time, slot] : order.lane(parity)) {
                if (!rest.has(slot)) continue;
                found.push_back(slot);
                if (++taken == kMaxPriced) break;
            }
        }
        price(std::move(found), 0);
    }

    struct Emptier {
        const double* free_at;
        bool operator()(uint32_t a, uint32_t b) const {
            return free_at[a] != free_at[b] ? free_at[a] < free_at[b] : a < b;
        }
    };

    Emptier emptier() const { return {view_.free_at}; }

    void price(Slots slots, int64_t num_blocks) {
        std::sort(slots.begin(), slots.end(), emptier());
        const int64_t uncached = std::max<int64_t>(params_.prompt_tokens - num_blocks * params_.block_size, 1);
        const double mean_s = params_.mean_prefill_s, crowding = 1.0 + params_.crowding;
        for (uint32_t slot : slots) {
            const double wait = wait_s(view_, slot, params_.now);
            const double prefill_s = static_cast<double>(uncached) / view_.prefill_rates[slot];
            const bool is_long = prefill_s > kLongPrompt * mean_s;
            double lane_s = 0.0;
            if (is_long != static_cast<bool>(slot & 1)) lane_s = mean_s * (is_long ? kLongOutOfLane : kShortOutOfLane);
            if (params_.slot >= 0) {
                if (wait >= params_.cost_s) break;
                if (wait + prefill_s * crowding + lane_s >= params_.cost_s) continue;
            }
            const double cost = cost_s(view_, params_, slot, num_blocks) + lane_s;
            if (params_.slot < 0 || cost < params_.cost_s) {
                params_.slot = slot;
                params_.num_cached_blocks = num_blocks;
                params_.cost_s = cost;
            }
        }
    }

    const QuireFleetView& view_;
    QuirePlaceParams& params_;
};

}  // namespace

void choose(const QuireFleetView& view, const LoadOrder& order, const PrefixIndex& index, const PrefixIndex& expected,
            QuirePlaceParams& params) {
    const int64_t length = params.chain_length;
    if (length > 0) {
        index.prefetch(params.chain[0]);
        expected.prefetch(params.chain[0]);
    }
    Bitmap rest(params.among, params.among_bytes);
    Cheapest cheapest(view, params);
    if (length > 0) {
        const Slots first = holders_among(index, expected, params.chain[0], rest);
        if (!first.empty()) {
            Search search(index, expected, params);
            const Slots last = search.at(length - 1, first);
            std::vector<Overlap> found;
            if (!last.empty()) found.push_back({length, last});
            search.between(0, first, length - 1, last, found);
            for (Overlap& group : found) cheapest.consider(std::move(group.holders), group.num_blocks);
            for (uint32_t slot : first) rest.clear(slot);
        }
    }
    cheapest.consider_rest(rest, order);
}

void place(const QuireFleetView& view, LoadOrder& order, const PrefixIndex& index, PrefixIndex& expected,
           QuirePlaceParams& params) {
    params.is_booked = 0;
    choose(view, order, index, expected, params);
    if (params.slot < 0) return;
    const auto slot = static_cast<uint32_t>(params.slot);
    const int64_t cached = params.num_cached_blocks;
    const int64_t uncached = std::max<int64_t>(params.prompt_tokens - cached * params.block_size, 1);
    params.wait_s = wait_s(view, slot, params.now);
    params.prefill_s = static_cast<double>(uncached) / view.prefill_rates[slot];
    params.free_at = view.free_at[slot];
    const bool books = !(params.wait_s > params.hold_s);
    if (!books && params.reserves == 0) return;
    const double free_at = std::max(params.free_at, params.now) + params.prefill_s;
    if (books) {
        expected.store(slot, params.chain + cached, params.chain_length - cached);
    }
    order.put(slot, free_at);
    view.free_at[slot] = free_at;
    if (!books) return;
    view.num_sequences[slot] += params.num_sequences;
    view.num_blocks_taken[slot] += (params.prompt_tokens + params.block_size - 1) / params.block_size - cached;
    params.is_booked = 1;
}

}  // namespace quire
