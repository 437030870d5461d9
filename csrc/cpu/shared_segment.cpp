// The file that the ranks of a communicator map: made by rank 0, waited for by the others.
#include "shared_segment.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <new>

#include "clock.h"
#include "error.h"

namespace quire {

namespace {

constexpr const char* kJoin = "communicator_join";
constexpr int64_t kPollNs = 2'000'000;  // between looks for rank 0's file
constexpr uint32_t kReady = 0x51554952;

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

}  // namespace

// All of it is allocated, as a page that the file system could not give later would be a SIGBUS.
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

int open_segment(const QuireCommunicatorParams& p, Segment** segment) {
    const WaitLimit limit{p.join_timeout_ns, p.cancelled};
    const int64_t deadline = now_ns() + limit.timeout_ns;
    for (;;) {
        const File file(open(p.path, O_RDWR | O_CLOEXEC));
        if (file.get() < 0 && errno != ENOENT) return fail_with_errno("open", p.path, errno);
        struct stat status;
        if (file.get() >= 0 && fstat(file.get(), &status) == 0 && status.st_size == Segment::bytes(p.world_size)) {
            if (*segment == nullptr) QUIRE_CHECK(map(file, p, segment));
            if ((*segment)->ready.load(std::memory_order_acquire) == kReady) return QUIRE_OK;
        }
        if (limit.is_cancelled()) {
            return fail(QUIRE_COMMUNICATION_FAILED, "%s was cancelled on rank %d", kJoin, p.rank);
        }
        if (now_ns() >= deadline) {
            unlink(p.path);  // begun by a rank 0 that has died
            return fail(QUIRE_COMMUNICATION_FAILED, "%s: rank 0 has not made %s in %.3g s", kJoin, p.path,
                        static_cast<double>(p.join_timeout_ns) * 1e-9);
        }
        const timespec rest = as_timespec(kPollNs);
        nanosleep(&rest, nullptr);
    }
}

void unmap_segment(Segment* segment, int world_size) {
    if (segment != nullptr) munmap(segment, static_cast<size_t>(Segment::bytes(world_size)));
}

}  // namespace quire
