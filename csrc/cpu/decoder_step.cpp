// The phases of a step, each shared out over the threads: a decoder layer is
//
//   norm, convert | q, k, v | rotate, store K and V | attention, convert | out, add
//   norm, convert | gate, up, activation, convert | down, add
//
// with a barrier at each bar; rows are converted into the form that the next weights multiply. Under tensor parallelism each
// line's last product is summed over the ranks before it is added; so are the embeddings, of which each rank has some, and
// rank 0 gathers the logits. Items are small and taken one by one, so that a thread whose core is taken away holds up the
// others for one item only.
#include "decoder_step.h"

#include <string.h>

#include "error.h"
#include "isa.h"
#include "step_adapters.h"
#include "step_attention.h"
#include "step_head.h"
#include "step_products.h"
#include "unpack.h"

namespace quire {

namespace {

constexpr int64_t kMlpPanels = 4;  // gate and up values of a row block stay in the L2 cache too

class DecoderStep {
public:
    DecoderStep(QuireDecoder* decoder, const QuireStepParams& asked)
        : clock_(asked.times),
          step_{*decoder, decoder->params, asked, active_decoder_kernels(), clock_},
          d_(*decoder),
          p_(decoder->params),
          asked_(asked),
          kernels_(step_.kernels) {}

    int run() {
        if (!reserve()) return out_of_memory();
        place_rows();
        cut_adapter_runs(d_, asked_, kernels_);
        if (!reserve_adapted(step_)) return out_of_memory();
        QUIRE_CHECK(embed());
        for (int layer = 0; layer < p_.num_layers; ++layer) {
            QUIRE_CHECK(attention_block(d_.layers[static_cast<size_t>(layer)], layer));
            QUIRE_CHECK(mlp_block(d_.layers[static_cast<size_t>(layer)], layer));
        }
        spent(&QuireStepTimes::other);
        QUIRE_CHECK(sample());
        spent(&QuireStepTimes::head);
        clock_.end();
        return QUIRE_OK;
    }

private:
    int64_t rows() const { return step_.rows(); }
    int64_t hidden() const { return step_.hidden(); }
    float* residual(int64_t row) const { return step_.residual(row); }

    void spent(int64_t QuireStepTimes::*phase) { clock_.spent(phase); }

    // Rows of a width in full vectors, summed over the ranks; what pads them is summed along.
    int all_reduce(float* values, int64_t count, int64_t QuireStepTimes::*before) {
        if (p_.communicator == nullptr) return QUIRE_OK;
        spent(before);
        QUIRE_CHECK(p_.communicator->all_reduce(values, count));
        spent(&QuireStepTimes::communication);
        return QUIRE_OK;
    }

    bool reserve() {
        const int64_t tokens = rows(), query = int64_t{p_.num_heads} * p_.head_dim;
        const int64_t kv = padded_to_panel(int64_t{p_.num_kv_heads} * p_.head_dim);
        const int64_t widest = hidden() > p_.embedding_dim ? hidden() : p_.embedding_dim;
        const int64_t more = tokens > asked_.num_logits_rows ? tokens : asked_.num_logits_rows;
        return d_.residual.reserve(tokens * step_.residual_stride()) && d_.normed.reserve(more, hidden()) &&
               d_.qkv.reserve(tokens, padded_to_panel(query) + 2 * kv) && d_.attended.reserve(tokens, query) &&
               d_.inner.reserve(tokens, p_.intermediate_size) && d_.branch.reserve(tokens, hidden()) &&
               d_.embedded.reserve(more, widest) &&
               d_.logits.reserve(int64_t{asked_.num_logits_rows} * logits_stride(step_));
    }

    // Position and slot of each row, and the query tiles.
    void place_rows() {
        d_.positions.resize(static_cast<size_t>(rows()));
        d_.slots.resize(static_cast<size_t>(rows()));
        for (int seq = 0; seq < asked_.num_seqs; ++seq) {
            const int begin = asked_.query_start_loc[seq], end = asked_.query_start_loc[seq + 1];
            const int32_t* table = asked_.block_tables + seq * asked_.block_table_stride;
            int position = asked_.seq_lens[seq] - (end - begin);
            for (int row = begin; row < end; ++row, ++position) {
                d_.positions[static_cast<size_t>(row)] = position;
                d_.slots[static_cast<size_t>(row)] =
                    int64_t{table[position / p_.block_size]} * p_.block_size + position % p_.block_size;
            }
        }
        cut_tiles({asked_.query_start_loc, asked_.seq_lens, asked_.num_seqs}, p_.num_heads / p_.num_kv_heads,
                  &d_.tiles);
    }

