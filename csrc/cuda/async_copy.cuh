// Global to shared memory past the registers, 16 bytes at a time (sm_80 and later).
#pragma once

#include <cuda_runtime.h>

namespace quire {

// Copies 16 bytes, or writes 16 zero bytes and reads nothing where `valid` is false. Both addresses are 16-byte aligned.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid ? 16 : 0));
}

// Ends a group: the copies that this thread has asked for since the last group.
__device__ __forceinline__ void commit_async_group() { asm volatile("cp.async.commit_group;"); }

// Waits until at most `kPending` of this thread's youngest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_async_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

}  // namespace quire
