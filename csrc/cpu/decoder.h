// A decoder: its description, checked and copied, and the buffers of its steps.
#pragma once

#include <stdlib.h>

#include <memory>
#include <vector>

#include "attention_plan.h"
#include "communicator.h"
#include "decoder_kernels.h"
#include "kv_layout.h"
#include "packed.h"

namespace quire {

// Memory that grows, aligned for vectors; its content does not survive growth.
template <typename T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(data_); }

    // False if there is no memory.
    bool reserve(int64_t count) {
        if (count <= capacity_) return true;
        free(data_);
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(aligned_alloc(64, bytes));
        capacity_ = data_ == nullptr ? 0 : count;
        return data_ != nullptr;
    }

    T* data() const { return data_; }

private:
    T* data_ = nullptr;
    int64_t capacity_ = 0;
};

// Rows of float32 and, as the weights that read them want it, the same rows as bytes or in bfloat16. `width` is in full panels and records.
struct Activations {
    Buffer<float> values;
    Buffer<int8_t> codes;
    Buffer<RecordScale> records;
    Buffer<uint16_t> rounded;
    int64_t width = 0;

    bool reserve(int64_t rows, int64_t columns) {
        width = (columns + kRecord - 1) / kRecord * kRecord;
        return values.reserve(rows * width) && codes.reserve(rows * width) && records.reserve(rows * width / kRecord) &&
               rounded.reserve(rows * width);
    }
    float* row(int64_t index) const { return values.data() + index * width; }
    QuantizedRows quantized() const { return {codes.data(), records.data(), width}; }
    RoundedRows in_bfloat16() const { return {rounded.data(), width}; }
};

inline int64_t padded_to_panel(int64_t n) { return num_panels(n) * kPanel; }

// Token ids whose rows of the embedding and of the head a rank holds.
struct VocabRange {
    int32_t begin;
    int32_t end;

    int32_t size() const { return end - begin; }
};

inline VocabRange vocab_of(const QuireDecoderParams& p, int rank) {
    return p.communicator == nullptr ? VocabRange{0, p.vocab_size} : VocabRange{p.vocab_starts[rank], p.vocab_starts[rank + 1]};
}
inline VocabRange own_vocab(const QuireDecoderParams& p) {
    return vocab_of(p, p.communicator == nullptr ? 0 : p.communicator->rank());
}

// An adapter in its slot: a table as long as the decoder's layers, or none.
struct Adapter {
    std::vector<QuireAdapterLayer> layers;
    int64_t width = 0;  // the largest sum of ranks of a group
    bool in_bfloat16 = false;
};

// Rows of a step that have one adapter; a longer stretch is cut into several.
struct AdapterRun {
    int32_t slot;
    int64_t first_row;
    int64_t end_row;
};

}  // namespace quire

struct QuireDecoder {
    QuireDecoderParams params;
    std::vector<QuireDecoderLayer> layers;
    quire::KVLayout layout;

    std::vector<int32_t> vocab_starts;
    std::vector<quire::Adapter> adapters;  // by slot

    // Biases in full panels, which the weights above point to.
    std::vector<std::unique_ptr<std::vector<float>>> biases;

    // Of the step in hand.
    std::vector<int32_t> positions;  // of each row
    std::vector<int64_t> slots;
    std::vector<quire::QueryTile> tiles;
    std::vector<quire::AdapterRun> runs;  // by their first rows
    bool runs_round = false;              // some of them want their input in bfloat16
    quire::Buffer<float> residual;    // [tokens, hidden_size]
    quire::Activations normed;        // what attention and MLP read
    quire::Activations qkv;           // q, then k, then v, each in full panels
    quire::Activations attended;
    quire::Activations inner;         // of the MLP
    quire::Activations branch;        // what attention or MLP adds to the residual, where it is summed or normed first
    quire::Activations adapted;       // x A^T: [tokens, a group's ranks]
    quire::Activations embedded;      // [rows, embedding_dim]
    quire::Buffer<float> logits;      // [samples, vocab_size in full panels], or this rank's part of the vocabulary
};
