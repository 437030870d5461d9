// The C functions of quire_balancer.h. No exception leaves them.

#include "quire_balancer.h"

#include <new>

#include "chooser.h"
#include "load_order.h"
#include "prefix_index.h"

struct QuireBalancer {
    QuireFleetView view{};
    quire::LoadOrder order;
    quire::PrefixIndex indexes[2];
};

namespace {

// 0, or -1 if memory ran out.
template <typename Action>
int guarded(Action action) {
    try {
        action();
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

}  // namespace

extern "C" {

int quire_balancer_abi_version(void) { return QUIRE_BALANCER_ABI_VERSION; }

QuireBalancer* quire_balancer_create(void) { return new (std::nothrow) QuireBalancer; }

void quire_balancer_destroy(QuireBalancer* balancer) { delete balancer; }

void quire_balancer_attach(QuireBalancer* balancer, const QuireFleetView* view) { balancer->view = *view; }

int quire_balancer_store(QuireBalancer* balancer, int index, int64_t slot, const int64_t* hashes, int64_t count) {
    return guarded([&] { balancer->indexes[index].store(static_cast<uint32_t>(slot), hashes, count); });
}

int quire_balancer_remove(QuireBalancer* balancer, int index, int64_t slot, const int64_t* hashes, int64_t count) {
    return guarded([&] { balancer->indexes[index].remove(static_cast<uint32_t>(slot), hashes, count); });
}

int quire_balancer_drop(QuireBalancer* balancer, int index, int64_t slot) {
    return guarded([&] { balancer->indexes[index].drop(static_cast<uint32_t>(slot)); });
}

int64_t quire_balancer_num_blocks(const QuireBalancer* balancer, int index) {
    return static_cast<int64_t>(balancer->indexes[index].num_blocks());
}

int quire_balancer_order_put(QuireBalancer* balancer, int64_t slot, double free_at) {
    return guarded([&] { balancer->order.put(static_cast<uint32_t>(slot), free_at); });
}

int quire_balancer_order_remove(QuireBalancer* balancer, int64_t slot) {
    return guarded([&] { balancer->order.remove(static_cast<uint32_t>(slot)); });
}

double quire_balancer_first_after(const QuireBalancer* balancer, double time) {
    return balancer->order.first_after(time);
}

int quire_balancer_place(QuireBalancer* balancer, QuirePlaceParams* params) {
    return guarded([&] {
        quire::place(balancer->view, balancer->order, balancer->indexes[0], balancer->indexes[1], *params);
    });
}

}  // extern "C"
