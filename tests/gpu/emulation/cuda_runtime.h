// Enough of CUDA's language and runtime to run csrc/cuda on a CPU, for machines without a GPU.
//
// One CTA runs at a time. Its threads are fibers of one host thread, which change places only where the kernel
// synchronises, so every run is the same; one warp runs as far ahead of the others as the kernel's barriers let it.
// Dynamic shared memory starts as NaN. The device has QUIRE_EMULATED_PROCESSORS multiprocessors (4) of 2 CTAs each. An asynchronous copy lands at once, or, with QUIRE_EMULATED_COPIES=late, as late
// as its wait allows: a kernel that reads too early, or overwrites what a neighbour still reads, gives wrong numbers in
// one of the two.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kExchange = 8;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedLimit = 99 * 1024;  // what sm_86 and sm_89 allow
constexpr size_t kSharedByDefault = 48 * 1024;

struct Copy { void* to; const void* from; bool valid; };

struct Barrier {
    int waiting = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;  // only to start: from then on the fiber resumes where it jumped away from
    jmp_buf place;
    std::vector<char> stack;
    bool started = false, done = false;
    bool odd_exchange = false;
    dim3 thread;
    std::vector<Copy> open;                  // copies of the group that is not committed yet
    std::vector<std::vector<Copy>> groups;   // committed, not landed
};

struct Cta {
    jmp_buf scheduler;
    std::vector<std::unique_ptr<Fiber>> fibers;
    Fiber* running = nullptr;
    int running_index = 0;
    size_t progress = 0;  // barriers that opened and threads that ended
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> exchange;  // kExchange words a thread, for what a warp does together
    std::function<void()> body;
};

extern Cta* cta;
extern dim3 block_index, block_dim, grid_dim;
extern std::vector<unsigned char> shared_memory;
extern size_t shared_allowed;
extern cudaError_t last_error;

// The CTA's dynamic shared memory, 16-byte aligned.
inline unsigned char* aligned_shared() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 15) / 16 * 16);
}

void wait_at(Barrier& barrier, int count);
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
void copy_async(void* to, const void* from, bool valid);
void commit();
void wait_groups(size_t pending);

// What a warp does together: each lane brings a `Lane`; the last to come runs `body` over all 32. Returns this lane's,
// which the next such call overwrites.
template <typename Lane, typename Body>
Lane& warp_together(const Lane& mine, Body body) {
    static_assert(sizeof(Lane) <= kExchange * sizeof(uint64_t));
    Cta& c = *cta;
    const int warp = c.running_index / kWarp;
    // The lanes wait once, so two exchanges take turns: one may be written while the other is still read.
    bool& odd = c.running->odd_exchange;
    uint64_t* const words = c.exchange.data() + ((odd ? c.fibers.size() : 0) + warp * kWarp) * kExchange;
    odd = !odd;
    Lane* const lanes = reinterpret_cast<Lane*>(words);
    new (&lanes[c.running_index % kWarp]) Lane(mine);
    Barrier& barrier = c.warps[warp];
    if (barrier.waiting == kWarp - 1) body(lanes);
    wait_at(barrier, kWarp);
    return lanes[c.running_index % kWarp];
}

template <typename T>
T exchange(T value, int source_lane) {
    T* const lanes = &warp_together(value, [](T*) {}) - cta->running_index % kWarp;
    return lanes[source_lane];
}

}  // namespace emulation

#define threadIdx (::emulation::cta->running->thread)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_dim)
#define gridDim (::emulation::grid_dim)

// The emulation is compiled without contraction: each operation rounds by itself.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

inline void __syncthreads() {
    auto& c = *emulation::cta;
    emulation::wait_at(c.all, static_cast<int>(c.fibers.size()));
}
inline void __syncwarp() {
    auto& c = *emulation::cta;
    emulation::wait_at(c.warps[c.running_index / emulation::kWarp], emulation::kWarp);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return emulation::exchange(value, lane); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int offset) {
    const int lane = emulation::cta->running_index % emulation::kWarp;
    return emulation::exchange(value, lane < offset ? lane : lane - offset);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
    const int lane = emulation::cta->running_index % emulation::kWarp;
    const bool* const lanes = &emulation::warp_together(predicate, [](bool*) {}) - lane;
    unsigned votes = 0;
    for (int l = 0; l < emulation::kWarp; ++l) votes |= static_cast<unsigned>(lanes[l]) << l;
    return votes;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <typename T>
T atomicAdd(T* address, T value) { return std::exchange(*address, *address + value); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchange(value, emulation::cta->running_index % emulation::kWarp ^ mask);
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
// A device for each number of multiprocessors, since kernels remember what they asked of a device.
inline cudaError_t cudaGetDevice(int* device) {
    const char* processors = std::getenv("QUIRE_EMULATED_PROCESSORS");
    *device = processors != nullptr ? std::atoi(processors) : 4;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    *value = device;
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, Kernel, int, size_t) {
    *ctas = 2;
    return cudaSuccess;
}
enum cudaMemcpySrcAccessOrder { cudaMemcpySrcAccessOrderStream = 1 };
struct cudaMemcpyAttributes { cudaMemcpySrcAccessOrder srcAccessOrder; };
inline cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const size_t* sizes, size_t count,
                                        cudaMemcpyAttributes*, size_t*, size_t, cudaStream_t) {
    for (size_t i = 0; i < count; ++i) std::memcpy(to[i], from[i], sizes[i]);
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    if (static_cast<size_t>(bytes) > emulation::kSharedLimit) return cudaErrorInvalidConfiguration;
    emulation::shared_allowed = std::max(emulation::shared_allowed, static_cast<size_t>(bytes));
    return cudaSuccess;
}
