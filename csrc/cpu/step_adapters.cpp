#include "step_adapters.h"

namespace quire {

namespace {

constexpr int64_t kRunRows = 24;          // of a run: two full tiles of the widest kernels
constexpr int64_t kInlineProducts = 1 << 17;  // multiply-adds that are not worth waking a helper
constexpr int64_t kExpandPanels = 16;     // of an item

const QuireAdapterGroup& group_of(const Step& step, const AdapterRun& run, AdapterSite site) {
    const Adapter& adapter = step.decoder.adapters[static_cast<size_t>(run.slot)];
    return adapter.layers[static_cast<size_t>(site.layer)].*site.group;
}

// Columns of x from `first_column` on times w.
void multiply_columns(const Step& step, const QuireWeight& w, const Activations& x, int64_t first_column,
                      const MatmulRange& range, const MatmulOutput& out) {
    if (w.type == QUIRE_WEIGHT_BFLOAT16 && step.kernels.matmul_bfloat16 != nullptr) {
        step.kernels.matmul_bfloat16(w, {x.rounded.data() + first_column, x.width}, range, out);
    } else {
        step.kernels.matmul_float(w, x.values.data() + first_column, x.width, range, out);
    }
}

void shrink_run(const Step& step, const AdapterRun& run, const Activations& x, AdapterSite site) {
    const QuireAdapterGroup& group = group_of(step, run, site);
    if (group.a.data == nullptr) return;
    const Activations& adapted = step.decoder.adapted;
    const MatmulRange range{run.first_row, run.end_row, 0, num_panels(group.a.n)};
    multiply_columns(step, group.a, x, 0, range, {adapted.row(0), adapted.width, nullptr, false});
    const RowForms forms{false, group.a.type == QUIRE_WEIGHT_BFLOAT16 && step.kernels.matmul_bfloat16 != nullptr};
    if (!forms.any()) return;
    for (int64_t row = run.first_row; row < run.end_row; ++row) convert(step, adapted, row, 0, group.a.n, forms);
}

void expand_run(const Step& step, const AdapterRun& run, const Product& product, AdapterSite site, int index,
                const MatmulRange& range) {
    const QuireAdapterGroup& group = group_of(step, run, site);
    const QuireWeight& b = group.b[index];
    if (b.data == nullptr) return;
    int64_t first_column = 0;
    for (int i = 0; i < index; ++i) first_column += group.b[i].k;
    multiply_columns(step, b, step.decoder.adapted, first_column, range,
                     {product.out + range.first_panel * kPanel, product.out_stride, nullptr, true});
}

// The adapters' part of finished products.
void expand_all(const Step& step, std::initializer_list<Product> products, AdapterSite site) {
    const std::vector<AdapterRun>& runs = step.decoder.runs;
    int64_t panels = 0, rows = 0;
    for (const Product& product : products) panels += num_panels(product.weight->n);
    for (const AdapterRun& run : runs) rows += run.end_row - run.first_row;
    const bool is_small = rows * panels * kPanel * step.decoder.adapted.width < kInlineProducts;
    const int64_t chunk = is_small ? panels : kExpandPanels;
    int64_t chunks = 0;
    for (const Product& product : products) chunks += (num_panels(product.weight->n) + chunk - 1) / chunk;
    const int64_t size = chunks * static_cast<int64_t>(runs.size());
    parallel_for(is_small ? 1 : step.asked.num_threads, size, [&](int64_t item) {
        const AdapterRun& run = runs[static_cast<size_t>(item / chunks)];
        int64_t chunk_index = item % chunks;
        int index = 0;
        for (const Product& product : products) {
            const int64_t panels_here = num_panels(product.weight->n), here = (panels_here + chunk - 1) / chunk;
            if (chunk_index < here) {
                const int64_t first = chunk_index * chunk;
                return expand_run(step, run, product, site, index,
                                  {run.first_row, run.end_row, first, least(first + chunk, panels_here)});
            }
            chunk_index -= here;
            ++index;
        }
    });
}

}  // namespace

void cut_adapter_runs(QuireDecoder& decoder, const QuireStepParams& asked, const DecoderKernels& kernels) {
    decoder.runs.clear();
    decoder.runs_round = false;
    if (asked.adapter_slots == nullptr) return;
    for (int seq = 0; seq < asked.num_seqs; ++seq) {
        const int32_t slot = asked.adapter_slots[seq];
        if (slot < 0) continue;
        const Adapter& adapter = decoder.adapters[static_cast<size_t>(slot)];
        decoder.runs_round |= adapter.in_bfloat16 && kernels.matmul_bfloat16 != nullptr;
        const int64_t end = asked.query_start_loc[seq + 1];
        for (int64_t row = asked.query_start_loc[seq]; row < end;) {
            const bool joins = !decoder.runs.empty() && decoder.runs.back().slot == slot &&
                               decoder.runs.back().end_row == row &&
                               row - decoder.runs.back().first_row < kRunRows;
            if (!joins) decoder.runs.push_back({slot, row, row});
            AdapterRun& run = decoder.runs.back();
            run.end_row = row = least(end, run.first_row + kRunRows);
        }
    }
}

bool reserve_adapted(const Step& step) {
    int64_t width = 0;
    for (const AdapterRun& run : step.decoder.runs) {
        const int64_t wanted = step.decoder.adapters[static_cast<size_t>(run.slot)].width;
        width = wanted > width ? wanted : width;
    }
    return width == 0 || step.decoder.adapted.reserve(step.rows(), width);
}

void multiply_adapted(const Step& step, std::initializer_list<Product> products, const Activations& x, AdapterSite site) {
    const std::vector<AdapterRun>& runs = step.decoder.runs;
    if (runs.empty()) return multiply(step, products, x, step.rows());
    const ProductItems items(step, products, x, step.rows());
    const int64_t num_runs = static_cast<int64_t>(runs.size());
    parallel_for(step.asked.num_threads, num_runs + items.size(), [&](int64_t item) {
        if (item < num_runs) return shrink_run(step, runs[static_cast<size_t>(item)], x, site);
        items.run(item - num_runs);
    });
    expand_all(step, products, site);
}

void shrink(const Step& step, const Activations& x, AdapterSite site) {
    const std::vector<AdapterRun>& runs = step.decoder.runs;
    if (runs.empty()) return;
    parallel_for(step.asked.num_threads, static_cast<int64_t>(runs.size()),
                 [&](int64_t item) { shrink_run(step, runs[static_cast<size_t>(item)], x, site); });
}

void expand(const Step& step, const Product& product, AdapterSite site, int index, const MatmulRange& range) {
    for (const AdapterRun& run : step.decoder.runs) {
        const int64_t first = run.first_row > range.first_row ? run.first_row : range.first_row;
        const int64_t end = least(run.end_row, range.end_row);
        if (first < end) expand_run(step, run, product, site, index, {first, end, range.first_panel, range.end_panel});
    }
}

}  // namespace quire
