// Penalties and biases on the device, as engine/decoding/penalties.py has them, bit for bit: one CTA for each row. The
// last token of a sequence may be one that only the device knows, as the step before drew it.
#include "host.h"
#include "quire_cuda.h"

namespace quire {
namespace {

constexpr int kThreads = 128;

// Each operation rounds by itself, in the types that the host computes in.
__device__ __forceinline__ void adjust(float* logits, const QuireAdjustedRow& row, const QuireAdjustment& change) {
    float logit = logits[change.token_id];
    if (change.seen) {
        logit = logit > 0.0f ? logit / row.repetition_penalty : __fmul_rn(logit, row.repetition_penalty);
    }
    if (change.count > 0) {
        const double penalty = __dadd_rn(__dmul_rn(row.frequency_penalty, change.count), row.presence_penalty);
        logit = __fsub_rn(logit, static_cast<float>(penalty));
    }
    logits[change.token_id] = __fadd_rn(logit, change.bias);
}

__global__ void __launch_bounds__(kThreads)
    adjust_logits_kernel(float* logits, int vocab_size, const QuireAdjustedRow* __restrict__ rows,
                         const QuireAdjustment* __restrict__ adjustments, const QuireDrawn* __restrict__ drawn) {
    __shared__ int listed;
    const QuireAdjustedRow row = rows[blockIdx.x];
    float* const own = logits + static_cast<int64_t>(blockIdx.x) * vocab_size;
    const int awaited = row.awaited >= 0 ? drawn[row.awaited].token_id : -1;
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.num_adjustments; i += kThreads) {
        QuireAdjustment change = adjustments[row.first + i];
        if (change.token_id == awaited) {
            listed = 1;
            ++change.count;
            change.seen = 1;
        }
        adjust(own, row, change);
    }
    __syncthreads();
    if (awaited >= 0 && !listed && threadIdx.x == 0) adjust(own, row, {awaited, 1, 1, 0.0f});
}

}  // namespace
}  // namespace quire

int quire_adjust_logits(const QuireAdjustLogitsParams* params) {
    using namespace quire;
    if (int status = check_params(params, "adjust_logits")) return status;
    const QuireAdjustLogitsParams& p = *params;
    QUIRE_REQUIRE(p.num_rows >= 0 && p.vocab_size >= 1, "adjust_logits: num_rows=%d and vocab_size=%d must be at least 0 and 1",
                  p.num_rows, p.vocab_size);
    QUIRE_REQUIRE(p.reserved == 0, "adjust_logits: reserved=%d must be 0", p.reserved);
    if (p.num_rows == 0) return QUIRE_OK;
    QUIRE_REQUIRE(p.logits != nullptr && p.rows != nullptr && p.adjustments != nullptr,
                  "adjust_logits: logits, rows or adjustments is null");
    adjust_logits_kernel<<<static_cast<unsigned>(p.num_rows), kThreads, 0, static_cast<cudaStream_t>(p.stream)>>>(
        p.logits, p.vocab_size, p.rows, p.adjustments, p.drawn);
    return check_launch("adjust_logits");
}