    int embed() {
        const bool projected = p_.project_in.data != nullptr;
        const int64_t stride = projected ? d_.embedded.width : step_.residual_stride();
        float* const embedded = projected ? d_.embedded.row(0) : residual(0);
        step_.for_rows(rows(), 8 * int64_t{p_.embedding_dim},
                       [&](int64_t row) { look_up(row, embedded + row * stride); });
        QUIRE_CHECK(all_reduce(embedded, rows() * stride, &QuireStepTimes::other));
        if (projected) {
            prepare(step_, d_.embedded, rows(), p_.embedding_dim, {&p_.project_in});
            multiply(step_, {{&p_.project_in, residual(0), step_.residual_stride(), false}}, d_.embedded, rows());
        }
        if (p_.positions == nullptr) return QUIRE_OK;
        step_.for_rows(rows(), hidden(), [&](int64_t row) {
            kernels_.add(residual(row), p_.positions + d_.positions[static_cast<size_t>(row)] * hidden(), hidden());
        });
        return QUIRE_OK;
    }

    // A row's embedding, or zeros if another rank has it.
    void look_up(int64_t row, float* out) const {
        const int32_t token = asked_.token_ids[row];
        const VocabRange vocab = own_vocab(p_);
        if (token < vocab.begin || token >= vocab.end) {
            memset(out, 0, sizeof(float) * static_cast<size_t>(p_.embedding_dim));
            return;
        }
        unpack_row(p_.embedding, token - vocab.begin, out);
        if (p_.embedding_scale == 1.0f) return;
        for (int i = 0; i < p_.embedding_dim; ++i) out[i] *= p_.embedding_scale;
    }

    NormArguments arguments(const QuireNorm& norm) const {
        return {norm.weight, norm.bias, p_.norm_eps, p_.layer_norm != 0};
    }

    // What attention or MLP reads: the residual, normed unless the norm comes after.
    void read_residual(const QuireNorm& norm, std::initializer_list<const QuireWeight*> readers) const {
        const RowForms forms = forms_for(step_, readers);
        step_.for_rows(rows(), hidden(), [&](int64_t row) {
            float* const out = d_.normed.row(row);
            if (p_.post_norm) {
                memcpy(out, residual(row), sizeof(float) * static_cast<size_t>(hidden()));
            } else {
                kernels_.norm(residual(row), arguments(norm), hidden(), out);
            }
            convert(step_, d_.normed, row, 0, hidden(), forms);
        });
    }

    // residual += x W^T, with norms of the product or of the sum where the model has them.
    int add_to_residual(const QuireWeight& w, const Activations& x, AdapterSite site, const QuireNorm& out_norm,
                        const QuireNorm& norm) {
        const bool normed = out_norm.weight != nullptr, apart = normed || p_.communicator != nullptr;
        if (apart) {
            multiply_adapted(step_, {{&w, d_.branch.row(0), d_.branch.width, false}}, x, site);
            QUIRE_CHECK(all_reduce(d_.branch.row(0), rows() * d_.branch.width, &QuireStepTimes::matrices));
        } else {
            multiply_adapted(step_, {{&w, residual(0), step_.residual_stride(), true}}, x, site);
        }
        spent(&QuireStepTimes::matrices);
        if (!apart && !p_.post_norm) return QUIRE_OK;
        step_.for_rows(rows(), hidden(), [&](int64_t row) {
            if (normed) kernels_.norm(d_.branch.row(row), arguments(out_norm), hidden(), d_.branch.row(row));
            if (apart) kernels_.add(residual(row), d_.branch.row(row), hidden());
            if (p_.post_norm) kernels_.norm(residual(row), arguments(norm), hidden(), residual(row));
        });
        return QUIRE_OK;
    }

