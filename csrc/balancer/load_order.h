// Slots in the order in which their queues will be empty, even and odd ones (the two lanes) apart.
#pragma once

#include <stdint.h>

#include <cmath>
#include <limits>
#include <set>
#include <utility>
#include <vector>

namespace quire {

class LoadOrder {
public:
    using Lane = std::set<std::pair<double, uint32_t>>;

    const Lane& lane(int parity) const { return lanes_[parity]; }

    void put(uint32_t slot, double free_at) {
        remove(slot);
        if (slot >= times_.size()) times_.resize(slot + 1, std::nan(""));
        times_[slot] = free_at;
        lanes_[slot & 1].insert({free_at, slot});
    }

    void remove(uint32_t slot) {
        if (slot >= times_.size() || std::isnan(times_[slot])) return;
        lanes_[slot & 1].erase({times_[slot], slot});
        times_[slot] = std::nan("");
    }

    double first_after(double time) const {
        double first = std::numeric_limits<double>::infinity();
        for (const Lane& lane : lanes_) {
            const auto at = lane.upper_bound({time, UINT32_MAX});
            if (at != lane.end() && at->first < first) first = at->first;
        }
        return first;
    }

private:
    Lane lanes_[2];
    std::vector<double> times_;
};

}  // namespace quire
