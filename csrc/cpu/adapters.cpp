// The C ABI of a decoder's adapters: tables are checked here and copied into their slots.
#include <new>

#include "decoder.h"
#include "error.h"

namespace quire {

namespace {

constexpr const char* kSet = "decoder_set_adapter";
constexpr int kMaxSlot = 4095;
constexpr int kMaxRank = 1 << 14;

// What a group's matrices are, as far as adapters are concerned.
struct GroupShape {
    const char* name;
    const QuireWeight* matrices[3];  // NULL: the group has no such member
};

int check_matrix(const char* group, const char* name, const QuireWeight& w, int64_t n, int64_t k, int32_t type) {
    if (w.n != n || w.k != k) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: %s of %s is [%d, %d], expected [%lld, %lld]", kSet, name, group, w.n, w.k,
                    static_cast<long long>(n), static_cast<long long>(k));
    }
    if (w.type != type || (type != QUIRE_WEIGHT_FLOAT32 && type != QUIRE_WEIGHT_BFLOAT16) || w.bias != nullptr) {
        return fail(QUIRE_UNSUPPORTED, "%s: %s of %s has type %d or a bias; an adapter is all float32 or all bfloat16", kSet,
                    name, group, w.type);
    }
    return QUIRE_OK;
}

int check_group(const GroupShape& shape, const QuireAdapterGroup& group, int32_t type) {
    int64_t ranks = 0, k = 0;
    for (int i = 0; i < 3; ++i) {
        const QuireWeight& b = group.b[i];
        const QuireWeight* const base = shape.matrices[i];
        if (base != nullptr && base->data != nullptr) k = base->k;
        if (b.data == nullptr) {
            QUIRE_CHECK(check_range(kSet, "rank of an absent b", b.k, 0, 0));
            continue;
        }
        if (base == nullptr || base->data == nullptr) {
            return fail(QUIRE_INVALID_ARGUMENT, "%s: b[%d] of %s is for a matrix that the decoder has not", kSet, i,
                        shape.name);
        }
        QUIRE_CHECK(check_range(kSet, "rank", b.k, 1, kMaxRank));
        QUIRE_CHECK(check_matrix(shape.name, "b", b, base->n, b.k, type));
        ranks += b.k;
    }
    if (group.a.data == nullptr) {
        if (ranks == 0) return QUIRE_OK;
        return fail(QUIRE_INVALID_ARGUMENT, "%s: a of %s is missing", kSet, shape.name);
    }
    return check_matrix(shape.name, "a", group.a, ranks, k, type);
}

// The type of the first matrix that is there.
int32_t type_of(const QuireAdapterParams& params) {
    for (int i = 0; i < params.num_layers; ++i) {
        const QuireAdapterLayer& layer = params.layers[i];
        for (const QuireAdapterGroup* group : {&layer.attention_in, &layer.attention_out, &layer.mlp_in, &layer.down}) {
            if (group->a.data != nullptr) return group->a.type;
        }
    }
    return QUIRE_WEIGHT_FLOAT32;
}

int check_adapter(const QuireDecoder& decoder, const QuireAdapterParams& params) {
    QUIRE_CHECK(check_range(kSet, "slot", params.slot, 0, kMaxSlot));
    if (params.layers == nullptr) return QUIRE_OK;
    QUIRE_CHECK(check_range(kSet, "num_layers", params.num_layers, decoder.params.num_layers, decoder.params.num_layers));
    const int32_t type = type_of(params);
    for (int i = 0; i < params.num_layers; ++i) {
        const QuireAdapterLayer& layer = params.layers[i];
        const QuireDecoderLayer& base = decoder.layers[static_cast<size_t>(i)];
        QUIRE_CHECK(check_group({"attention_in", {&base.query, &base.key, &base.value}}, layer.attention_in, type));
        QUIRE_CHECK(check_group({"attention_out", {&base.attention_out, nullptr, nullptr}}, layer.attention_out, type));
        QUIRE_CHECK(check_group({"mlp_in", {&base.gate, &base.up, nullptr}}, layer.mlp_in, type));
        QUIRE_CHECK(check_group({"down", {&base.down, nullptr, nullptr}}, layer.down, type));
    }
    return QUIRE_OK;
}

Adapter copy_of(const QuireAdapterParams& params) {
    Adapter adapter;
    if (params.layers == nullptr) return adapter;
    adapter.layers.assign(params.layers, params.layers + params.num_layers);
    adapter.in_bfloat16 = type_of(params) == QUIRE_WEIGHT_BFLOAT16;
    for (const QuireAdapterLayer& layer : adapter.layers) {
        for (const QuireAdapterGroup* group : {&layer.attention_in, &layer.attention_out, &layer.mlp_in, &layer.down}) {
            adapter.width = group->a.n > adapter.width ? group->a.n : adapter.width;
        }
    }
    return adapter;
}

}  // namespace

}  // namespace quire

using namespace quire;

int quire_decoder_set_adapter(QuireDecoder* decoder, const QuireAdapterParams* params) {
    QUIRE_CHECK(check_not_null(kSet, "decoder", decoder));
    if (params == nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: params is NULL", kSet);
    QUIRE_CHECK(check_header(kSet, params->size, params->abi_version, sizeof *params));
    QUIRE_CHECK(check_adapter(*decoder, *params));
    try {
        const size_t slot = static_cast<size_t>(params->slot);
        if (decoder->adapters.size() <= slot) decoder->adapters.resize(slot + 1);
        decoder->adapters[slot] = copy_of(*params);
        return QUIRE_OK;
    } catch (const std::bad_alloc&) {
        return fail(QUIRE_OUT_OF_MEMORY, "%s: no memory", kSet);
    }
}