    int attention_block(const QuireDecoderLayer& layer, int index) {
        read_residual(layer.attention_norm, {&layer.query, &layer.key, &layer.value});
        spent(&QuireStepTimes::other);
        const QkvColumns columns = qkv_columns(layer);
        float* const qkv = d_.qkv.row(0);
        multiply_adapted(step_,
                         {{&layer.query, qkv, d_.qkv.width, false},
                          {&layer.key, qkv + columns.key, d_.qkv.width, false},
                          {&layer.value, qkv + columns.value, d_.qkv.width, false}},
                         d_.normed, {index, &QuireAdapterLayer::attention_in});
        spent(&QuireStepTimes::matrices);
        const LayerCache cache = layer_cache(step_, index);
        rotate_and_store(step_, layer, cache);
        spent(&QuireStepTimes::other);
        if (!attend(step_, layer, cache)) return out_of_memory();
        spent(&QuireStepTimes::attention);
        return add_to_residual(layer.attention_out, d_.attended, {index, &QuireAdapterLayer::attention_out}, layer.attention_out_norm,
                               layer.attention_norm);
    }

    int mlp_block(const QuireDecoderLayer& layer, int index) {
        read_residual(layer.mlp_norm, {&layer.gate, &layer.up});
        spent(&QuireStepTimes::other);
        const AdapterSite site{index, &QuireAdapterLayer::mlp_in};
        shrink(step_, d_.normed, site);
        const int64_t panels = num_panels(layer.up.n), row_blocks = (rows() + kRowBlock - 1) / kRowBlock;
        int64_t chunk = panels * row_blocks / (asked_.num_threads * kItemsPerThread) / 2 * 2;
        chunk = chunk < 2 ? 2 : least(chunk, kMlpPanels);
        const int64_t chunks = (panels + chunk - 1) / chunk;
        parallel_for(asked_.num_threads, chunks * row_blocks, [&](int64_t item) {
            const int64_t first = item % chunks * chunk, block = item / chunks * kRowBlock;
            mlp_item(layer, site, {block, least(block + kRowBlock, rows()), first, least(first + chunk, panels)});
        });
        spent(&QuireStepTimes::matrices);
        return add_to_residual(layer.down, d_.inner, {index, &QuireAdapterLayer::down}, layer.mlp_out_norm, layer.mlp_norm);
    }

    // activation(gate) * up, or activation(up), for some columns; and in the form that `down` wants.
    void mlp_item(const QuireDecoderLayer& layer, AdapterSite site, const MatmulRange& range) const {
        const bool gated = layer.gate.data != nullptr;
        const int64_t begin = range.first_panel * kPanel, end = least(range.end_panel * kPanel, layer.up.n);
        float up[kRowBlock * kMlpPanels * kPanel];
        const int64_t up_stride = (range.end_panel - range.first_panel) * kPanel;
        const Product first{gated ? &layer.gate : &layer.up, d_.inner.row(0), d_.inner.width, false};
        multiply_range(step_, first, d_.normed, range);
        expand(step_, first, site, gated ? 0 : 1, range);
        if (gated) {
            // The range's first row and column are the first of `up`.
            const Product second{&layer.up, up - range.first_row * up_stride - begin, up_stride, false};
            multiply_range(step_, second, d_.normed, range);
            expand(step_, second, site, 1, range);
        }
        const RowForms forms = forms_for(step_, {&layer.down});
        for (int64_t row = range.first_row; row < range.end_row; ++row) {
            float* const values = d_.inner.row(row);
            const float* const factors = gated ? up + (row - range.first_row) * up_stride : nullptr;
            kernels_.activate(values + begin, factors, end - begin, p_.activation);
            convert(step_, d_.inner, row, begin, end, forms);
        }
    }

    // The logits that samples need, and the samples.
    int sample() {
        const int64_t count = asked_.num_logits_rows;
        if (count == 0) return QUIRE_OK;
        const bool normed = p_.final_norm.weight != nullptr;
        step_.for_rows(count, hidden(), [&](int64_t i) {
            const float* const from = residual(asked_.logits_rows[i]);
            if (normed) {
                kernels_.norm(from, arguments(p_.final_norm), hidden(), d_.normed.row(i));
            } else {
                memcpy(d_.normed.row(i), from, sizeof(float) * static_cast<size_t>(hidden()));
            }
        });
        QUIRE_CHECK(compute_logits(step_));
        return draw(step_);
    }

    PhaseClock clock_;
    const Step step_;
    QuireDecoder& d_;
    const QuireDecoderParams& p_;
    const QuireStepParams& asked_;
    const DecoderKernels& kernels_;
};

}  // namespace

int run_step(QuireDecoder* decoder, const QuireStepParams& step) { return DecoderStep(decoder, step).run(); }

}  // namespace quire
