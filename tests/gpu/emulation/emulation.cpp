// The scheduler of emulated threads, and what the kernels' runtime calls land on.
#include "cuda_runtime.h"

namespace emulation {

Cta* cta = nullptr;
dim3 block_index, block_dim, grid_dim;
std::vector<unsigned char> shared_memory;
size_t shared_allowed = kSharedByDefault;
cudaError_t last_error = cudaSuccess;

namespace {

bool copies_land_late() {
    const char* mode = std::getenv("QUIRE_EMULATED_COPIES");
    return mode != nullptr && std::strcmp(mode, "late") == 0;
}

void land(const Copy& copy) {
    if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
    } else {
        std::memset(copy.to, 0, 16);
    }
}

// Jumps, since swapcontext() asks the kernel for the signal mask each time.
void yield_fiber() {
    if (_setjmp(cta->running->place) == 0) _longjmp(cta->scheduler, 1);
}

void resume(Fiber& fiber) {
    if (_setjmp(cta->scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

void run_fiber() {
    cta->body();
    cta->running->done = true;
    ++cta->progress;
    _longjmp(cta->scheduler, 1);
}

// Runs one warp as far as it can get without the others, which so fall behind as far as the kernel's barriers let them.
// Returns how many of its threads ended.
size_t run_warp(size_t warp) {
    Cta& c = *cta;
    size_t ended = 0, before;
    do {
        before = c.progress;
        for (size_t i = warp * kWarp; i < (warp + 1) * kWarp; ++i) {
            Fiber& fiber = *c.fibers[i];
            if (fiber.done) continue;
            c.running = &fiber;
            c.running_index = static_cast<int>(i);
            resume(fiber);
            ended += fiber.done;
        }
    } while (c.progress != before);
    return ended;
}

}  // namespace

void wait_at(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.waiting == count) {
        barrier.waiting = 0;
        ++barrier.generation;
        ++cta->progress;
        return;
    }
    while (barrier.generation == generation) yield_fiber();
}

void copy_async(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
        std::abort();  // a GPU would fault
    }
    if (copies_land_late()) {
        cta->running->open.push_back({to, from, valid});
    } else {
        land({to, from, valid});
    }
}

void commit() {
    cta->running->groups.push_back(std::move(cta->running->open));
    cta->running->open.clear();
}

void wait_groups(size_t pending) {
    auto& groups = cta->running->groups;
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) land(copy);
        groups.erase(groups.begin());
    }
}

namespace {

// A CTA as a kernel finds it: nothing in shared memory, no thread begun.
void reset(Cta& current) {
    std::memset(shared_memory.data(), 0xff, shared_memory.size());
    current.all = {};
    current.warps.assign(current.fibers.size() / kWarp, {});
    for (size_t i = 0; i < current.fibers.size(); ++i) {
        Fiber& fiber = *current.fibers[i];
        fiber.started = fiber.done = fiber.odd_exchange = false;
        fiber.thread = dim3(static_cast<unsigned>(i), 0, 0);
        fiber.open.clear();
        fiber.groups.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
    const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
    const bool fits = grid.x >= 1 && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 &&
                      threads >= 1 && threads <= 1024;
    if (!fits || shared_bytes > std::max(kSharedByDefault, shared_allowed) || threads % kWarp != 0) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    Cta current;
    cta = &current;
    grid_dim = grid;
    block_dim = block;
    current.body = body;
    current.exchange.resize(2 * threads * kExchange);
    shared_memory.resize(shared_bytes + 16);
    for (size_t i = 0; i < threads; ++i) {
        current.fibers.push_back(std::make_unique<Fiber>());
        current.fibers.back()->stack.resize(kStackBytes);
    }
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = dim3(x, y, z);
                reset(current);
                size_t left = threads;
                for (size_t warp = 0; left > 0; warp = (warp + 1) % current.warps.size()) left -= run_warp(warp);
            }
        }
    }
    cta = nullptr;
}

}  // namespace emulation
