// The phases of a step, each shared out over the threads: a decoder layer is
//
//   norm, quantise | q, k, v | rotate, store K and V | attention, quantise | out, add
//   norm, quantise | gate, up, activation, quantise | down, add
//
// with a barrier at each bar. Under tensor parallelism each line's last product is summed over the ranks before it is
// added; so are the embeddings, of which each rank has some, and rank 0 gathers the logits. Items are small and taken one by one, so that a thread whose core is taken away holds up
// the others for one item only.
#include "decoder_step.h"

#include <string.h>
#include <time.h>

#include <atomic>

#include "decoder.h"
#include "error.h"
#include "isa.h"
#include "thread_pool.h"
#include "unpack.h"

namespace quire {

namespace {

constexpr int64_t kRowBlock = 96;          // rows that pass over a panel together: their codes stay in the L2 cache
constexpr int64_t kMlpPanels = 4;          // gate and up values of a row block stay there too
constexpr int64_t kItemsPerThread = 6;     // of a matrix product, so that the last item is short
constexpr int64_t kInlineElements = 8192;  // smaller phases are not worth waking a helper

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t{time.tv_sec} * 1000000000 + time.tv_nsec;
}

int out_of_memory() { return fail(QUIRE_OUT_OF_MEMORY, "decoder_step: no memory for activations"); }

bool is_quantized(const QuireWeight& w) {
    WeightFormat format{};
    return w.data != nullptr && format_of(w.type, &format) && format.quantized();
}

// One of the products that share an input.
struct Product {
    const QuireWeight* weight;
    float* out;  // of row 0
    int64_t out_stride;
    bool add;
};

class Step {
public:
    Step(QuireDecoder* decoder, const QuireStepParams& step)
        : d_(*decoder), p_(decoder->params), step_(step), kernels_(active_decoder_kernels()) {}

    int run() {
        const int64_t began = now();
        mark_ = began;
        if (!reserve()) return out_of_memory();
        place_rows();
        QUIRE_CHECK(embed());
        for (int layer = 0; layer < p_.num_layers; ++layer) {
            QUIRE_CHECK(attention_block(d_.layers[static_cast<size_t>(layer)], layer));
            QUIRE_CHECK(mlp_block(d_.layers[static_cast<size_t>(layer)]));
        }
        spent(&QuireStepTimes::other);
        QUIRE_CHECK(sample());
        spent(&QuireStepTimes::head);
        if (step_.times != nullptr) step_.times->total += now() - began;
        return QUIRE_OK;
    }

private:
    int64_t rows() const { return step_.num_tokens; }
    int64_t hidden() const { return p_.hidden_size; }
    float* residual(int64_t row) const { return d_.residual.data() + row * padded_to_panel(hidden()); }
    int64_t residual_stride() const { return padded_to_panel(hidden()); }

    // Book the time since the last call.
    void spent(int64_t QuireStepTimes::*phase) {
        if (step_.times == nullptr) return;
        const int64_t time = now();
        step_.times->*phase += time - mark_;
        mark_ = time;
    }

    // Rows of a width in full vectors, summed over the ranks; what pads them is summed along.
    int all_reduce(float* values, int64_t count, int64_t QuireStepTimes::*before) {
        if (p_.communicator == nullptr) return QUIRE_OK;
        spent(before);
        QUIRE_CHECK(p_.communicator->all_reduce(values, count));
        spent(&QuireStepTimes::communication);
        return QUIRE_OK;
    }

    template <typename Body>
    void for_rows(int64_t count, int64_t width, const Body& body) const {
        if (count * width < kInlineElements) {
            for (int64_t row = 0; row < count; ++row) body(row);
            return;
        }
        const int64_t block = width < kInlineElements / 4 ? kInlineElements / 4 / width : 1;
        parallel_for(step_.num_threads, (count + block - 1) / block, [&](int64_t item) {
            for (int64_t row = item * block; row < (item + 1) * block && row < count; ++row) body(row);
        });
    }

    bool reserve() {
        const int64_t tokens = rows(), query = int64_t{p_.num_heads} * p_.head_dim;
        const int64_t kv = padded_to_panel(int64_t{p_.num_kv_heads} * p_.head_dim);
        const int64_t widest = hidden() > p_.embedding_dim ? hidden() : p_.embedding_dim;
        const int64_t more = tokens > step_.num_logits_rows ? tokens : step_.num_logits_rows;
        return d_.residual.reserve(tokens * residual_stride()) && d_.normed.reserve(more, hidden()) &&
               d_.qkv.reserve(tokens, padded_to_panel(query) + 2 * kv) && d_.attended.reserve(tokens, query) &&
               d_.inner.reserve(tokens, p_.intermediate_size) && d_.branch.reserve(tokens, hidden()) &&
               d_.embedded.reserve(more, widest) &&
               d_.logits.reserve(int64_t{step_.num_logits_rows} * logits_stride());
    }

