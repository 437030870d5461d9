// The C ABI of the decoder: descriptions and steps are checked here, before anything is computed.
#include "decoder.h"

#include <string.h>

#include <new>

#include "decoder_step.h"
#include "error.h"
#include "isa.h"

namespace quire {

namespace {

constexpr const char* kCreate = "decoder_create";
constexpr const char* kStep = "decoder_step";

int check_weight(const char* name, const QuireWeight& w, int64_t n, int64_t k, bool required) {
    if (w.data == nullptr) {
        return required ? fail(QUIRE_INVALID_ARGUMENT, "%s: %s is missing", kCreate, name) : int{QUIRE_OK};
    }
    WeightFormat format{};
    if (!format_of(w.type, &format)) return fail(QUIRE_UNSUPPORTED, "%s: %s has type %d", kCreate, name, w.type);
    if (w.n != n || w.k != k) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: %s is [%d, %d], expected [%lld, %lld]", kCreate, name, w.n, w.k,
                    static_cast<long long>(n), static_cast<long long>(k));
    }
    return QUIRE_OK;
}

int check_shape(const QuireDecoderParams& p) {
    QUIRE_CHECK(check_not_null(kCreate, "layers", p.layers));
    QUIRE_CHECK(check_not_null(kCreate, "kv_pool", p.kv_pool));
    constexpr int kMost = 1 << 28;
    QUIRE_CHECK(check_range(kCreate, "num_layers", p.num_layers, 1, 1 << 16));
    QUIRE_CHECK(check_range(kCreate, "vocab_size", p.vocab_size, 1, kMost));
    QUIRE_CHECK(check_range(kCreate, "embedding_dim", p.embedding_dim, 1, kMost));
    QUIRE_CHECK(check_range(kCreate, "hidden_size", p.hidden_size, 1, kMost));
    QUIRE_CHECK(check_range(kCreate, "intermediate_size", p.intermediate_size, 1, kMost));
    QUIRE_CHECK(check_range(kCreate, "num_heads", p.num_heads, 1, 1 << 16));
    QUIRE_CHECK(check_range(kCreate, "num_kv_heads", p.num_kv_heads, 1, p.num_heads));
    QUIRE_CHECK(check_range(kCreate, "head_dim", p.head_dim, 2, 1 << 16));
    QUIRE_CHECK(check_range(kCreate, "max_positions", p.max_positions, 1, INT32_MAX));
    QUIRE_CHECK(check_range(kCreate, "activation", p.activation, QUIRE_ACTIVATION_SILU, QUIRE_ACTIVATION_GELU_TANH));
    QUIRE_CHECK(check_range(kCreate, "kv_type", p.kv_type, QUIRE_KV_FLOAT32, QUIRE_KV_INT8));
    QUIRE_CHECK(check_range(kCreate, "num_blocks", p.num_blocks, 1, INT32_MAX));
    QUIRE_CHECK(check_range(kCreate, "block_size", p.block_size, 1, 256));
    if (p.head_dim % 2 != 0) return fail(QUIRE_INVALID_ARGUMENT, "%s: head_dim=%d is odd", kCreate, p.head_dim);
    if (p.num_heads % p.num_kv_heads != 0) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: num_heads=%d is no multiple of num_kv_heads=%d", kCreate, p.num_heads,
                    p.num_kv_heads);
    }
    if ((p.block_size & (p.block_size - 1)) != 0) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: block_size=%d is no power of two", kCreate, p.block_size);
    }
    return QUIRE_OK;
}

int check_layer(const QuireDecoderParams& p, const QuireDecoderLayer& layer) {
    const int64_t query = int64_t{p.num_heads} * p.head_dim, kv = int64_t{p.num_kv_heads} * p.head_dim;
    QUIRE_CHECK(check_weight("query", layer.query, query, p.hidden_size, true));
    QUIRE_CHECK(check_weight("key", layer.key, kv, p.hidden_size, true));
    QUIRE_CHECK(check_weight("value", layer.value, kv, p.hidden_size, true));
    QUIRE_CHECK(check_weight("attention_out", layer.attention_out, p.hidden_size, query, true));
    QUIRE_CHECK(check_weight("gate", layer.gate, p.intermediate_size, p.hidden_size, false));
    QUIRE_CHECK(check_weight("up", layer.up, p.intermediate_size, p.hidden_size, true));
    QUIRE_CHECK(check_weight("down", layer.down, p.hidden_size, p.intermediate_size, true));
    QUIRE_CHECK(check_not_null(kCreate, "attention_norm", layer.attention_norm.weight));
    QUIRE_CHECK(check_not_null(kCreate, "mlp_norm", layer.mlp_norm.weight));
    return check_range(kCreate, "sliding_window", layer.sliding_window, 0, INT32_MAX);
}

