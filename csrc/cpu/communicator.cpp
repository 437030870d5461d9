// Collectives in shared memory. A rank writes its part into a slot of its own, all meet, and each reads what it wants
// of the others' slots. There are two sets of slots, taken in turns: whoever writes to one for the second time has met
// the others in between, and so knows that they have read what it held.
//
// One word, `generation`, counts the meetings and is what ranks wait for: the last to come raises it. An abort sets its
// top bit for good. It is a futex, so that a rank that waits longer than a moment gives up its core, which another rank
// may well need in order to come.
#include "communicator.h"

#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "clock.h"
#include "error.h"
#include "shared_segment.h"

namespace quire {

namespace {

constexpr const char* kJoin = "communicator_join";
constexpr int64_t kSpinNs = 20'000;
constexpr int64_t kCancelPollNs = 10'000'000;  // between looks whether a wait is cancelled
constexpr uint32_t kAborted = uint32_t{1} << 31;  // the generation's top bit

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

void wake_all(Segment* segment) {
    // Either a rank counted in `sleepers` is seen here, or it sees the new generation before it sleeps.
    if (segment->sleepers.load() > 0) futex(&segment->generation, FUTEX_WAKE, INT32_MAX, nullptr);
}

// Wait until the generation is no longer `before`. False if the limit ended it.
bool wait_for_change(Segment* segment, uint32_t before, const WaitLimit& limit) {
    const int64_t began = now_ns();
    do {
        for (int i = 0; i < 32; ++i) {
            if (segment->generation.load(std::memory_order_acquire) != before) return true;
            pause();
        }
    } while (now_ns() - began < kSpinNs);
    segment->sleepers.fetch_add(1);
    bool changed;
    while (!(changed = segment->generation.load() != before)) {
        const int64_t left = began + limit.timeout_ns - now_ns();
        if (left <= 0 || limit.is_cancelled()) break;
        const timespec timeout = as_timespec(limit.cancelled != nullptr ? std::min(left, kCancelPollNs) : left);
        futex(&segment->generation, FUTEX_WAIT, before, &timeout);
    }
    segment->sleepers.fetch_sub(1);
    return changed;
}

uint64_t packed(uint32_t operation, int64_t size) { return uint64_t{operation} << 56 | static_cast<uint64_t>(size); }

const char* name_of(uint64_t operation) {
    switch (operation >> 56) {
        case 1: return "join";
        case 2: return "all_reduce";
        case 3: return "gather";
        default: return "nothing";
    }
}

long long size_of(uint64_t operation) { return static_cast<long long>(operation << 8 >> 8); }

int check_params(const QuireCommunicatorParams& p) {
    QUIRE_CHECK(check_not_null(kJoin, "path", p.path));
    QUIRE_CHECK(check_range(kJoin, "world_size", p.world_size, 2, kMostRanks));
    QUIRE_CHECK(check_range(kJoin, "rank", p.rank, 0, p.world_size - 1));
    QUIRE_CHECK(check_range(kJoin, "timeout_ns", p.timeout_ns, 1, INT64_MAX / 4));
    return check_range(kJoin, "join_timeout_ns", p.join_timeout_ns, 1, INT64_MAX / 4);
}

}  // namespace

}  // namespace quire

using namespace quire;

QuireCommunicator::QuireCommunicator(const QuireCommunicatorParams& params, Segment* segment)
    : segment_(segment), rank_(params.rank), world_size_(params.world_size), limit_{params.timeout_ns, nullptr} {}

QuireCommunicator::~QuireCommunicator() { unmap_segment(segment_, world_size_); }

float* QuireCommunicator::slot(int rank) const {
    return segment_->slots() + (static_cast<int64_t>(meetings_ % 2) * world_size_ + rank) * kSlotFloats;
}

int QuireCommunicator::wait_for_all_to_join(const QuireCommunicatorParams& params) {
    return meet(Operation::kJoin, 0, {params.join_timeout_ns, params.cancelled});
}