    // Position and slot of each row, and the query tiles.
    void place_rows() {
        d_.positions.resize(static_cast<size_t>(rows()));
        d_.slots.resize(static_cast<size_t>(rows()));
        for (int seq = 0; seq < step_.num_seqs; ++seq) {
            const int begin = step_.query_start_loc[seq], end = step_.query_start_loc[seq + 1];
            const int32_t* table = step_.block_tables + seq * step_.block_table_stride;
            int position = step_.seq_lens[seq] - (end - begin);
            for (int row = begin; row < end; ++row, ++position) {
                d_.positions[static_cast<size_t>(row)] = position;
                d_.slots[static_cast<size_t>(row)] =
                    int64_t{table[position / p_.block_size]} * p_.block_size + position % p_.block_size;
            }
        }
        cut_tiles({step_.query_start_loc, step_.seq_lens, step_.num_seqs}, p_.num_heads / p_.num_kv_heads, &d_.tiles);
    }

    int embed() {
        const bool projected = p_.project_in.data != nullptr;
        const int64_t stride = projected ? d_.embedded.width : residual_stride();
        float* const embedded = projected ? d_.embedded.row(0) : residual(0);
        for_rows(rows(), 8 * int64_t{p_.embedding_dim}, [&](int64_t row) { look_up(row, embedded + row * stride); });
        QUIRE_CHECK(all_reduce(embedded, rows() * stride, &QuireStepTimes::other));
        if (projected) {
            prepare(d_.embedded, rows(), p_.embedding_dim, {&p_.project_in});
            multiply({{&p_.project_in, residual(0), residual_stride(), false}}, d_.embedded, rows());
        }
        if (p_.positions == nullptr) return QUIRE_OK;
        for_rows(rows(), hidden(), [&](int64_t row) {
            kernels_.add(residual(row), p_.positions + d_.positions[static_cast<size_t>(row)] * hidden(), hidden());
        });
        return QUIRE_OK;
    }

