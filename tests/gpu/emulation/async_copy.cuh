// In place of csrc/cuda/async_copy.cuh, which is assembly.
#pragma once

#include <cuda_runtime.h>

namespace quire {

inline void copy_async_16(void* shared, const void* global, bool valid) { emulation::copy_async(shared, global, valid); }
inline void commit_async_group() { emulation::commit(); }

template <int kPending>
void wait_async_groups() {
    emulation::wait_groups(kPending);
}

}  // namespace quire
