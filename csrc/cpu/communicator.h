// One rank's end of a group of processes that compute a model together, over a file that all of them map.
#pragma once

#include <stdint.h>

#include "quire_communicator.h"

namespace quire {

struct Segment;

// What ends a wait for the others: time, or another thread that sets a word.
struct WaitLimit {
    int64_t timeout_ns;
    const int32_t* cancelled;  // null if nobody does

    bool is_cancelled() const { return cancelled != nullptr && __atomic_load_n(cancelled, __ATOMIC_RELAXED) != 0; }
};

}  // namespace quire

struct QuireCommunicator {
public:
    QuireCommunicator(const QuireCommunicatorParams& params, quire::Segment* segment);
    QuireCommunicator(const QuireCommunicator&) = delete;
    QuireCommunicator& operator=(const QuireCommunicator&) = delete;
    ~QuireCommunicator();

    int rank() const { return rank_; }
    int world_size() const { return world_size_; }

    // Each returns a QuireStatus.
    int wait_for_all_to_join(const QuireCommunicatorParams& params);
    int all_reduce(float* data, int64_t count);

    // Rank 0 is shown each other rank's values in stretches: place(context, rank, offset, count, values). `most` is the
    // largest count of a rank.
    using Place = void (*)(void* context, int rank, int64_t offset, int64_t count, const float* values);
    int gather(const float* data, int64_t count, int64_t most, Place place, void* context);

    void abort();

private:
    enum class Operation : uint32_t { kJoin = 1, kAllReduce = 2, kGather = 3 };

    float* slot(int rank) const;

    // Wait until all ranks have come here, each with the same operation of the same size.
    int meet(Operation operation, int64_t size, const quire::WaitLimit& limit);
    int check_others(Operation operation, int64_t size) const;
    int give_up(Operation operation, const quire::WaitLimit& limit);
    int aborted(Operation operation) const;

    quire::Segment* const segment_;
    const int rank_;
    const int world_size_;
    const quire::WaitLimit limit_;
    uint32_t meetings_ = 0;  // that have passed
};
