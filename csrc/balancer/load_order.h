// Slots in the order in which their queues will be empty, even and odd ones (the two lanes) apart.
#pragma once

#include <stdint.h>

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
        if (slot >= places_.size()) places_.resize(slot + 1);
        Place& place = places_[slot];
        Lane& lane = lanes_[slot & 1];
        if (!place.is_in) {
            place = {lane.insert({free_at, slot}).first, true};
            return;
        }
        // The node moves as it is: nothing is searched for twice, and no memory is asked for.
        Lane::node_type node = lane.extract(place.at);
        node.value().first = free_at;
        place.at = lane.insert(std::move(node)).position;
    }

    void remove(uint32_t slot) {
        if (slot >= places_.size() || !places_[slot].is_in) return;
        lanes_[slot & 1].erase(places_[slot].at);
        places_[slot].is_in = false;
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
    struct Place {
        Lane::iterator at;
        bool is_in = false;
    };

    Lane lanes_[2];
    std::vector<Place> places_;
};

}  // namespace quire
