// Paged attention on tensor cores: which calls they take, and how a call is shared out between the kernels.
//
// Sequences of one row are decodes (decode_attention.cuh), all others prompts (prefill_attention.cuh); a mixed batch is
// a launch of each. With splits of a fixed size the prompts' kernel takes the decodes too, since the two sum in
// different orders.
#include "matrix_attention.h"

#include <vector>

namespace quire {
namespace {

constexpr const char* kName = "paged_attention";

// Of partial results of prompts: more rows than fit are computed one launch after another.
constexpr int64_t kMaxPartialBytes = int64_t{32} << 20;

// Counts the workspace's parts, each 16-byte aligned, and places them once there is a base.
class Workspace {
public:
    explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}

    float* floats(int64_t count) {
        const int64_t offset = bytes_;
        bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(float)), 16) * 16;
        return base_ == nullptr ? nullptr : reinterpret_cast<float*>(base_ + offset);
    }
    int64_t bytes() const { return bytes_; }

private:
    unsigned char* base_;
    int64_t bytes_ = 0;
};

// How one call is computed. The grids follow from shapes and upper bounds alone: a CUDA graph replays them.
struct MatrixPlan {
    bool has_decodes, has_prefills;
    int heads;  // KV heads times chunks of their vectors
    int vectors, warps;
    DecodeArguments decodes;
    PrefillArguments prefills;
    int64_t workspace_bytes;
};

TileKernel<DecodeArguments> kernel_of(const QuirePagedAttentionParams& p, const DecodeArguments&, int vectors) {
    return p.dtype == QUIRE_BFLOAT16 ? decode_kernel<__nv_bfloat16>(p.head_dim, vectors)
                                     : decode_kernel<__half>(p.head_dim, vectors);
}

TileKernel<PrefillArguments> kernel_of(const QuirePagedAttentionParams& p, const PrefillArguments&, int warps) {
    return p.dtype == QUIRE_BFLOAT16 ? prefill_kernel<__nv_bfloat16>(p.head_dim, warps)
                                     : prefill_kernel<__half>(p.head_dim, warps);
}

int plan_decodes(const QuirePagedAttentionParams& p, MatrixPlan* plan, Workspace* workspace) {
    DecodeArguments& args = plan->decodes;
    plan->vectors = args.group <= 8 ? 8 : 16;
    args.head_dim = p.head_dim;
    args.run_tokens = decode_run(p.head_dim);
    args.chunks = static_cast<int32_t>(ceil_div(args.group, plan->vectors));
    plan->heads = p.num_kv_heads * args.chunks;
    int ctas = 0;
    if (int status = kernel_of(p, args, plan->vectors).resident(&ctas)) return status;
    args.max_shares = static_cast<int32_t>(max_shares_of_head(ctas, plan->heads));
    if (args.max_shares > 1) {
        const int64_t results = int64_t{args.max_shares} * plan->heads * 2 * plan->vectors;
        args.partial_out = workspace->floats(results * p.head_dim);
        args.partial_lse = workspace->floats(results);
    }
    return QUIRE_OK;
}

int plan_prefills(const QuirePagedAttentionParams& p, MatrixPlan* plan, Workspace* workspace) {
    PrefillArguments& args = plan->prefills;
    // Wide tiles read K and V half as often, where there are vectors to fill them.
    plan->warps = p.head_dim <= 128 && static_cast<int64_t>(p.max_query_len) * args.group > 64 ? 8 : 4;
    args.head_dim = p.head_dim;
    args.skips_decodes = plan->has_decodes;
    int ctas = 0;
    if (int status = kernel_of(p, args, plan->warps).resident(&ctas)) return status;
    const int64_t busy = ceil_div(int64_t{p.num_tokens} * args.group, 16 * plan->warps) * p.num_kv_heads;
    const Splits splits = plan_splits(busy, ctas, p.max_seq_len, p.split_tokens);
    QUIRE_REQUIRE(splits.count <= 65535, "%s: max_seq_len=%d has over 65535 splits of split_tokens=%d", kName,
                  p.max_seq_len, p.split_tokens);
    args.split_tokens = splits.tokens;
    args.num_splits = splits.count;
    args.single_rows = p.max_query_len <= 1;
    args.rows_at_once = p.num_tokens;
    if (splits.count > 1) {
        const int64_t row_bytes = int64_t{splits.count} * p.num_heads * (p.head_dim + 1) * int64_t{sizeof(float)};
        const int64_t rows = kMaxPartialBytes / row_bytes;
        args.rows_at_once = static_cast<int32_t>(rows < 1 ? 1 : rows < p.num_tokens ? rows : p.num_tokens);
        const int64_t results = int64_t{splits.count} * args.rows_at_once * p.num_heads;
        args.partial_out = workspace->floats(results * p.head_dim);
        args.partial_lse = workspace->floats(results);
    }
    return QUIRE_OK;
}

