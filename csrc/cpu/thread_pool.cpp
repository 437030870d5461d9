// One word, `state_`, says what helpers may do: its generation, how many may still join the job (tickets), and how many
// are in it (active). A helper joins by trading a ticket for an active mark in one compare-and-swap; the caller closes
// the job by taking the tickets back and then waits for the active ones only, never for one that has not woken.
//
// Helpers spin for kSpin after their last job, because a model's operations follow each other in microseconds, then
// sleep on a condition variable.
//
// A core that another process keeps busy is a helper's for one scheduler slice of some milliseconds, and then the other's
// for as long, while the caller waits for the item that the helper holds. So once helpers have lost a third of the time for a
// while, they are only called for less than a slice at a time and then left asleep (Turns): they wake to a fresh slice, and
// are not cut off in it. A server's other processes take a core for a millisecond or two a step, which is not that.
#include "thread_pool.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace quire {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kSpin{100};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

constexpr uint64_t kActive = 1;
constexpr uint64_t kTicket = uint64_t{1} << 16;
constexpr uint64_t kGeneration = uint64_t{1} << 32;

// How long a thread did not run although it wanted to: another process had its core. A long item that kept its core lost
// nothing, however long it was.
class LostTime {
public:
    // Count from now: the thread has slept.
    void restart() {
        wall_ = Clock::now();
        running_ = running();
    }

    // What the job begun at `began` and those before it have lost since this was last looked at. The clock of a thread's own
    // time is a slow one, so jobs too short to have lost much do not look; nothing then.
    Clock::duration count(Clock::time_point began) {
        if (Clock::now() - began < kMuch) return {};
        const Clock::time_point wall = wall_;
        const Clock::duration running = running_;
        restart();
        const Clock::duration lost = (wall_ - wall) - (running_ - running);
        return lost > kMuch ? lost : Clock::duration{};
    }

private:
    static constexpr std::chrono::microseconds kMuch{500};

    static Clock::duration running() {
        timespec time{};
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
        return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
    }

    Clock::time_point wall_{};
    Clock::duration running_{};
};

// When helpers may be called.
class Turns {
public:
    bool helpers_may_work(Clock::time_point now) const {
        return now >= contended_until_ || (now - contended_since_) % (kWork + kRest) >= kRest;
    }

    // A helper lost this time to another process, and the caller has waited for it.
    void cut_off(Clock::time_point now, Clock::duration lost) {
        // What is lost now and then runs off; what a rival takes, half of a core, does not.
        if (now > running_off_) {
            lost_ = std::max(lost_ - (now - running_off_) / 3, Clock::duration{});
            running_off_ = now;
        }
        lost_ += lost;
        if (lost_ < kRival) return;
        lost_ = kRival;  // and as much when it is looked for again
        if (now >= contended_until_) contended_since_ = now;
        running_off_ = contended_until_ = now + kContended;
    }

private:
    static constexpr std::chrono::microseconds kWork{1500};
    static constexpr std::chrono::microseconds kRest{2500};
    static constexpr std::chrono::milliseconds kContended{100};
    static constexpr std::chrono::milliseconds kRival{7};

    Clock::duration lost_{};
    Clock::time_point running_off_{}, contended_since_{}, contended_until_{};
};

int tickets_of(uint64_t state) { return static_cast<int>((state >> 16) & 0xffff); }
int active_of(uint64_t state) { return static_cast<int>(state & 0xffff); }

class ThreadPool {
public:
    // False if another thread's job is in flight, or it is not the helpers' turn; nothing was run then.
    bool try_run(int num_helpers, int64_t num_items, void (*body)(const void*, int64_t), const void* context) {
        std::unique_lock<std::mutex> lock(run_mutex_, std::try_to_lock);
        if (!lock.owns_lock()) return false;
        if (!turns_.helpers_may_work(Clock::now())) return false;
        num_helpers = start_helpers(num_helpers);
        body_ = body;
        context_ = context;
        num_items_ = num_items;
        next_item_.store(0, std::memory_order_relaxed);
        generation_ += kGeneration;
        state_.store(generation_ | static_cast<uint64_t>(num_helpers) * kTicket);
        // Either a helper counted in sleepers_ is seen here, or it sees the new state before it sleeps.
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
            wake_.notify_all();
        }
        work();
        close();
        return true;
    }