int QuireCommunicator::meet(Operation operation, int64_t size, const WaitLimit& limit) {
    const uint32_t before = meetings_ & ~kAborted, after = (meetings_ + 1) & ~kAborted;
    Segment::Rank& self = segment_->ranks[rank_];
    self.operation[meetings_ % 2].store(packed(static_cast<uint32_t>(operation), size), std::memory_order_relaxed);
    self.meetings.store(after, std::memory_order_relaxed);
    if (segment_->arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(world_size_)) {
        segment_->arrivals.store(0, std::memory_order_relaxed);
        uint32_t expected = before;
        if (!segment_->generation.compare_exchange_strong(expected, after)) return aborted(operation);
        wake_all(segment_);
    } else if (!wait_for_change(segment_, before, limit)) {
        return give_up(operation, limit);
    }
    if ((segment_->generation.load(std::memory_order_acquire) & ~kAborted) != after) return aborted(operation);
    const int status = check_others(operation, size);
    status == QUIRE_OK ? static_cast<void>(++meetings_) : abort();
    return status;
}

int QuireCommunicator::check_others(Operation operation, int64_t size) const {
    const uint64_t own = packed(static_cast<uint32_t>(operation), size);
    for (int other = 0; other < world_size_; ++other) {
        const uint64_t theirs = segment_->ranks[other].operation[meetings_ % 2].load(std::memory_order_relaxed);
        if (theirs == own) continue;
        return fail(QUIRE_COMMUNICATION_FAILED, "ranks %d and %d are out of step: %s of %lld values, %s of %lld", rank_,
                    other, name_of(own), size_of(own), name_of(theirs), size_of(theirs));
    }
    return QUIRE_OK;
}

int QuireCommunicator::give_up(Operation operation, const WaitLimit& limit) {
    if (limit.is_cancelled()) {
        abort();
        return fail(QUIRE_COMMUNICATION_FAILED, "%s was cancelled on rank %d", kJoin, rank_);
    }
    const uint32_t meeting = (meetings_ + 1) & ~kAborted;
    int missing = -1;
    for (int other = 0; other < world_size_ && missing < 0; ++other) {
        if (segment_->ranks[other].meetings.load(std::memory_order_relaxed) != meeting) missing = other;
    }
    int32_t nobody = -1;
    if (segment_->aborter.compare_exchange_strong(nobody, rank_)) segment_->missed.store(missing);
    abort();
    return fail(QUIRE_COMMUNICATION_FAILED, "rank %d has not come to %s %u within %.3g s of rank %d", missing,
                name_of(packed(static_cast<uint32_t>(operation), 0)), meeting, static_cast<double>(limit.timeout_ns) * 1e-9,
                rank_);
}

int QuireCommunicator::aborted(Operation operation) const {
    const int aborter = segment_->aborter.load(), missed = segment_->missed.load();
    const char* const name = name_of(packed(static_cast<uint32_t>(operation), 0));
    if (missed >= 0) {
        return fail(QUIRE_COMMUNICATION_FAILED, "%s was aborted by rank %d, which had waited for rank %d", name, aborter,
                    missed);
    }
    return fail(QUIRE_COMMUNICATION_FAILED, "%s was aborted on rank %d", name, aborter);
}

void QuireCommunicator::abort() {
    int32_t nobody = -1;
    segment_->aborter.compare_exchange_strong(nobody, rank_);
    segment_->generation.fetch_or(kAborted);
    wake_all(segment_);
}

int QuireCommunicator::all_reduce(float* data, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += kSlotFloats) {
        const int64_t size = count - begin < kSlotFloats ? count - begin : kSlotFloats;
        float* const out = data + begin;
        const float* parts[kMostRanks];
        for (int rank = 0; rank < world_size_; ++rank) parts[rank] = slot(rank);
        memcpy(slot(rank_), out, sizeof(float) * static_cast<size_t>(size));
        QUIRE_CHECK(meet(Operation::kAllReduce, count - begin, limit_));
        for (int64_t i = 0; i < size; ++i) out[i] = parts[0][i] + parts[1][i];
        for (int rank = 2; rank < world_size_; ++rank) {
            const float* const part = parts[rank];
            for (int64_t i = 0; i < size; ++i) out[i] += part[i];
        }
    }
    return QUIRE_OK;
}

