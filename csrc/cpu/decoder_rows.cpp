// A decoder's work on single rows of float32: norms, activations, quantisation, rotation.
#include "decoder_kernels.h"
#include "vec.h"

namespace quire {
namespace QUIRE_ISA {

namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int kRecord = 32;

inline Vec load_up_to(const float* p, int64_t n) { return n >= kWidth ? Vec::load(p) : load_partial(p, n); }
inline void store_up_to(Vec x, float* p, int64_t n) { n >= kWidth ? x.store(p) : store_partial(x, p, n); }

// erf by Abramowitz and Stegun 7.1.26 is too coarse for logits (1.5e-7 absolute is not); so the C library's.
inline float gelu(float x) { return 0.5f * x * (1.0f + __builtin_erff(x * 0.70710678f)); }

inline Vec gelu_tanh(Vec x) {
    // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
    const Vec u = x * fma(x * x, Vec::set1(0.044715f * 0.79788456f), Vec::set1(0.79788456f));
    return x / (Vec::set1(1.0f) + exp(Vec::set1(-2.0f) * u));
}

inline Vec activation(Vec x, int kind) {
    if (kind == QUIRE_ACTIVATION_SILU) return x / (Vec::set1(1.0f) + exp(Vec::set1(0.0f) - x));
    if (kind == QUIRE_ACTIVATION_RELU) return quire::QUIRE_ISA::max(Vec::set1(0.0f), x);
    if (kind == QUIRE_ACTIVATION_GELU_TANH) return gelu_tanh(x);
    float lanes[kWidth];
    x.store(lanes);
    for (float& lane : lanes) lane = gelu(lane);
    return Vec::load(lanes);
}

}  // namespace

void decoder_norm(const float* x, const NormArguments& norm, int64_t dim, float* out) {
    Vec sums = Vec::set1(0.0f);
    float mean = 0.0f;
    if (norm.layer_norm) {
        for (int64_t i = 0; i < dim; i += kWidth) sums = sums + load_up_to(x + i, dim - i);
        mean = sums.sum() / static_cast<float>(dim);
        sums = Vec::set1(0.0f);
    }
    const Vec means = Vec::set1(mean);
    for (int64_t i = 0; i < dim; i += kWidth) {
        Vec centred = load_up_to(x + i, dim - i) - means;
        if (dim - i < kWidth && norm.layer_norm) {  // lanes past the end are not -mean
            float lanes[kWidth];
            centred.store(lanes);
            centred = load_partial(lanes, dim - i);
        }
        sums = fma(centred, centred, sums);
    }
    const Vec factor = Vec::set1(1.0f / __builtin_sqrtf(sums.sum() / static_cast<float>(dim) + norm.eps));
    for (int64_t i = 0; i < dim; i += kWidth) {
        Vec value = (load_up_to(x + i, dim - i) - means) * factor * load_up_to(norm.weight + i, dim - i);
        if (norm.bias != nullptr) value = value + load_up_to(norm.bias + i, dim - i);
        store_up_to(value, out + i, dim - i);
    }
}

void decoder_add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) store_up_to(load_up_to(x + i, n - i) + load_up_to(y + i, n - i), x + i, n - i);
}

void decoder_activate(float* gate, const float* up, int64_t n, int kind) {
    for (int64_t i = 0; i < n; i += kWidth) {
        Vec value = activation(load_up_to(gate + i, n - i), kind);
        if (up != nullptr) value = value * load_up_to(up + i, n - i);
        store_up_to(value, gate + i, n - i);
    }
}

void decoder_rotate(float* head, const float* cos_sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i += kWidth) {
        const int64_t rest = half - i;
        const Vec first = load_up_to(head + i, rest), second = load_up_to(head + half + i, rest);
        const Vec c = load_up_to(cos_sin + i, rest), s = load_up_to(cos_sin + half + i, rest);
        store_up_to(first * c - second * s, head + i, rest);
        store_up_to(second * c + first * s, head + half + i, rest);
    }
}

void decoder_quantize(const float* x, int64_t row, int64_t begin, int64_t end, const QuantizedRows& out) {
    int8_t* const codes = out.codes + row * out.stride;
    RecordScale* const records = out.records + row * (out.stride / kRecord);
    for (int64_t at = begin; at < end; at += kRecord) {
        float padded[kRecord];
        const float* values = x + at;
        if (end - at < kRecord) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, values, sizeof(float) * static_cast<size_t>(end - at));
            values = padded;
        }
        Vec lanes = Vec::set1(0.0f);
        for (int i = 0; i < kRecord; i += kWidth) {
            const Vec value = Vec::load(values + i);
            lanes = quire::QUIRE_ISA::max(lanes, quire::QUIRE_ISA::max(value, Vec::set1(0.0f) - value));
        }
        const float largest = lanes.largest();
        const Vec inverse = Vec::set1(largest > 0.0f ? 127.0f / largest : 0.0f);
        RecordScale& record = records[at / kRecord];
        record.scale = largest / 127.0f;
        float total = 0.0f;  // whole numbers: exact in any order
        for (int half = 0; half < 2; ++half) {
            Vec sum = Vec::set1(0.0f);
            for (int i = half * 16; i < half * 16 + 16; i += kWidth) {
                const Vec code = round(Vec::load(values + i) * inverse);
                code.store(codes + at + i);
                sum = sum + code;
            }
            record.half_sums[half] = static_cast<int32_t>(sum.sum());
            total += sum.sum();
        }
        record.total = record.scale * total;
    }
}

}  // namespace QUIRE_ISA
}  // namespace quire