int make_plan(const QuirePagedAttentionParams& p, const AttentionArguments& args, MatrixPlan* plan) {
    *plan = {};
    static_cast<AttentionArguments&>(plan->decodes) = args;
    static_cast<AttentionArguments&>(plan->prefills) = args;
    plan->has_decodes = p.split_tokens == 0 && p.num_seqs > 0;
    plan->has_prefills = p.split_tokens != 0 || p.max_query_len > 1 || p.num_seqs == 0;
    Workspace workspace(p.workspace);
    if (plan->has_decodes) {
        if (int status = plan_decodes(p, plan, &workspace)) return status;
    }
    if (plan->has_prefills) {
        if (int status = plan_prefills(p, plan, &workspace)) return status;
    }
    plan->workspace_bytes = workspace.bytes();
    return QUIRE_OK;
}

int launch_decode_part(const QuirePagedAttentionParams& p, const MatrixPlan& plan, cudaStream_t stream) {
    const DecodeArguments& args = plan.decodes;
    const dim3 grid(static_cast<unsigned>(plan.heads), static_cast<unsigned>(args.max_shares));
    const int status = kernel_of(p, args, plan.vectors).launch(args, grid, stream);
    if (status || args.max_shares == 1) return status;
    return launch_merge_shares(args, plan.vectors, plan.heads, stream);
}

int launch_prefill_rows(const QuirePagedAttentionParams& p, const MatrixPlan& plan, int first_row, cudaStream_t stream) {
    PrefillArguments args = plan.prefills;
    args.first_row = first_row;
    args.end_row = p.num_tokens - first_row > args.rows_at_once ? first_row + args.rows_at_once : p.num_tokens;
    const int64_t tiles = tiles_of_rows(args, 16 * plan.warps);
    QUIRE_REQUIRE(tiles <= INT32_MAX, "%s: %lld tiles of query rows exceed 2^31 - 1", kName,
                  static_cast<long long>(tiles));
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.num_kv_heads),
                    static_cast<unsigned>(args.num_splits));
    const int status = kernel_of(p, args, plan.warps).launch(args, grid, stream);
    if (status || args.num_splits == 1) return status;
    return launch_merge_splits(args, stream);
}

int launch_prefill_part(const QuirePagedAttentionParams& p, const MatrixPlan& plan, cudaStream_t stream) {
    for (int64_t row = 0; row < p.num_tokens; row += plan.prefills.rows_at_once) {
        if (int status = launch_prefill_rows(p, plan, static_cast<int>(row), stream)) return status;
    }
    return QUIRE_OK;
}

}  // namespace

int resident_ctas(const void* kernel, int threads, int shared_bytes, int* ctas) {
    struct Known {
        const void* kernel;
        int device, ctas;
    };
    // Asking takes microseconds, and a step has dozens of layers.
    static thread_local std::vector<Known> known;
    int device = 0;
    if (int status = check_cuda(cudaGetDevice(&device), kName)) return status;
    for (const Known& one : known) {
        if (one.kernel == kernel && one.device == device) {
            *ctas = one.ctas;
            return QUIRE_OK;
        }
    }
    int processors = 0, each = 0;
    const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (int status = check_cuda(allowed, kName)) return status;
    const cudaError_t counted = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (int status = check_cuda(counted, kName)) return status;
    const cudaError_t asked = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
    if (int status = check_cuda(asked, kName)) return status;
    *ctas = processors * (each > 0 ? each : 1);
    known.push_back({kernel, device, *ctas});
    return QUIRE_OK;
}

bool matrix_attention_takes(const QuirePagedAttentionParams& p) {
    const int dim = p.head_dim;
    return p.dtype == p.cache_dtype && p.dtype != QUIRE_FLOAT32 && p.block_size >= kDecodeTokens && p.scale > 0.0f &&
           (dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256) && is_aligned(p.query, 16) &&
           is_aligned(p.out, 4) && p.query_token_stride % 8 == 0 && p.query_head_stride % 8 == 0;
}

int matrix_attention_workspace(const QuirePagedAttentionParams& p, const AttentionArguments& args, int64_t* bytes) {
    MatrixPlan plan;
    if (int status = make_plan(p, args, &plan)) return status;
    *bytes = plan.workspace_bytes;
    return QUIRE_OK;
}

int launch_matrix_attention(const QuirePagedAttentionParams& p, const AttentionArguments& args) {
    MatrixPlan plan;
    if (int status = make_plan(p, args, &plan)) return status;
    QUIRE_REQUIRE(plan.workspace_bytes == 0 ||
                      (p.workspace_bytes >= plan.workspace_bytes && p.workspace != nullptr && is_aligned(p.workspace, 16)),
                  "%s: the workspace at %p of workspace_bytes=%lld must be 16-byte aligned and have %lld bytes", kName,
                  p.workspace, static_cast<long long>(p.workspace_bytes), static_cast<long long>(plan.workspace_bytes));
    const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);
    if (plan.has_decodes) {
        if (int status = launch_decode_part(p, plan, stream)) return status;
    }
    return plan.has_prefills ? launch_prefill_part(p, plan, stream) : QUIRE_OK;
}

}  // namespace quire
