#include "step_products.h"

namespace quire {

bool is_quantized(const QuireWeight& w) {
    WeightFormat format{};
    return w.data != nullptr && format_of(w.type, &format) && format.quantized();
}

bool wants_codes(std::initializer_list<const QuireWeight*> weights) {
    for (const QuireWeight* w : weights) {
        if (is_quantized(*w)) return true;
    }
    return false;
}

void prepare(const Step& step, const Activations& x, int64_t count, int64_t columns,
             std::initializer_list<const QuireWeight*> readers) {
    if (!wants_codes(readers)) return;
    step.for_rows(count, columns,
                  [&](int64_t row) { step.kernels.quantize(x.row(row), row, 0, columns, x.quantized()); });
}

void multiply(const Step& step, std::initializer_list<Product> products, const Activations& x, int64_t count) {
    const int num_threads = step.asked.num_threads;
    int64_t panels = 0;
    for (const Product& product : products) panels += num_panels(product.weight->n);
    const int64_t wanted = num_threads == 1 ? 1 : num_threads * kItemsPerThread;
    const int64_t row_blocks = (count + kRowBlock - 1) / kRowBlock;
    int64_t chunk = panels * row_blocks / wanted;
    chunk = chunk < 1 ? 1 : least(chunk, 64);
    int64_t items = 0;
    for (const Product& product : products) items += (num_panels(product.weight->n) + chunk - 1) / chunk;
    parallel_for(num_threads, items * row_blocks, [&](int64_t item) {
        const int64_t block = item / items;
        int64_t index = item % items;
        for (const Product& product : products) {
            const int64_t panels_here = num_panels(product.weight->n), chunks = (panels_here + chunk - 1) / chunk;
            if (index < chunks) {
                const int64_t first = index * chunk, end = least(first + chunk, panels_here);
                const MatmulRange range{block * kRowBlock, least((block + 1) * kRowBlock, count), first, end};
                return multiply_range(step, product, x, range);
            }
            index -= chunks;
        }
    });
}

void multiply_range(const Step& step, const Product& product, const Activations& x, const MatmulRange& range) {
    const QuireWeight& w = *product.weight;
    const float* const bias = w.bias == nullptr ? nullptr : w.bias + range.first_panel * kPanel;
    const MatmulOutput out{product.out + range.first_panel * kPanel, product.out_stride, bias, product.add};
    if (is_quantized(w)) {
        step.kernels.matmul_quantized(w, x.quantized(), range, out);
    } else {
        step.kernels.matmul_float(w, x.values.data(), x.width, range, out);
    }
}

}  // namespace quire