    // A row's embedding, or zeros if another rank has it.
    void look_up(int64_t row, float* out) const {
        const int32_t token = step_.token_ids[row];
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

    static bool wants_codes(std::initializer_list<const QuireWeight*> weights) {
        for (const QuireWeight* w : weights) {
            if (is_quantized(*w)) return true;
        }
        return false;
    }

    // The rows as bytes too, if one of the weights that will read them is made of codes.
    void prepare(const Activations& x, int64_t count, int64_t columns,
                 std::initializer_list<const QuireWeight*> readers) const {
        if (!wants_codes(readers)) return;
        for_rows(count, columns, [&](int64_t row) { kernels_.quantize(x.row(row), row, 0, columns, x.quantized()); });
    }

    // What attention or MLP reads: the residual, normed unless the norm comes after.
    void read_residual(const QuireNorm& norm, std::initializer_list<const QuireWeight*> readers) const {
        const bool codes = wants_codes(readers);
        for_rows(rows(), hidden(), [&](int64_t row) {
            float* const out = d_.normed.row(row);
            if (p_.post_norm) {
                memcpy(out, residual(row), sizeof(float) * static_cast<size_t>(hidden()));
            } else {
                kernels_.norm(residual(row), arguments(norm), hidden(), out);
            }
            if (codes) kernels_.quantize(out, row, 0, hidden(), d_.normed.quantized());
        });
    }

    // residual += x W^T, with norms of the product or of the sum where the model has them.
    int add_to_residual(const QuireWeight& w, const Activations& x, const QuireNorm& out_norm, const QuireNorm& norm) {
        const bool normed = out_norm.weight != nullptr, apart = normed || p_.communicator != nullptr;
        if (apart) {
            multiply({{&w, d_.branch.row(0), d_.branch.width, false}}, x, rows());
            QUIRE_CHECK(all_reduce(d_.branch.row(0), rows() * d_.branch.width, &QuireStepTimes::matrices));
        } else {
            multiply({{&w, residual(0), residual_stride(), true}}, x, rows());
        }
        spent(&QuireStepTimes::matrices);
        if (!apart && !p_.post_norm) return QUIRE_OK;
        for_rows(rows(), hidden(), [&](int64_t row) {
            if (normed) kernels_.norm(d_.branch.row(row), arguments(out_norm), hidden(), d_.branch.row(row));
            if (apart) kernels_.add(residual(row), d_.branch.row(row), hidden());
            if (p_.post_norm) kernels_.norm(residual(row), arguments(norm), hidden(), residual(row));
        });
        return QUIRE_OK;
    }

    void multiply(std::initializer_list<Product> products, const Activations& x, int64_t count) const {
        int64_t panels = 0;
        for (const Product& product : products) panels += num_panels(product.weight->n);
        const int64_t wanted = step_.num_threads == 1 ? 1 : step_.num_threads * kItemsPerThread;
        const int64_t row_blocks = (count + kRowBlock - 1) / kRowBlock;
        int64_t chunk = panels * row_blocks / wanted;
        chunk = chunk < 1 ? 1 : chunk > 64 ? 64 : chunk;
        int64_t items = 0;
        for (const Product& product : products) items += (num_panels(product.weight->n) + chunk - 1) / chunk;
        parallel_for(step_.num_threads, items * row_blocks, [&](int64_t item) {
            const int64_t block = item / items;
            int64_t index = item % items;
            for (const Product& product : products) {
                const int64_t panels_here = num_panels(product.weight->n), chunks = (panels_here + chunk - 1) / chunk;
                if (index < chunks) {
                    const int64_t first = index * chunk, end = first + chunk < panels_here ? first + chunk : panels_here;
                    multiply_range(product, x, {block * kRowBlock, least((block + 1) * kRowBlock, count), first, end});
                    return;
                }
                index -= chunks;
            }
        });
    }

    static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

    void multiply_range(const Product& product, const Activations& x, const MatmulRange& range) const {
        const QuireWeight& w = *product.weight;
        const float* const bias = w.bias == nullptr ? nullptr : w.bias + range.first_panel * kPanel;
        const MatmulOutput out{product.out + range.first_panel * kPanel, product.out_stride, bias, product.add};
        if (is_quantized(w)) {
            kernels_.matmul_quantized(w, x.quantized(), range, out);
        } else {
            kernels_.matmul_float(w, x.values.data(), x.width, range, out);
        }
    }

    int attention_block(const QuireDecoderLayer& layer, int index) {
        read_residual(layer.attention_norm, {&layer.query, &layer.key, &layer.value});
        spent(&QuireStepTimes::other);
        const int64_t key_at = padded_to_panel(layer.query.n), value_at = key_at + padded_to_panel(layer.key.n);
        float* const qkv = d_.qkv.row(0);
        multiply({{&layer.query, qkv, d_.qkv.width, false},
                  {&layer.key, qkv + key_at, d_.qkv.width, false},
                  {&layer.value, qkv + value_at, d_.qkv.width, false}},
                 d_.normed, rows());
        spent(&QuireStepTimes::matrices);
        const LayerCache cache{static_cast<uint8_t*>(p_.kv_pool) + index * d_.layout.layer_bytes(), &d_.layout};
        for_rows(rows(), d_.qkv.width, [&](int64_t row) { rotate_and_store(layer, cache, row, key_at, value_at); });
        spent(&QuireStepTimes::other);
        if (!attend(layer, cache)) return out_of_memory();
        spent(&QuireStepTimes::attention);
        return add_to_residual(layer.attention_out, d_.attended, layer.attention_out_norm, layer.attention_norm);
    }

    void rotate_and_store(const QuireDecoderLayer& layer, const LayerCache& cache, int64_t row, int64_t key_at,
                          int64_t value_at) const {
        float* const query = d_.qkv.row(row);
        float* const key = query + key_at;
        const float* const value = query + value_at;
        const size_t at = static_cast<size_t>(row);
        const float* const cos_sin =
            layer.cos_sin == nullptr ? nullptr : layer.cos_sin + int64_t{d_.positions[at]} * p_.head_dim;
        norm_and_rotate(query, p_.num_heads, layer.query_norm, cos_sin);
        norm_and_rotate(key, p_.num_kv_heads, layer.key_norm, cos_sin);
        for (int head = 0; head < p_.num_kv_heads; ++head) {
            const int64_t offset = int64_t{head} * p_.head_dim;
            kernels_.store_kv(cache, head, d_.slots[at], key + offset, value + offset);
        }
    }

    void norm_and_rotate(float* heads, int num_heads, const QuireNorm& norm, const float* cos_sin) const {
        for (int head = 0; head < num_heads; ++head) {
            float* const at = heads + int64_t{head} * p_.head_dim;
            if (norm.weight != nullptr) {
                kernels_.norm(at, {norm.weight, nullptr, p_.norm_eps, false}, p_.head_dim, at);
            }
            if (cos_sin != nullptr) kernels_.rotate(at, cos_sin, p_.head_dim);
        }
    }

    // The attention's items, for AttentionLaunch. A finished item's heads are quantised at once where records allow it.
    class AttentionWork {
    public:
        AttentionWork(const Step& step, const DecoderAttention& attention, bool quantizes)
            : step_(step), attention_(attention), quantizes_(quantizes) {}

        AttentionShape shape() const {
            return {attention_.group, step_.p_.num_kv_heads, step_.p_.head_dim, step_.step_.num_threads};
        }
        int window() const { return attention_.sliding_window; }
        int64_t scratch_floats(int64_t rows) const { return attend_scratch_floats(rows, step_.p_.head_dim); }
        void attend(const QueryTile& tile, int kv_head, int segment, float* scratch, SoftmaxState state) const {
            step_.kernels_.attend(attention_, tile, kv_head, segment, scratch, state);
        }
        void merge(int64_t rows, SoftmaxState into, SoftmaxState from) const {
            step_.kernels_.merge(rows, step_.p_.head_dim, into, from);
        }
        void finish(const QueryTile& tile, int kv_head, SoftmaxState state) const {
            step_.kernels_.finish(attention_, tile, kv_head, state);
            if (!quantizes_) return;
            const Activations& out = step_.d_.attended;
            const int64_t columns = int64_t{attention_.group} * step_.p_.head_dim, begin = kv_head * columns;
            for (int64_t row = tile.first_token; row < tile.first_token + tile.num_tokens; ++row) {
                step_.kernels_.quantize(out.row(row), row, begin, begin + columns, out.quantized());
            }
        }

    private:
        const Step& step_;
        const DecoderAttention& attention_;
        const bool quantizes_;
    };

    bool attend(const QuireDecoderLayer& layer, const LayerCache& cache) const {
        const int32_t group = p_.num_heads / p_.num_kv_heads;
        const DecoderAttention attention{d_.qkv.row(0),         d_.attended.row(0),       d_.qkv.width,
                                         d_.attended.width,     cache,                    step_.block_tables,
                                         step_.block_table_stride, group,                 layer.sliding_window,
                                         p_.attention_scale};
        const bool codes = is_quantized(layer.attention_out), at_once = codes && group * p_.head_dim % kRecord == 0;
        if (!run_attention(AttentionWork(*this, attention, at_once), d_.tiles)) return false;
        if (!at_once) prepare(d_.attended, rows(), int64_t{p_.num_heads} * p_.head_dim, {&layer.attention_out});
        return true;
    }

    int mlp_block(const QuireDecoderLayer& layer) {
        read_residual(layer.mlp_norm, {&layer.gate, &layer.up});
        spent(&QuireStepTimes::other);
        const int64_t panels = num_panels(layer.up.n), row_blocks = (rows() + kRowBlock - 1) / kRowBlock;
        int64_t chunk = panels * row_blocks / (step_.num_threads * kItemsPerThread) / 2 * 2;
        chunk = chunk < 2 ? 2 : chunk > kMlpPanels ? kMlpPanels : chunk;
        const int64_t chunks = (panels + chunk - 1) / chunk;
        parallel_for(step_.num_threads, chunks * row_blocks, [&](int64_t item) {
            const int64_t first = item % chunks * chunk, block = item / chunks * kRowBlock;
            mlp_item(layer, {block, least(block + kRowBlock, rows()), first, least(first + chunk, panels)});
        });
        spent(&QuireStepTimes::matrices);
        return add_to_residual(layer.down, d_.inner, layer.mlp_out_norm, layer.mlp_norm);
    }

    // activation(gate) * up, or activation(up), for some columns; as bytes too if `down` wants them.
    void mlp_item(const QuireDecoderLayer& layer, const MatmulRange& range) const {
        const bool gated = layer.gate.data != nullptr;
        const int64_t begin = range.first_panel * kPanel, end = least(range.end_panel * kPanel, layer.up.n);
        float up[kRowBlock * kMlpPanels * kPanel];
        const int64_t up_stride = (range.end_panel - range.first_panel) * kPanel;
        multiply_range({gated ? &layer.gate : &layer.up, d_.inner.row(0), d_.inner.width, false}, d_.normed, range);
        if (gated) {
            // The range's first row and column are the first of `up`.
            const Product product{&layer.up, up - range.first_row * up_stride - begin, up_stride, false};
            multiply_range(product, d_.normed, range);
        }
        const bool codes = is_quantized(layer.down);
        for (int64_t row = range.first_row; row < range.end_row; ++row) {
            float* const values = d_.inner.row(row);
            const float* const factors = gated ? up + (row - range.first_row) * up_stride : nullptr;
            kernels_.activate(values + begin, factors, end - begin, p_.activation);
            if (codes) kernels_.quantize(values, row, begin, end, d_.inner.quantized());
        }
    }

    // The logits that samples need, and the samples.
    int sample() {
        const int64_t count = step_.num_logits_rows;
        if (count == 0) return QUIRE_OK;
        const bool normed = p_.final_norm.weight != nullptr;
        for_rows(count, hidden(), [&](int64_t i) {
            const float* const from = residual(step_.logits_rows[i]);
            if (normed) {
                kernels_.norm(from, arguments(p_.final_norm), hidden(), d_.normed.row(i));
            } else {
                memcpy(d_.normed.row(i), from, sizeof(float) * static_cast<size_t>(hidden()));
            }
        });
        const Activations* x = &d_.normed;
        if (p_.project_out.data != nullptr) {
            prepare(d_.normed, count, hidden(), {&p_.project_out});
            multiply({{&p_.project_out, d_.embedded.row(0), d_.embedded.width, false}}, d_.normed, count);
            x = &d_.embedded;
        }
        prepare(*x, count, p_.embedding_dim, {&p_.head});
        multiply({{&p_.head, d_.logits.data(), logits_stride(), false}}, *x, count);
        QUIRE_CHECK(gather_logits());
        return draw();
    }

    // Of a row of logits: rank 0 has room for those of all ranks.
    int64_t logits_stride() const {
        const bool whole = p_.communicator == nullptr || p_.communicator->rank() == 0;
        return padded_to_panel(whole ? p_.vocab_size : own_vocab(p_).size());
    }

    // Rank 0's rows filled up with what the others have computed. Its own are in place; the last panel of them reaches
    // into what comes now.
    int gather_logits() {
        if (p_.communicator == nullptr) return QUIRE_OK;
        spent(&QuireStepTimes::head);
        int64_t widest = 0;
        for (int rank = 1; rank < p_.communicator->world_size(); ++rank) {
            const int64_t width = padded_to_panel(vocab_of(p_, rank).size());
            widest = width > widest ? width : widest;
        }
        const int64_t rows = step_.num_logits_rows;
        QUIRE_CHECK(p_.communicator->gather(
            d_.logits.data(), rows * logits_stride(), rows * widest,
            [](void* step, int rank, int64_t offset, int64_t count, const float* values) {
                static_cast<const Step*>(step)->place_logits(rank, offset, count, values);
            },
            this));
        spent(&QuireStepTimes::communication);
        return QUIRE_OK;
    }

    // A stretch of another rank's logits, its rows being in full panels, into the whole rows.
    void place_logits(int rank, int64_t offset, int64_t count, const float* values) const {
        const VocabRange vocab = vocab_of(p_, rank);
        const int64_t width = padded_to_panel(vocab.size()), end = least(offset + count, step_.num_logits_rows * width);
        for (int64_t at = offset; at < end;) {
            const int64_t row = at / width, column = at % width, next = least((row + 1) * width, end);
            const int64_t size = least(next - at, vocab.size() - column);
            if (size > 0) {
                memcpy(d_.logits.data() + row * logits_stride() + vocab.begin + column, values + (at - offset),
                       sizeof(float) * static_cast<size_t>(size));
            }
            at = next;
        }
    }

    int draw() {
        std::atomic<bool> no_memory{false};
        parallel_for(step_.num_threads, step_.num_samples, [&](int64_t i) {
            QuireSample& sample = step_.samples[i];
            float* const scratch = thread_scratch(0, 3 * int64_t{p_.vocab_size});
            if (scratch == nullptr) return no_memory.store(true);
            kernels_.sample(d_.logits.data() + sample.row * logits_stride(), p_.vocab_size, scratch, &sample);
        });
        return no_memory.load() ? out_of_memory() : int{QUIRE_OK};
    }

    QuireDecoder& d_;
    const QuireDecoderParams& p_;
    const QuireStepParams& step_;
    const DecoderKernels& kernels_;
    int64_t mark_ = 0;
};

}  // namespace

int run_step(QuireDecoder* decoder, const QuireStepParams& step) { return Step(decoder, step).run(); }

}  // namespace quire