int check_vocab(const QuireDecoderParams& p) {
    if (p.communicator == nullptr) return QUIRE_OK;
    const int ranks = p.communicator->world_size();
    QUIRE_CHECK(check_not_null(kCreate, "vocab_starts", p.vocab_starts));
    QUIRE_CHECK(check_range(kCreate, "vocab_starts[0]", p.vocab_starts[0], 0, 0));
    QUIRE_CHECK(check_range(kCreate, "vocab_starts of the end", p.vocab_starts[ranks], p.vocab_size, p.vocab_size));
    for (int rank = 0; rank < ranks; ++rank) {
        QUIRE_CHECK(check_range(kCreate, "vocab_starts", p.vocab_starts[rank + 1], p.vocab_starts[rank] + 1, p.vocab_size));
    }
    return QUIRE_OK;
}

int check_decoder(const QuireDecoderParams& p) {
    QUIRE_CHECK(check_shape(p));
    QUIRE_CHECK(check_vocab(p));
    const int32_t vocab_size = own_vocab(p).size();
    QUIRE_CHECK(check_weight("embedding", p.embedding, vocab_size, p.embedding_dim, true));
    QUIRE_CHECK(check_weight("head", p.head, vocab_size, p.embedding_dim, true));
    const bool projected = p.embedding_dim != p.hidden_size;
    QUIRE_CHECK(check_weight("project_in", p.project_in, p.hidden_size, p.embedding_dim, projected));
    QUIRE_CHECK(check_weight("project_out", p.project_out, p.embedding_dim, p.hidden_size, projected));
    for (int i = 0; i < p.num_layers; ++i) QUIRE_CHECK(check_layer(p, p.layers[i]));
    return QUIRE_OK;
}

void pad_bias(QuireDecoder* decoder, QuireWeight* w) {
    if (w->bias == nullptr) return;
    auto padded = std::make_unique<std::vector<float>>(static_cast<size_t>(padded_to_panel(w->n)), 0.0f);
    memcpy(padded->data(), w->bias, sizeof(float) * static_cast<size_t>(w->n));
    w->bias = padded->data();
    decoder->biases.push_back(std::move(padded));
}

QuireDecoder* make_decoder(const QuireDecoderParams& p) {
    auto decoder = std::make_unique<QuireDecoder>();
    decoder->params = p;
    decoder->layers.assign(p.layers, p.layers + p.num_layers);
    if (p.communicator != nullptr) {
        decoder->vocab_starts.assign(p.vocab_starts, p.vocab_starts + p.communicator->world_size() + 1);
        decoder->params.vocab_starts = decoder->vocab_starts.data();
    }
    decoder->layout = {p.kv_type, p.head_dim, p.block_size, p.num_kv_heads, p.num_layers};
    for (QuireDecoderLayer& layer : decoder->layers) {
        for (QuireWeight* w : {&layer.query, &layer.key, &layer.value, &layer.attention_out, &layer.gate, &layer.up,
                               &layer.down}) {
            pad_bias(decoder.get(), w);
        }
    }
    pad_bias(decoder.get(), &decoder->params.head);
    pad_bias(decoder.get(), &decoder->params.project_in);
    pad_bias(decoder.get(), &decoder->params.project_out);
    return decoder.release();
}

int check_adapter_slot(const QuireDecoder& decoder, int32_t slot) {
    if (slot == -1) return QUIRE_OK;
    const int32_t count = static_cast<int32_t>(decoder.adapters.size());
    QUIRE_CHECK(check_range(kStep, "adapter_slots", slot, -1, count - 1));
    if (!decoder.adapters[static_cast<size_t>(slot)].layers.empty()) return QUIRE_OK;
    return fail(QUIRE_INVALID_ARGUMENT, "%s: adapter slot %d is empty", kStep, slot);
}

int check_sequence(const QuireDecoderParams& p, const QuireStepParams& step, int seq) {
    const int begin = step.query_start_loc[seq], seq_len = step.seq_lens[seq];
    QUIRE_CHECK(check_range(kStep, "query_start_loc", step.query_start_loc[seq + 1], begin + 1, step.num_tokens));
    const int num_rows = step.query_start_loc[seq + 1] - begin;
    const int64_t room = int64_t{step.max_blocks} * p.block_size;
    QUIRE_CHECK(check_range(kStep, "seq_lens", seq_len, num_rows, room < p.max_positions ? room : p.max_positions));
    const int32_t* table = step.block_tables + seq * step.block_table_stride;
    for (int block = 0; block < (seq_len + p.block_size - 1) / p.block_size; ++block) {
        QUIRE_CHECK(check_range(kStep, "block_tables", table[block], 0, p.num_blocks - 1));
    }
    return QUIRE_OK;
}

int check_sample(const QuireDecoderParams& p, const QuireStepParams& step, const QuireSample& sample) {
    QUIRE_CHECK(check_range(kStep, "row of a sample", sample.row, 0, step.num_logits_rows - 1));
    if (!(sample.temperature >= 0.0f) || !(sample.top_p > 0.0f) || !(sample.min_p >= 0.0f && sample.min_p <= 1.0f)) {
        return fail(QUIRE_INVALID_ARGUMENT, "%s: temperature=%g, top_p=%g, min_p=%g of a sample", kStep,
                    static_cast<double>(sample.temperature), static_cast<double>(sample.top_p),
                    static_cast<double>(sample.min_p));
    }
    QUIRE_CHECK(check_range(kStep, "num_candidates", sample.num_candidates, 0, p.vocab_size));
    return sample.num_candidates > 0 ? check_not_null(kStep, "candidates", sample.candidates) : int{QUIRE_OK};
}

