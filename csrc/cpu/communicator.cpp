// Collectives in shared memory. A rank writes its part into a slot of its own, all meet, and each reads what it wants
// of the others' slots. There are two sets of slots, taken in turns: whoever writes to one for the second time has met
// the others in between, and so knows that they have read what it held.
//
// One word, `generation`, counts the meetings and is what ranks wait for: the last to come raises it. An abort sets its
// top bit for good. It is a futex, so that a rank that waits longer than a moment gives up its core, which another rank
// may well need in order to come.
#include "communicator.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <memory>
#include <new>

#include "error.h"

namespace quire {

namespace {

constexpr const char* kJoin = "communicator_join";
constexpr int64_t kSlotFloats = int64_t{1} << 16;
constexpr int64_t kSpinNs = 20'000;
constexpr int64_t kPollNs = 2'000'000;  // between looks for rank 0's file
constexpr uint32_t kAborted = uint32_t{1} << 31;
constexpr uint32_t kReady = 0x51554952;

}  // namespace

struct Segment {
    struct alignas(64) Rank {
        std::atomic<uint32_t> meetings;      // that it has come to
        std::atomic<uint64_t> operation[2];  // what it came for, by turns: kind and size
    };

    std::atomic<uint32_t> ready;  // kReady once the rest is set
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

namespace {

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

timespec as_timespec(int64_t ns) { return {static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)}; }

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

// Wait until the generation is no longer `before`. False at the deadline.
bool wait_for_change(Segment* segment, uint32_t before, int64_t timeout_ns) {
    const int64_t began = now();
    do {
        for (int i = 0; i < 32; ++i) {
            if (segment->generation.load(std::memory_order_acquire) != before) return true;
            pause();
        }
    } while (now() - began < kSpinNs);
    segment->sleepers.fetch_add(1);
    bool changed;
    while (!(changed = segment->generation.load() != before)) {
        const int64_t left = began + timeout_ns - now();
        if (left <= 0) break;
        const timespec timeout = as_timespec(left);
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

int fail_with_errno(const char* what, const char* path, int error) {
    return fail(QUIRE_COMMUNICATION_FAILED, "%s: cannot %s %s: %s", kJoin, what, path, strerror(error));
}

class File {
public:
    explicit File(int descriptor) : descriptor_(descriptor) {}
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() {
        if (descriptor_ >= 0) close(descriptor_);
    }
    int get() const { return descriptor_; }

private:
    const int descriptor_;
};

int map(const File& file, const QuireCommunicatorParams& p, Segment** segment) {
    const size_t bytes = static_cast<size_t>(Segment::bytes(p.world_size));
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory == MAP_FAILED) return fail_with_errno("map", p.path, errno);
    *segment = static_cast<Segment*>(memory);
    return QUIRE_OK;
}

// Rank 0's: the file, all of it allocated, as a page that the file system could not give later would be a SIGBUS.
int create_segment(const QuireCommunicatorParams& p, Segment** segment) {
    const File file(open(p.path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (file.get() < 0) return fail_with_errno("create", p.path, errno);
    int status = posix_fallocate(file.get(), 0, Segment::bytes(p.world_size));
    status = status == 0 ? map(file, p, segment) : fail_with_errno("allocate", p.path, status);
    if (status != QUIRE_OK) {
        unlink(p.path);
        return status;
    }
    Segment* const made = new (*segment) Segment{};  // zeros, as the file is
    made->aborter.store(-1);
    made->missed.store(-1);
    made->ready.store(kReady, std::memory_order_release);
    return QUIRE_OK;
}

// The others': wait for rank 0's file.
int open_segment(const QuireCommunicatorParams& p, Segment** segment) {
    const int64_t deadline = now() + p.join_timeout_ns;
    for (;;) {
        const File file(open(p.path, O_RDWR | O_CLOEXEC));
        if (file.get() < 0 && errno != ENOENT) return fail_with_errno("open", p.path, errno);
        struct stat status;
        if (file.get() >= 0 && fstat(file.get(), &status) == 0 && status.st_size == Segment::bytes(p.world_size)) {
            if (*segment == nullptr) QUIRE_CHECK(map(file, p, segment));
            if ((*segment)->ready.load(std::memory_order_acquire) == kReady) return QUIRE_OK;
        }
        if (now() >= deadline) {
            unlink(p.path);  // begun by a rank 0 that has died
            return fail(QUIRE_COMMUNICATION_FAILED, "%s: rank 0 has not made %s in %.3g s", kJoin, p.path,
                        static_cast<double>(p.join_timeout_ns) * 1e-9);
        }
        const timespec rest = as_timespec(kPollNs);
        nanosleep(&rest, nullptr);
    }
}

int check_params(const QuireCommunicatorParams& p) {
    QUIRE_CHECK(check_not_null(kJoin, "path", p.path));
    QUIRE_CHECK(check_range(kJoin, "world_size", p.world_size, 2, kMostRanks));
    QUIRE_CHECK(check_range(kJoin, "rank", p.rank, 0, p.world_size - 1));
    QUIRE_CHECK(check_range(kJoin, "timeout_ns", p.timeout_ns, 1, INT64_MAX / 4));
    return check_range(kJoin, "join_timeout_ns", p.join_timeout_ns, 1, INT64_MAX / 4);
}

void unmap(Segment* segment, int world_size) {
    if (segment != nullptr) munmap(segment, static_cast<size_t>(Segment::bytes(world_size)));
}

}  // namespace

}  // namespace quire

using namespace quire;

QuireCommunicator::QuireCommunicator(const QuireCommunicatorParams& params, Segment* segment)
    : segment_(segment), rank_(params.rank), world_size_(params.world_size), timeout_ns_(params.timeout_ns) {}

QuireCommunicator::~QuireCommunicator() { unmap(segment_, world_size_); }

float* QuireCommunicator::slot(int rank) const {
    return segment_->slots() + (static_cast<int64_t>(meetings_ % 2) * world_size_ + rank) * kSlotFloats;
}

int QuireCommunicator::wait_for_all_to_join(int64_t timeout_ns) { return meet(Operation::kJoin, 0, timeout_ns); }

int QuireCommunicator::meet(Operation operation, int64_t size, int64_t timeout_ns) {
    const uint32_t before = meetings_ & ~kAborted, after = (meetings_ + 1) & ~kAborted;
    Segment::Rank& self = segment_->ranks[rank_];
    self.operation[meetings_ % 2].store(packed(static_cast<uint32_t>(operation), size), std::memory_order_relaxed);
    self.meetings.store(after, std::memory_order_relaxed);
    if (segment_->arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(world_size_)) {
        segment_->arrivals.store(0, std::memory_order_relaxed);
        uint32_t expected = before;
        if (!segment_->generation.compare_exchange_strong(expected, after)) return aborted(operation);
        wake_all(segment_);
    } else if (!wait_for_change(segment_, before, timeout_ns)) {
        return give_up(operation, timeout_ns);
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

int QuireCommunicator::give_up(Operation operation, int64_t timeout_ns) {
    const uint32_t meeting = (meetings_ + 1) & ~kAborted;
    int missing = -1;
    for (int other = 0; other < world_size_ && missing < 0; ++other) {
        if (segment_->ranks[other].meetings.load(std::memory_order_relaxed) != meeting) missing = other;
    }
    int32_t nobody = -1;
    if (segment_->aborter.compare_exchange_strong(nobody, rank_)) segment_->missed.store(missing);
    abort();
    return fail(QUIRE_COMMUNICATION_FAILED, "rank %d has not come to %s %u within %.3g s of rank %d", missing,
                name_of(packed(static_cast<uint32_t>(operation), 0)), meeting, static_cast<double>(timeout_ns) * 1e-9,
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
        QUIRE_CHECK(meet(Operation::kAllReduce, count - begin, timeout_ns_));
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
        QUIRE_CHECK(meet(Operation::kGather, most - begin, timeout_ns_));
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
        unmap(segment, params->world_size);
        return status;
    }
    std::unique_ptr<QuireCommunicator> joined(new (std::nothrow) QuireCommunicator(*params, segment));
    if (joined == nullptr) {
        unmap(segment, params->world_size);
        status = fail(QUIRE_OUT_OF_MEMORY, "%s: no memory", kJoin);
    } else {
        status = joined->wait_for_all_to_join(params->join_timeout_ns);
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
