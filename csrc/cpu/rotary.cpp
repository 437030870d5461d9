// The rotary embedding of q and k in place (if there is a table), and k and v written to their slots of the KV cache.
//
// Half-split: dimension i is rotated with dimension i + head_dim / 2. A row of cos_sin is head_dim / 2 cosines, then the
// sines. The cache takes the rotated key as it is stored, rounded to the activations' type.
#include "kernels.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

template <typename T>
void rotate_head(T* x, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + Vec::kWidth <= half; i += Vec::kWidth) {
        const Vec first = Vec::load(x + i), second = Vec::load(x + half + i);
        const Vec c = Vec::load(cos + i), s = Vec::load(sin + i);
        (first * c - second * s).store(x + i);
        (second * c + first * s).store(x + half + i);
    }
    if (i < half) {
        const int64_t rest = half - i;
        const Vec first = load_partial(x + i, rest), second = load_partial(x + half + i, rest);
        const Vec c = load_partial(cos + i, rest), s = load_partial(sin + i, rest);
        store_partial(first * c - second * s, x + i, rest);
        store_partial(second * c + first * s, x + half + i, rest);
    }
}

// All heads of one token's query or key.
template <typename T>
void rotate_heads(T* heads, int num_heads, int64_t head_stride, const float* cos_sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int head = 0; head < num_heads; ++head) rotate_head(heads + head * head_stride, cos_sin, cos_sin + half, half);
}

template <typename T, typename Cache>
void copy_row(const T* from, Cache* to, int64_t dim) {
    int64_t i = 0;
    for (; i + Vec::kWidth <= dim; i += Vec::kWidth) Vec::load(from + i).store(to + i);
    if (i < dim) store_partial(load_partial(from + i, dim - i), to + i, dim - i);
}

template <typename T, typename Cache>
void rotate_and_cache_tokens(const QuireRotateAndCacheParams& p, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        T* key = static_cast<T*>(p.key) + token * p.key_token_stride;
        if (p.cos_sin != nullptr) {
            const float* cos_sin = p.cos_sin + p.positions[token] * p.head_dim;
            T* query = static_cast<T*>(p.query) + token * p.query_token_stride;
            rotate_heads(query, p.num_heads, p.query_head_stride, cos_sin, p.head_dim);
            rotate_heads(key, p.num_kv_heads, p.key_head_stride, cos_sin, p.head_dim);
        }
        const int64_t slot = p.slot_mapping[token];
        if (slot < 0) continue;
        const int64_t block = slot / p.block_size, offset = slot % p.block_size;
        const QuireCacheView &keys = p.key_cache, &values = p.value_cache;
        Cache* key_slot = static_cast<Cache*>(keys.data) + block * keys.block_stride + offset * keys.slot_stride;
        Cache* value_slot = static_cast<Cache*>(values.data) + block * values.block_stride + offset * values.slot_stride;
        const T* value = static_cast<const T*>(p.value) + token * p.value_token_stride;
        for (int head = 0; head < p.num_kv_heads; ++head) {
            copy_row(key + head * p.key_head_stride, key_slot + head * keys.head_stride, p.head_dim);
            copy_row(value + head * p.value_head_stride, value_slot + head * values.head_stride, p.head_dim);
        }
    }
}

template <typename T>
void for_cache_type(const QuireRotateAndCacheParams& p, int64_t begin, int64_t end) {
    if (p.cache_dtype == QUIRE_FLOAT32) {
        rotate_and_cache_tokens<T, float>(p, begin, end);
    } else {
        rotate_and_cache_tokens<T, BFloat16>(p, begin, end);
    }
}

}  // namespace

void rotate_and_cache(const QuireRotateAndCacheParams& p, int64_t begin, int64_t end) {
    if (p.dtype == QUIRE_FLOAT32) {
        for_cache_type<float>(p, begin, end);
    } else {
        for_cache_type<BFloat16>(p, begin, end);
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
