// What every launch wrapper shares: this thread's last error, and the checks before a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "quire.h"

namespace quire {

// Keeps the printf-style message for quire_last_error() and returns `status`.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

// QUIRE_OK if the last launch was accepted, otherwise QUIRE_DEVICE_ERROR with the runtime's words.
int check_launch(const char* operation);

// QUIRE_OK, or QUIRE_DEVICE_ERROR for a runtime call that failed.
int check_cuda(cudaError_t error, const char* operation);

const char* dtype_name(int dtype);

inline int64_t dtype_bytes(int dtype) { return dtype == QUIRE_FLOAT32 ? 4 : 2; }

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline bool is_power_of_two(int32_t value) { return value > 0 && (value & (value - 1)) == 0; }

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// A struct of the expected size and version, with num_threads 0 as the ABI wants it on CUDA.
template <typename Params>
int check_params(const Params* params, const char* operation) {
    if (params == nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: params is null", operation);
    if (params->size != sizeof(Params) || params->abi_version != QUIRE_ABI_VERSION) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: params has size %u and ABI version %u, expected %zu and %d", operation,
                    params->size, params->abi_version, sizeof(Params), QUIRE_ABI_VERSION);
    }
    if (params->num_threads != 0) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: num_threads=%d must be 0 on CUDA", operation, params->num_threads);
    }
    return QUIRE_OK;
}

// What `check_params` cannot see: one line per condition, so that a wrapper reads as its list of demands.
#define QUIRE_REQUIRE(condition, ...)                                                  \
    do {                                                                               \
        if (!(condition)) return ::quire::fail(QUIRE_INVALID_ARGUMENT, __VA_ARGS__);   \
    } while (0)

#define QUIRE_REQUIRE_DTYPE(operation, field, value)                                                                  \
    QUIRE_REQUIRE((value) >= QUIRE_FLOAT32 && (value) <= QUIRE_FLOAT16, "%s: %s=%d is no QuireDType", operation, field, \
                  static_cast<int>(value))

}  // namespace quire
