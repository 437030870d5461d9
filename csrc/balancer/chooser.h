// The cheapest replica, CheapestPolicy of app/balancer/policy.py, and booking it.
#pragma once

#include "load_order.h"
#include "prefix_index.h"
#include "quire_balancer.h"

namespace quire {

// Slots that hold exactly so many leading blocks of a chain.
struct Overlap {
    int64_t num_blocks;
    Slots holders;
};

// Fills in the answer's fields of `params`. `index` and `expected` both count.
void choose(const QuireFleetView& view, const LoadOrder& order, const PrefixIndex& index, const PrefixIndex& expected,
            QuirePlaceParams& params);

// Chooses, and books as Placer and Fleet.take_on of app/balancer do.
void place(const QuireFleetView& view, LoadOrder& order, const PrefixIndex& index, PrefixIndex& expected,
           QuirePlaceParams& params);

}  // namespace quire
