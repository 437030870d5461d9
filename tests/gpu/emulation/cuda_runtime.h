// Enough of CUDA's language and runtime to run csrc/cuda on a CPU, for machines without a GPU.
//
// One CTA runs at a time. Its threads are fibers of one host thread, which change places only where the kernel
// synchronises, so every run is the same; one warp runs as far ahead of the others as the kernel's barriers let it.
// Dynamic shared memory starts as NaN. An asynchronous copy lands at once, or, with QUIRE_EMULATED_COPIES=late, as late
// as its wait allows: a kernel that reads too early, or overwrites what a neighbour still reads, gives wrong numbers in
// one of the two.
#pragma once

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

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedLimit = 99 * 1024;  // what sm_86 and sm_89 allow
constexpr size_t kSharedByDefault = 48 * 1024;

struct Copy { void* to; const void* from; bool valid; };

struct Barrier {
    int waiting = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    dim3 thread;
    std::vector<Copy> open;                  // copies of the group that is not committed yet
    std::vector<std::vector<Copy>> groups;   // committed, not landed
};

struct Cta {
    ucontext_t scheduler;
    std::vector<std::unique_ptr<Fiber>> fibers;
    Fiber* running = nullptr;
    int running_index = 0;
    size_t progress = 0;  // barriers that opened and threads that ended
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> exchange;  // one slot a thread, for shuffles
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

template <typename T>
T exchange(T value, int source_lane) {
    static_assert(sizeof(T) <= 8);
    Cta& c = *cta;
    const int index = c.running_index, warp = index / kWarp;
    std::memcpy(&c.exchange[index], &value, sizeof(T));
    wait_at(c.warps[warp], kWarp);
    T result;
    std::memcpy(&result, &c.exchange[warp * kWarp + source_lane], sizeof(T));
    wait_at(c.warps[warp], kWarp);
    return result;
}

}  // namespace emulation

#define threadIdx (::emulation::cta->running->thread)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_dim)
#define gridDim (::emulation::grid_dim)

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
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::exchange(value, emulation::cta->running_index % emulation::kWarp ^ mask);
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    if (static_cast<size_t>(bytes) > emulation::kSharedLimit) return cudaErrorInvalidConfiguration;
    emulation::shared_allowed = std::max(emulation::shared_allowed, static_cast<size_t>(bytes));
    return cudaSuccess;
}