int QuireCommunicator::gather(const float* data, int64_t count, int64_t most, Place place, void* context) {
    for (int64_t begin = 0; begin < most; begin += kSlotFloats) {
        const int64_t left = count - begin, size = left < 0 ? 0 : left < kSlotFloats ? left : kSlotFloats;
        const float* parts[kMostRanks];
        for (int rank = 0; rank < world_size_; ++rank) parts[rank] = slot(rank);
        if (rank_ != 0) memcpy(slot(rank_), data + begin, sizeof(float) * static_cast<size_t>(size));
        QUIRE_CHECK(meet(Operation::kGather, most - begin, limit_));
        if (rank_ != 0) continue;
        const int64_t shown = most - begin < kSlotFloats ? most - begin : kSlotFloats;
        for (int rank = 1; rank < world_size_; ++rank) place(context, rank, begin, shown, parts[rank]);
    }
    return QUIRE_OK;
}

int quire_communicator_join(const QuireCommunicatorParams* params, QuireCommunicator** communicator) {
    if (params == nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: params is NULL", kJoin);
    QUIRE_CHECK(check_header(kJoin, params->size, params->abi_version, sizeof *params));
    QUIRE_CHECK(check_not_null(kJoin, "communicator", communicator));
    QUIRE_CHECK(check_params(*params));
    Segment* segment = nullptr;
    int status = params->rank == 0 ? create_segment(*params, &segment) : open_segment(*params, &segment);
    if (status != QUIRE_OK) {
        unmap_segment(segment, params->world_size);
        return status;
    }
    std::unique_ptr<QuireCommunicator> joined(new (std::nothrow) QuireCommunicator(*params, segment));
    if (joined == nullptr) {
        unmap_segment(segment, params->world_size);
        status = fail(QUIRE_OUT_OF_MEMORY, "%s: no memory", kJoin);
    } else {
        status = joined->wait_for_all_to_join(*params);
    }
    unlink(params->path);  // whoever is first; rank 0 may have died in the wait
    if (status == QUIRE_OK) *communicator = joined.release();
    return status;
}

void quire_communicator_abort(QuireCommunicator* communicator) { communicator->abort(); }

void quire_communicator_leave(QuireCommunicator* communicator) { delete communicator; }

int quire_all_reduce(QuireCommunicator* communicator, float* data, int64_t count) {
    QUIRE_CHECK(check_not_null("all_reduce", "communicator", communicator));
    QUIRE_CHECK(check_range("all_reduce", "count", count, 0, INT64_MAX / 8));
    if (count > 0) QUIRE_CHECK(check_not_null("all_reduce", "data", data));
    return communicator->all_reduce(data, count);
}

int quire_gather(QuireCommunicator* communicator, const float* data, int64_t count, float* gathered) {
    const char* const op = "gather";
    QUIRE_CHECK(check_not_null(op, "communicator", communicator));
    QUIRE_CHECK(check_range(op, "count", count, 0, INT64_MAX / 8));
    if (count > 0) QUIRE_CHECK(check_not_null(op, "data", data));
    struct Gathered {
        float* values;
        int64_t count;
    } out{gathered, count};
    if (communicator->rank() == 0 && count > 0) {
        QUIRE_CHECK(check_not_null(op, "gathered", gathered));
        memcpy(gathered, data, sizeof(float) * static_cast<size_t>(count));
    }
    return communicator->gather(
        data, count, count,
        [](void* context, int rank, int64_t offset, int64_t size, const float* values) {
            const Gathered& to = *static_cast<const Gathered*>(context);
            memcpy(to.values + rank * to.count + offset, values, sizeof(float) * static_cast<size_t>(size));
        },
        &out);
}