int check_step(const QuireDecoder& decoder, const QuireStepParams& step) {
    const QuireDecoderParams& p = decoder.params;
    QUIRE_CHECK(check_range(kStep, "num_threads", step.num_threads, 1, INT32_MAX));
    QUIRE_CHECK(check_range(kStep, "num_tokens", step.num_tokens, 1, 1 << 24));
    QUIRE_CHECK(check_range(kStep, "num_seqs", step.num_seqs, 1, step.num_tokens));
    QUIRE_CHECK(check_range(kStep, "max_blocks", step.max_blocks, 1, INT32_MAX));
    const bool draws = p.communicator == nullptr || p.communicator->rank() == 0;
    QUIRE_CHECK(check_range(kStep, "num_samples", step.num_samples, 0, draws ? 1 << 24 : 0));
    QUIRE_CHECK(check_not_null(kStep, "token_ids", step.token_ids));
    QUIRE_CHECK(check_not_null(kStep, "query_start_loc", step.query_start_loc));
    QUIRE_CHECK(check_not_null(kStep, "seq_lens", step.seq_lens));
    QUIRE_CHECK(check_not_null(kStep, "block_tables", step.block_tables));
    QUIRE_CHECK(check_range(kStep, "num_logits_rows", step.num_logits_rows, 0, step.num_tokens));
    if (step.num_samples > 0) QUIRE_CHECK(check_not_null(kStep, "samples", step.samples));
    if (step.num_logits_rows > 0) QUIRE_CHECK(check_not_null(kStep, "logits_rows", step.logits_rows));
    for (int i = 0; i < step.num_logits_rows; ++i) {
        QUIRE_CHECK(check_range(kStep, "logits_rows", step.logits_rows[i], 0, step.num_tokens - 1));
    }
    QUIRE_CHECK(check_range(kStep, "query_start_loc[0]", step.query_start_loc[0], 0, 0));
    for (int seq = 0; seq < step.num_seqs; ++seq) {
        QUIRE_CHECK(check_sequence(p, step, seq));
        if (step.adapter_slots != nullptr) QUIRE_CHECK(check_adapter_slot(decoder, step.adapter_slots[seq]));
    }
    QUIRE_CHECK(check_range(kStep, "query_start_loc of the end", step.query_start_loc[step.num_seqs], step.num_tokens,
                            step.num_tokens));
    for (int i = 0; i < step.num_tokens; ++i) {
        QUIRE_CHECK(check_range(kStep, "token_ids", step.token_ids[i], 0, p.vocab_size - 1));
    }
    for (int i = 0; i < step.num_samples; ++i) QUIRE_CHECK(check_sample(p, step, step.samples[i]));
    return QUIRE_OK;
}

}  // namespace

}  // namespace quire

using namespace quire;

int quire_kv_block_bytes(int32_t kv_type, int32_t num_layers, int32_t num_kv_heads, int32_t head_dim, int32_t block_size,
                         int64_t* bytes) {
    const char* const op = "kv_block_bytes";
    QUIRE_CHECK(check_range(op, "kv_type", kv_type, QUIRE_KV_FLOAT32, QUIRE_KV_INT8));
    QUIRE_CHECK(check_not_null(op, "bytes", bytes));
    *bytes = KVLayout{kv_type, head_dim, block_size, num_kv_heads, num_layers}.block_bytes();
    return QUIRE_OK;
}

int quire_decoder_create(const QuireDecoderParams* params, QuireDecoder** decoder) {
    if (params == nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: params is NULL", kCreate);
    QUIRE_CHECK(check_header(kCreate, params->size, params->abi_version, sizeof *params));
    QUIRE_CHECK(check_not_null(kCreate, "decoder", decoder));
    QUIRE_CHECK(check_isa());
    QUIRE_CHECK(check_decoder(*params));
    try {
        *decoder = make_decoder(*params);
        return QUIRE_OK;
    } catch (const std::bad_alloc&) {
        return fail(QUIRE_OUT_OF_MEMORY, "%s: no memory", kCreate);
    }
}

void quire_decoder_destroy(QuireDecoder* decoder) { delete decoder; }

int quire_decoder_step(QuireDecoder* decoder, const QuireStepParams* params) {
    QUIRE_CHECK(check_not_null(kStep, "decoder", decoder));
    if (params == nullptr) return fail(QUIRE_INVALID_ARGUMENT, "%s: params is NULL", kStep);
    QUIRE_CHECK(check_header(kStep, params->size, params->abi_version, sizeof *params));
    QUIRE_CHECK(check_step(*decoder, *params));
    try {
        return run_step(decoder, *params);
    } catch (const std::bad_alloc&) {
        return fail(QUIRE_OUT_OF_MEMORY, "%s: no memory for the step", kStep);
    }
}
