#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#include <initializer_list>

namespace quire {

namespace {

thread_local char last_error[512];

constexpr int kMaxThreads = 1024;
constexpr int kMaxBlockSize = 256;

}  // namespace

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

int check_header(const char* operation, uint32_t size, uint32_t abi_version, size_t expected_size) {
    if (abi_version != QUIRE_ABI_VERSION) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: params are of ABI version %u, the library of %d", operation, abi_version,
                    QUIRE_ABI_VERSION);
    }
    if (size != expected_size) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: params have %u bytes, the library expects %zu", operation, size,
                    expected_size);
    }
    return QUIRE_OK;
}

int check_execution(const char* operation, const void* stream, int32_t num_threads) {
    if (stream != nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: stream must be NULL on the CPU", operation);
    return check_range(operation, "num_threads", num_threads, 1, kMaxThreads);
}

int check_dtype(const char* operation, const char* field, int32_t dtype) {
    if (dtype == QUIRE_FLOAT32 || dtype == QUIRE_BFLOAT16) return QUIRE_OK;
    if (dtype == QUIRE_FLOAT16) {
        return fail(QUIRE_UNSUPPORTED, "%s: %s is float16, which the CPU kernels do not have; use float32 or bfloat16",
                    operation, field);
    }
    return fail(QUIRE_INVALID_ARGUMENT, "%s: %s=%d is no QuireDType", operation, field, dtype);
}

int check_not_null(const char* operation, const char* field, const void* pointer) {
    return pointer != nullptr ? QUIRE_OK : fail(QUIRE_INVALID_ARGUMENT, "%s: %s is NULL", operation, field);
}

int check_range(const char* operation, const char* field, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return QUIRE_OK;
    return fail(QUIRE_INVALID_ARGUMENT, "%s: %s=%lld must be from %lld to %lld", operation, field,
                static_cast<long long>(value), static_cast<long long>(low), static_cast<long long>(high));
}

int check_cache(const char* operation, const QuireCacheView& key_cache, const QuireCacheView& value_cache,
                int32_t num_blocks, int32_t block_size) {
    QUIRE_CHECK(check_not_null(operation, "key_cache", key_cache.data));
    QUIRE_CHECK(check_not_null(operation, "value_cache", value_cache.data));
    QUIRE_CHECK(check_range(operation, "num_blocks", num_blocks, 1, INT32_MAX));
    QUIRE_CHECK(check_range(operation, "block_size", block_size, 1, kMaxBlockSize));
    if ((block_size & (block_size - 1)) != 0) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: block_size=%d is no power of two", operation, block_size);
    }
    for (const QuireCacheView* view : {&key_cache, &value_cache}) {
        const char* field = view == &key_cache ? "stride of key_cache" : "stride of value_cache";
        QUIRE_CHECK(check_range(operation, field, view->block_stride, 0, INT64_MAX));
        QUIRE_CHECK(check_range(operation, field, view->head_stride, 0, INT64_MAX));
        QUIRE_CHECK(check_range(operation, field, view->slot_stride, 0, INT64_MAX));
    }
    return QUIRE_OK;
}

}  // namespace quire

const char* quire_last_error(void) { return quire::last_error; }
