#include "isa.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "error.h"

namespace quire {

namespace {

struct Choice {
    const Kernels* kernels;
    const DecoderKernels* decoder_kernels;
    bool available;
};

#if defined(__x86_64__)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#if defined(QUIRE_EMULATE_AVX512)
// What emulates them was compiled for AVX2.
bool has_avx512() { return has_avx2(); }
bool has_avx512_bf16() { return has_avx2(); }
#elif defined(QUIRE_AVX512)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first.
const Choice* choices() {
    static const Choice all[] = {
#if defined(QUIRE_AVX512)
        {&avx512_bf16::kernels, &avx512_bf16::decoder_kernels, has_avx512_bf16()},
        {&avx512::kernels, &avx512::decoder_kernels, has_avx512()},
#endif
        {&avx2::kernels, &avx2::decoder_kernels, has_avx2()},
        {&scalar::kernels, &scalar::decoder_kernels, true},
        {nullptr, nullptr, false},
    };
    return all;
}
#else
const Choice* choices() {
    static const Choice all[] = {{&scalar::kernels, &scalar::decoder_kernels, true}, {nullptr, nullptr, false}};
    return all;
}
#endif

const Choice* best() {
    const Choice* choice = choices();
    while (!choice->available) ++choice;
    return choice;
}

int find(const char* name, const Choice** found) {
    for (const Choice* choice = choices(); choice->kernels != nullptr; ++choice) {
        if (strcmp(choice->kernels->isa, name) != 0) continue;
        if (!choice->available) return fail(QUIRE_UNSUPPORTED, "this machine does not have %s", name);
        *found = choice;
        return QUIRE_OK;
    }
#if !defined(QUIRE_AVX512)
    if (strncmp(name, "avx512", 6) == 0) return fail(QUIRE_UNSUPPORTED, "this library was built without %s", name);
#endif
    return fail(QUIRE_INVALID_ARGUMENT, "instruction set \"%s\" is none of scalar, avx2, avx512, avx512_bf16", name);
}

std::atomic<const Choice*> active{nullptr};

}  // namespace

int check_isa() {
    if (active.load(std::memory_order_acquire) != nullptr) return QUIRE_OK;
    const Choice* chosen = nullptr;
    const char* wish = getenv("QUIRE_CPU_ISA");
    if (wish == nullptr || *wish == '\0') {
        chosen = best();
    } else {
        QUIRE_CHECK(find(wish, &chosen));
    }
    active.store(chosen, std::memory_order_release);
    return QUIRE_OK;
}

const Kernels& active_kernels() { return *active.load(std::memory_order_acquire)->kernels; }
const DecoderKernels& active_decoder_kernels() { return *active.load(std::memory_order_acquire)->decoder_kernels; }

}  // namespace quire

const char* quire_cpu_isa(void) { return quire::check_isa() == QUIRE_OK ? quire::active_kernels().isa : ""; }

int quire_cpu_set_isa(const char* name) {
    if (name == nullptr) return quire::fail(QUIRE_INVALID_ARGUMENT, "quire_cpu_set_isa: name is NULL");
    const quire::Choice* chosen = nullptr;
    QUIRE_CHECK(quire::find(name, &chosen));
    quire::active.store(chosen, std::memory_order_release);
    return QUIRE_OK;
}
