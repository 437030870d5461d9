// Rotary embedding of query and key in place, and the step's key and value into their slots: one CTA for each token.
//
//   query row   [ first half | second half ] of each head: the pair (i, i + head_dim / 2) turns by the angle i
//   key row     likewise, then, as rounded to its type, to key_cache[block, head, offset]
//   value row   to value_cache[block, head, offset]
//
// Without a table of angles nothing turns, and key and value go to their slots as they are.
#include "host.h"
#include "numeric.cuh"

namespace quire {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Heads {
    T* data;
    int64_t token_stride, head_stride;
    int count;
};

template <typename T, typename Cache>
struct Arguments {
    Heads<T> query, key;
    Heads<const T> value;
    const float* cos_sin;
    const int64_t* positions;
    const int64_t* slot_mapping;
    Cache* key_cache;
    Cache* value_cache;
    QuireCacheView key_view, value_view;
    int half_dim, block_size;
};

// The element of `view` that starts the given slot of head 0.
__device__ __forceinline__ int64_t slot_offset(const QuireCacheView& view, int64_t slot, int block_size) {
    return slot / block_size * view.block_stride + slot % block_size * view.slot_stride;
}

// Turn one pair of a head.
template <typename T>
__device__ __forceinline__ void rotate_pair(T* head, int pair, const float* cos_sin, int half) {
    const float cos = cos_sin[pair], sin = cos_sin[pair + half];
    const float first = to_float(head[pair]), second = to_float(head[pair + half]);
    head[pair] = from_float<T>(first * cos - second * sin);
    head[pair + half] = from_float<T>(second * cos + first * sin);
}

template <typename T, typename Cache>
__global__ void __launch_bounds__(kThreads) rotate_and_cache_kernel(Arguments<T, Cache> args) {
    const int64_t token = blockIdx.x;
    const int half = args.half_dim;
    const int64_t slot = args.slot_mapping[token];
    const bool rotates = args.cos_sin != nullptr;
    const float* cos_sin = rotates ? args.cos_sin + args.positions[token] * (2 * half) : nullptr;

    if (rotates) {
        T* query = args.query.data + token * args.query.token_stride;
        for (int i = threadIdx.x; i < args.query.count * half; i += kThreads) {
            rotate_pair(query + i / half * args.query.head_stride, i % half, cos_sin, half);
        }
    }

    T* key = args.key.data + token * args.key.token_stride;
    const T* value = args.value.data + token * args.value.token_stride;
    const bool cached = slot >= 0;
    Cache* key_slot = args.key_cache + (cached ? slot_offset(args.key_view, slot, args.block_size) : 0);
    Cache* value_slot = args.value_cache + (cached ? slot_offset(args.value_view, slot, args.block_size) : 0);
    for (int i = threadIdx.x; i < args.key.count * half; i += kThreads) {
        const int64_t head = i / half;
        const int pair = i % half;
        T* k = key + head * args.key.head_stride;
        if (rotates) rotate_pair(k, pair, cos_sin, half);
        if (!cached) continue;
        Cache* k_out = key_slot + head * args.key_view.head_stride;
        k_out[pair] = from_float<Cache>(to_float(k[pair]));
        k_out[pair + half] = from_float<Cache>(to_float(k[pair + half]));
        const T* v = value + head * args.value.head_stride;
        Cache* v_out = value_slot + head * args.value_view.head_stride;
        v_out[pair] = from_float<Cache>(to_float(v[pair]));
        v_out[pair + half] = from_float<Cache>(to_float(v[pair + half]));
    }
}

template <typename T, typename Cache>
int launch(const QuireRotateAndCacheParams& p) {
    Arguments<T, Cache> args;
    args.query = {static_cast<T*>(p.query), p.query_token_stride, p.query_head_stride, p.num_heads};
    args.key = {static_cast<T*>(p.key), p.key_token_stride, p.key_head_stride, p.num_kv_heads};
    args.value = {static_cast<const T*>(p.value), p.value_token_stride, p.value_head_stride, p.num_kv_heads};
    args.cos_sin = p.cos_sin;
    args.positions = p.positions;
    args.slot_mapping = p.slot_mapping;
    args.key_cache = static_cast<Cache*>(p.key_cache.data);
    args.value_cache = static_cast<Cache*>(p.value_cache.data);
    args.key_view = p.key_cache;
    args.value_view = p.value_cache;
    args.half_dim = p.head_dim / 2;
    args.block_size = p.block_size;
    rotate_and_cache_kernel<T, Cache><<<p.num_tokens, kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(args);
    return check_launch("rotate_and_cache");
}

int check(const QuireRotateAndCacheParams& p) {
    constexpr const char* kName = "rotate_and_cache";
    QUIRE_REQUIRE_DTYPE(kName, "dtype", p.dtype);
    QUIRE_REQUIRE_DTYPE(kName, "cache_dtype", p.cache_dtype);
    QUIRE_REQUIRE(p.num_tokens >= 0 && p.num_heads >= 1 && p.num_kv_heads >= 1,
                  "rotate_and_cache: num_tokens=%d, num_heads=%d, num_kv_heads=%d must be at least 0, 1 and 1",
                  p.num_tokens, p.num_heads, p.num_kv_heads);
    QUIRE_REQUIRE(p.head_dim >= 2 && p.head_dim % 2 == 0, "rotate_and_cache: head_dim=%d must be even and positive",
                  p.head_dim);
    QUIRE_REQUIRE(is_power_of_two(p.block_size) && p.block_size <= 256,
                  "rotate_and_cache: block_size=%d must be a power of two from 1 to 256", p.block_size);
    const int min_positions = p.cos_sin == nullptr ? 0 : 1;
    QUIRE_REQUIRE(p.num_blocks >= 1 && p.max_positions >= min_positions,
                  "rotate_and_cache: num_blocks=%d and max_positions=%d must be at least 1 and %d", p.num_blocks,
                  p.max_positions, min_positions);
    if (p.num_tokens == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.query != nullptr && p.key != nullptr && p.value != nullptr && p.slot_mapping != nullptr,
                  "rotate_and_cache: query, key, value or slot_mapping is null");
    QUIRE_REQUIRE(p.max_positions == 0 || (p.cos_sin != nullptr && p.positions != nullptr),
                  "rotate_and_cache: cos_sin or positions is null, but max_positions=%d", p.max_positions);
    QUIRE_REQUIRE(p.key_cache.data != nullptr && p.value_cache.data != nullptr,
                  "rotate_and_cache: key_cache or value_cache is null");
    return QUIRE_OK;
}

}  // namespace
}  // namespace quire

int quire_rotate_and_cache(const QuireRotateAndCacheParams* params) {
    using namespace quire;
    if (int status = check_params(params, "rotate_and_cache")) return status;
    if (int status = check(*params)) return status;
    if (params->num_tokens == 0) return QUIRE_OK;
    return with_dtype(params->dtype, [&](auto activation) {
        return with_dtype(params->cache_dtype,
                          [&](auto cache) { return launch<decltype(activation), decltype(cache)>(*params); });
    });
}
