// The last error of each thread, and the checks that all launches share.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "quire.h"

namespace quire {

// Record a message, as printf, for quire_last_error(); returns `status`.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Each check returns QUIRE_OK or records what is wrong.
int check_header(const char* operation, uint32_t size, uint32_t abi_version, size_t expected_size);
int check_execution(const char* operation, const void* stream, int32_t num_threads);
int check_dtype(const char* operation, const char* field, int32_t dtype);
int check_not_null(const char* operation, const char* field, const void* pointer);
int check_range(const char* operation, const char* field, int64_t value, int64_t low, int64_t high);
int check_cache(const char* operation, const QuireCacheView& key_cache, const QuireCacheView& value_cache,
                int32_t num_blocks, int32_t block_size);

// Leave the function with the first check that fails.
#define QUIRE_CHECK(check)                                      \
    do {                                                        \
        const int quire_status = (check);                       \
        if (quire_status != QUIRE_OK) return quire_status;      \
    } while (0)

// What every launch checks first: the struct, its header, the stream and the threads.
template <typename Params>
int check_call(const char* operation, const Params* params) {
    if (params == nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: params is NULL", operation);
    QUIRE_CHECK(check_header(operation, params->size, params->abi_version, sizeof(Params)));
    return check_execution(operation, params->stream, params->num_threads);
}

}  // namespace quire
