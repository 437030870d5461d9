// Threads that help the caller of an operation with its items.
#pragma once

#include <stdint.h>

namespace quire {

// Call body(context, i) once for each item i from 0 to num_items - 1, on this thread and up to num_threads - 1 helpers,
// which take items one by one; returns when all are done. body must not throw.
//
// A single item, or a single thread, runs inline. So does a call made while another thread's is in flight: the helpers
// are busy then, and waiting for them would be slower. After a fork the child starts its own helpers.
void parallel_for(int num_threads, int64_t num_items, void (*body)(const void* context, int64_t item),
                  const void* context);

// The same for a callable object.
template <typename Body>
void parallel_for(int num_threads, int64_t num_items, const Body& body) {
    parallel_for(
        num_threads, num_items,
        [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, &body);
}

// At least `count` floats of this thread's own scratch, 64-byte aligned; valid until the thread's next call with the
// same `use` (0 or 1). NULL if there is no memory.
float* thread_scratch(int use, int64_t count);

}  // namespace quire
