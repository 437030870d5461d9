#include "step_attention.h"

#include "step_products.h"

namespace quire {

namespace {

void norm_and_rotate(const Step& step, float* heads, int num_heads, const QuireNorm& norm, const float* cos_sin) {
    const int64_t head_dim = step.model.head_dim;
    for (int head = 0; head < num_heads; ++head) {
        float* const at = heads + head * head_dim;
        if (norm.weight != nullptr) {
            step.kernels.norm(at, {norm.weight, nullptr, step.model.norm_eps, false}, head_dim, at);
        }
        if (cos_sin != nullptr) step.kernels.rotate(at, cos_sin, head_dim);
    }
}

// The attention's items, for AttentionLaunch. A finished item's heads are converted at once.
class AttentionWork {
public:
    AttentionWork(const Step& step, const DecoderAttention& attention, RowForms forms)
        : step_(step), attention_(attention), forms_(forms) {}

    AttentionShape shape() const {
        return {attention_.group, step_.model.num_kv_heads, step_.model.head_dim, step_.asked.num_threads};
    }
    int window() const { return attention_.sliding_window; }
    int64_t scratch_floats(int64_t rows) const { return attend_scratch_floats(rows, step_.model.head_dim); }
    void attend(const QueryTile& tile, int kv_head, int segment, float* scratch, SoftmaxState state) const {
        step_.kernels.attend(attention_, tile, kv_head, segment, scratch, state);
    }
    void merge(int64_t rows, SoftmaxState into, SoftmaxState from) const {
        step_.kernels.merge(rows, step_.model.head_dim, into, from);
    }
    void finish(const QueryTile& tile, int kv_head, SoftmaxState state) const {
        step_.kernels.finish(attention_, tile, kv_head, state);
        if (!forms_.any()) return;
        const int64_t columns = int64_t{attention_.group} * step_.model.head_dim, begin = kv_head * columns;
        for (int64_t row = tile.first_token; row < tile.first_token + tile.num_tokens; ++row) {
            convert(step_, step_.decoder.attended, row, begin, begin + columns, forms_);
        }
    }

private:
    const Step& step_;
    const DecoderAttention& attention_;
    const RowForms forms_;
};

}  // namespace

QkvColumns qkv_columns(const QuireDecoderLayer& layer) {
    const int64_t key = padded_to_panel(layer.query.n);
    return {key, key + padded_to_panel(layer.key.n)};
}

LayerCache layer_cache(const Step& step, int layer) {
    const KVLayout& layout = step.decoder.layout;
    return {static_cast<uint8_t*>(step.model.kv_pool) + layer * layout.layer_bytes(), &layout};
}

void rotate_and_store(const Step& step, const QuireDecoderLayer& layer, const LayerCache& cache) {
    const QuireDecoderParams& p = step.model;
    const Activations& qkv = step.decoder.qkv;
    const QkvColumns columns = qkv_columns(layer);
    step.for_rows(step.rows(), qkv.width, [&](int64_t row) {
        float* const query = qkv.row(row);
        float* const key = query + columns.key;
        const float* const value = query + columns.value;
        const size_t at = static_cast<size_t>(row);
        const float* const cos_sin =
            layer.cos_sin == nullptr ? nullptr : layer.cos_sin + int64_t{step.decoder.positions[at]} * p.head_dim;
        norm_and_rotate(step, query, p.num_heads, layer.query_norm, cos_sin);
        norm_and_rotate(step, key, p.num_kv_heads, layer.key_norm, cos_sin);
        for (int head = 0; head < p.num_kv_heads; ++head) {
            const int64_t offset = int64_t{head} * p.head_dim;
            step.kernels.store_kv(cache, head, step.decoder.slots[at], key + offset, value + offset);
        }
    });
}

bool attend(const Step& step, const QuireDecoderLayer& layer, const LayerCache& cache) {
    const QuireDecoderParams& p = step.model;
    const Activations &qkv = step.decoder.qkv, &attended = step.decoder.attended;
    const int32_t group = p.num_heads / p.num_kv_heads;
    const DecoderAttention attention{qkv.row(0),
                                     attended.row(0),
                                     qkv.width,
                                     attended.width,
                                     cache,
                                     step.asked.block_tables,
                                     step.asked.block_table_stride,
                                     group,
                                     layer.sliding_window,
                                     p.attention_scale};
    const bool at_once = group * p.head_dim % kRecord == 0;  // no record is of two items
    const RowForms forms = at_once ? forms_for(step, {&layer.attention_out}) : RowForms{false, false};
    if (!run_attention(AttentionWork(step, attention, forms), step.decoder.tiles)) return false;
    if (!at_once) prepare(step, attended, step.rows(), int64_t{p.num_heads} * p.head_dim, {&layer.attention_out});
    return true;
}

}  // namespace quire
