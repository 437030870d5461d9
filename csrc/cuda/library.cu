// The library's identity and its error text.
#include <cstdarg>
#include <cstdio>

#include "host.h"

namespace quire {
namespace {

thread_local char last_error[512] = "";

}  // namespace

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

int check_cuda(cudaError_t error, const char* operation) {
    if (error == cudaSuccess) return QUIRE_OK;
    return fail(QUIRE_DEVICE_ERROR, "%s: %s (%s)", operation, cudaGetErrorString(error), cudaGetErrorName(error));
}

int check_launch(const char* operation) { return check_cuda(cudaGetLastError(), operation); }

const char* dtype_name(int dtype) {
    switch (dtype) {
        case QUIRE_FLOAT32: return "float32";
        case QUIRE_BFLOAT16: return "bfloat16";
        case QUIRE_FLOAT16: return "float16";
        default: return "no QuireDType";
    }
}

}  // namespace quire

int32_t quire_abi_version(void) { return QUIRE_ABI_VERSION; }

const char* quire_backend_name(void) { return "cuda"; }

const char* quire_last_error(void) { return quire::last_error; }
