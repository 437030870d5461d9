// The file that the ranks of a communicator map: how it is laid out.
#pragma once

#include <stdint.h>

#include <atomic>

#include "communicator.h"

namespace quire {

constexpr int kMostRanks = 64;
constexpr int64_t kSlotFloats = int64_t{1} << 16;

// The head of the file. After it, for each of two turns and each rank, a slot of kSlotFloats values.
struct Segment {
    struct alignas(64) Rank {
        std::atomic<uint32_t> meetings;      // that it has come to
        std::atomic<uint64_t> operation[2];  // what it came for, by turns: kind and size
    };

    std::atomic<uint32_t> ready;   // set once the rest is
    std::atomic<int32_t> aborter;  // the rank that aborted, and the one that it missed; -1 is none
    std::atomic<int32_t> missed;
    alignas(64) std::atomic<uint32_t> generation;
    alignas(64) std::atomic<uint32_t> arrivals;  // at the meeting that is not complete
    alignas(64) std::atomic<uint32_t> sleepers;
    Rank ranks[kMostRanks];

    static int64_t bytes(int world_size) {
        return static_cast<int64_t>(sizeof(Segment)) + 2 * world_size * kSlotFloats * static_cast<int64_t>(sizeof(float));
    }
    float* slots() { return reinterpret_cast<float*>(this + 1); }
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);
static_assert(sizeof(Segment) % 64 == 0);

// Rank 0 makes the file; the others wait for it. Each returns a QuireStatus. A segment may be left mapped by either that
// fails.
int create_segment(const QuireCommunicatorParams& params, Segment** segment);
int open_segment(const QuireCommunicatorParams& params, Segment** segment);

// `segment` may be null.
void unmap_segment(Segment* segment, int world_size);

}  // namespace quire
