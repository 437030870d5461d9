// What this machine can sustain: memory read bandwidth, and dot-product rates from registers. Benchmarks compare the
// kernels with these. They do not depend on the instruction set chosen for the kernels: a ceiling is the machine's own.
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>

#include "error.h"
#include "thread_pool.h"

namespace quire {

namespace {

// The median counts: a virtual machine's processors run at half their pace whenever the other thread of their core works,
// and the kernels have no more of the best moments than these loops.
constexpr int kRepetitions = 9;
constexpr int64_t kChunk = 1 << 20;
constexpr int64_t kHugePage = 1 << 21;

// A loop of `iterations` rounds over independent accumulators, and how many multiplications and additions a round has.
struct DotLoop {
    void (*run)(int64_t iterations, void* sink);
    int64_t operations;
};

constexpr int64_t kIterations = 1 << 16;
constexpr int64_t kItemsPerThread = 12;

// What operands are made of: in float32 and bfloat16 a number of which sums stay normal (denormal ones are slow).
constexpr int kByte = 0x3f;

// Keeps what was computed alive, and the compiler from computing less.
std::atomic<uint64_t> keep_alive{0};

template <typename Body>
double median_seconds(const Body& body) {
    double seconds[kRepetitions];
    body();  // wakes the helpers and the clock
    for (double& each : seconds) {
        const auto began = std::chrono::steady_clock::now();
        body();
        each = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    }
    std::nth_element(seconds, seconds + kRepetitions / 2, seconds + kRepetitions);
    return seconds[kRepetitions / 2];
}

uint64_t read_plain(const char* data, int64_t bytes) {
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < bytes; i += 64) {
        uint64_t words[8];
        memcpy(words, data + i, sizeof words);
        for (int j = 0; j < 8; ++j) sums[j] += words[j];
    }
    uint64_t total = 0;
    for (uint64_t sum : sums) total += sum;
    return total;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, int64_t bytes) {
    __m256i sums[4] = {};
    for (int64_t i = 0; i < bytes; i += 128) {
        // Beyond the page, where the hardware's own prefetchers stop.
        _mm_prefetch(data + i + 2048, _MM_HINT_T0);
        _mm_prefetch(data + i + 2112, _MM_HINT_T0);
        for (int j = 0; j < 4; ++j) {
            const __m256i* vector = reinterpret_cast<const __m256i*>(data + i + 32 * j);
            sums[j] = _mm256_add_epi64(sums[j], _mm256_load_si256(vector));
        }
    }
    const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    return static_cast<uint64_t>(_mm256_extract_epi64(sum, 0)) + static_cast<uint64_t>(_mm256_extract_epi64(sum, 3));
}

typedef uint32_t UInt32x8 __attribute__((vector_size(32)));
typedef uint32_t UInt32x16 __attribute__((vector_size(64)));

// One loop: `c = ROUND(c)` on ten accumulators, each in a register of its own: enough to hide the latency. An operand
// passes through an empty asm before each, or the compiler would see that all ten compute the same.
#define QUIRE_DOT_LOOP(NAME, TARGET, VECTOR, ROUND)                                                            \
    __attribute__((target(TARGET))) void NAME(int64_t iterations, void* sink) {                                \
        VECTOR c0 = {}, c1 = {}, c2 = {}, c3 = {}, c4 = {}, c5 = {}, c6 = {}, c7 = {}, c8 = {}, c9 = {};        \
        VECTOR a, b;                                                                                           \
        memset(&a, kByte, sizeof a);                                                                           \
        memset(&b, kByte, sizeof b);                                                                           \
        for (int64_t i = 0; i < iterations; ++i) {                                                             \
            QUIRE_UPDATE(c0, ROUND) QUIRE_UPDATE(c1, ROUND) QUIRE_UPDATE(c2, ROUND) QUIRE_UPDATE(c3, ROUND)    \
            QUIRE_UPDATE(c4, ROUND) QUIRE_UPDATE(c5, ROUND) QUIRE_UPDATE(c6, ROUND) QUIRE_UPDATE(c7, ROUND)    \
            QUIRE_UPDATE(c8, ROUND) QUIRE_UPDATE(c9, ROUND)                                                    \
        }                                                                                                      \
        c0 = c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9;                                                  \
        memcpy(sink, &c0, sizeof c0);                                                                          \
    }
#define QUIRE_UPDATE(c, ROUND)      \
    __asm__ volatile("" : "+x"(a)); \
    c = ROUND(c);

#define QUIRE_FMA_AVX2(c) _mm256_fmadd_ps(a, b, c)
#define QUIRE_MADD_AVX2(c) c + (UInt32x8)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), (__m256i)b)
#define QUIRE_DPBUSD_AVX2(c) (UInt32x8)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b)
#define QUIRE_FMA_AVX512(c) _mm512_fmadd_ps(a, b, c)
#define QUIRE_DPBUSD_AVX512(c) (UInt32x16)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b)
#define QUIRE_DPBF16_AVX512(c) _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b)

QUIRE_DOT_LOOP(float32_avx2, "avx2,fma", __m256, QUIRE_FMA_AVX2)
QUIRE_DOT_LOOP(int8_avx2, "avx2", UInt32x8, QUIRE_MADD_AVX2)
QUIRE_DOT_LOOP(int8_avxvnni, "avx2,avxvnni", UInt32x8, QUIRE_DPBUSD_AVX2)
QUIRE_DOT_LOOP(float32_avx512, "avx512f", __m512, QUIRE_FMA_AVX512)
QUIRE_DOT_LOOP(int8_avx512, "avx512f,avx512vnni", UInt32x16, QUIRE_DPBUSD_AVX512)
QUIRE_DOT_LOOP(bfloat16_avx512, "avx512f,avx512bf16", __m512, QUIRE_DPBF16_AVX512)

// Operations of a round: ten accumulators, so many products each, a multiplication and an addition a product.
constexpr int64_t operations(int64_t products) { return 10 * products * 2; }

uint64_t (*reader())(const char*, int64_t) { return __builtin_cpu_supports("avx2") ? read_avx2 : read_plain; }

// The fastest loop that the machine has for the kind; its `run` is NULL if it has none.
DotLoop dot_loop(int32_t kind) {
    const bool avx512 = __builtin_cpu_supports("avx512f");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    switch (kind) {
        case QUIRE_RATE_FLOAT32:
            if (avx512) return {float32_avx512, operations(16)};
            return {avx2 ? float32_avx2 : nullptr, operations(8)};
        case QUIRE_RATE_BFLOAT16:
            return {avx512 && __builtin_cpu_supports("avx512bf16") ? bfloat16_avx512 : nullptr, operations(32)};
        default:
            if (avx512 && __builtin_cpu_supports("avx512vnni")) return {int8_avx512, operations(64)};
            if (avx2 && __builtin_cpu_supports("avxvnni")) return {int8_avxvnni, operations(32)};
            return {avx2 ? int8_avx2 : nullptr, operations(32)};
    }
}

#else

uint64_t (*reader())(const char*, int64_t) { return read_plain; }

DotLoop dot_loop(int32_t) { return {nullptr, 0}; }

#endif

}  // namespace

}  // namespace quire