private:
    void work() {
        for (;;) {
            const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
            if (item >= num_items_) return;
            body_(context_, item);
        }
    }

    void close() {
        state_.fetch_and(~(0xffff * kTicket));
        for (int spins = 0; spins < 1000; ++spins) {
            if (active_of(state_.load(std::memory_order_acquire)) == 0) return;
            pause();
        }
        // A helper's item is a long one, or it was cut off in the middle of it. To yield would be to give up the slice, and
        // since Linux 6.18 the right to it too.
        {
            std::unique_lock<std::mutex> lock(close_mutex_);
            closing_.store(true);
            while (active_of(state_.load()) > 0) closed_.wait(lock);
            closing_.store(false, std::memory_order_relaxed);
        }
        const Clock::duration lost{lost_.exchange(0, std::memory_order_relaxed)};
        if (lost > Clock::duration{}) turns_.cut_off(Clock::now(), lost);
    }

    // Helpers that there are, at most `wanted`; called under run_mutex_.
    int start_helpers(int wanted) {
        try {
            for (; num_helpers_ < wanted; ++num_helpers_) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: the work is done by fewer.
        }
        return wanted < num_helpers_ ? wanted : num_helpers_;
    }

    void help() {
        LostTime lost;
        for (;;) {
            uint64_t state = wait_for_ticket(&lost);
            if (!state_.compare_exchange_strong(state, state - kTicket + kActive)) continue;
            const Clock::time_point began = Clock::now();
            work();
            const Clock::duration cut_off = lost.count(began);
            if (cut_off > Clock::duration{}) lost_.store(cut_off.count(), std::memory_order_relaxed);
            // Either the caller is seen here to wait, or it sees that nobody is active before it does.
            if (active_of(state_.fetch_sub(kActive)) == 1 && closing_.load()) {
                std::lock_guard<std::mutex> lock(close_mutex_);
                closed_.notify_one();
            }
        }
    }

    uint64_t wait_for_ticket(LostTime* lost) {
        const Clock::time_point deadline = Clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; ++i) {
                const uint64_t state = state_.load();
                if (tickets_of(state) > 0) return state;
                pause();
            }
        } while (Clock::now() < deadline);

        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        uint64_t state = state_.load();
        for (; tickets_of(state) == 0; state = state_.load()) wake_.wait(lock);
        sleepers_.fetch_sub(1);
        lost->restart();
        return state;
    }

    std::mutex run_mutex_;  // held by the thread whose job is in flight
    int num_helpers_ = 0;
    uint64_t generation_ = 0;
    Turns turns_;

    // The job. Written before state_ gives out tickets, read by those who took one.
    void (*body_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
    int64_t num_items_ = 0;
    alignas(64) std::atomic<int64_t> next_item_{0};
    alignas(64) std::atomic<uint64_t> state_{0};

    std::atomic<Clock::rep> lost_{0};  // by a helper, in the job in flight and those before it

    std::atomic<bool> closing_{false};  // the caller sleeps until no helper is active
    std::mutex close_mutex_;
    std::condition_variable closed_;

    std::atomic<int> sleepers_{0};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
};

// Never destroyed: helpers may still look at it while the process exits. A forked child has none of the helpers, and
// perhaps locked mutexes, so it drops the pool and makes another.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool* the_pool() {
    ThreadPool* current = pool.load(std::memory_order_acquire);
    if (current != nullptr) return current;
    static std::once_flag at_fork;
    std::call_once(at_fork, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
    ThreadPool* fresh = new (std::nothrow) ThreadPool;
    if (fresh == nullptr || pool.compare_exchange_strong(current, fresh)) return fresh;
    delete fresh;
    return current;
}

struct Scratch {
    float* memory = nullptr;
    int64_t capacity = 0;

    ~Scratch() { free(memory); }
};

}  // namespace

void parallel_for(int num_threads, int64_t num_items, void (*body)(const void*, int64_t), const void* context) {
    const int64_t helpers = (num_threads < num_items ? num_threads : num_items) - 1;
    if (helpers > 0) {
        ThreadPool* const threads = the_pool();
        if (threads != nullptr && threads->try_run(static_cast<int>(helpers), num_items, body, context)) return;
    }
    for (int64_t item = 0; item < num_items; ++item) body(context, item);
}

float* thread_scratch(int use, int64_t count) {
    thread_local Scratch scratch[2];
    Scratch& own = scratch[use];
    if (own.capacity < count) {
        free(own.memory);
        const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
        own.memory = static_cast<float*>(aligned_alloc(64, bytes));
        own.capacity = own.memory == nullptr ? 0 : count;
    }
    return own.memory;
}

}  // namespace quire