using namespace quire;

int quire_cpu_measure_bandwidth(int64_t bytes, int32_t num_threads, double* bytes_per_s) {
    const char* op = "cpu_measure_bandwidth";
    QUIRE_CHECK(check_execution(op, nullptr, num_threads));
    QUIRE_CHECK(check_range(op, "bytes", bytes, kChunk, int64_t{1} << 40));
    QUIRE_CHECK(check_not_null(op, "bytes_per_s", bytes_per_s));
    const int64_t num_chunks = bytes / kChunk;
    const int64_t whole = (num_chunks * kChunk + kHugePage - 1) / kHugePage * kHugePage;
    char* data = static_cast<char*>(aligned_alloc(kHugePage, static_cast<size_t>(whole)));
    if (data == nullptr) {
        return fail(QUIRE_OUT_OF_MEMORY, "%s: no memory for bytes=%lld", op, static_cast<long long>(bytes));
    }
#if defined(__linux__)
    madvise(data, static_cast<size_t>(whole), MADV_HUGEPAGE);  // as fast without, but for the walks of page tables
#endif
    memset(data, 1, static_cast<size_t>(whole));
    uint64_t (*read)(const char*, int64_t) = reader();
    const double seconds = median_seconds([&] {
        parallel_for(num_threads, num_chunks, [&](int64_t chunk) {
            keep_alive.fetch_add(read(data + chunk * kChunk, kChunk), std::memory_order_relaxed);
        });
    });
    free(data);
    *bytes_per_s = static_cast<double>(num_chunks * kChunk) / seconds;
    return QUIRE_OK;
}

int quire_cpu_measure_rate(int32_t kind, int32_t num_threads, double* operations_per_s) {
    const char* op = "cpu_measure_rate";
    QUIRE_CHECK(check_execution(op, nullptr, num_threads));
    QUIRE_CHECK(check_range(op, "kind", kind, QUIRE_RATE_FLOAT32, QUIRE_RATE_INT8));
    QUIRE_CHECK(check_not_null(op, "operations_per_s", operations_per_s));
    const DotLoop loop = dot_loop(kind);
    if (loop.run == nullptr) {
        return fail(QUIRE_UNSUPPORTED, "%s: kind=%d: this machine has no such vector instruction", op, kind);
    }
    const int64_t num_items = kItemsPerThread * num_threads;
    const double seconds = median_seconds([&] {
        parallel_for(num_threads, num_items, [&](int64_t) {
            uint64_t sink[8] = {};
            loop.run(kIterations, sink);
            keep_alive.fetch_add(sink[0], std::memory_order_relaxed);
        });
    });
    *operations_per_s = static_cast<double>(num_items * kIterations * loop.operations) / seconds;
    return QUIRE_OK;
}
