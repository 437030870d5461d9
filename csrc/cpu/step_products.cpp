#include "step_products.h"

namespace quire {

namespace {

RowForms form_for(const Step& step, const QuireWeight& w) {
    WeightFormat format{};
    if (w.data == nullptr || !format_of(w.type, &format)) return {false, false};
    return {format.quantized(), format.bits == 16 && step.kernels.matmul_bfloat16 != nullptr};
}

}  // namespace

RowForms forms_for(const Step& step, std::initializer_list<const QuireWeight*> readers) {
    RowForms forms{false, step.decoder.runs_round};
    for (const QuireWeight* w : readers) {
        const RowForms form = form_for(step, *w);
        forms = {forms.codes || form.codes, forms.rounded || form.rounded};
    }
    return forms;
}

void convert(const Step& step, const Activations& x, int64_t row, int64_t begin, int64_t end, RowForms forms) {
    if (forms.codes) step.kernels.quantize(x.row(row), row, begin, end, x.quantized());
    if (forms.rounded) step.kernels.round(x.row(row), row, begin, end, x.in_bfloat16());
}

void prepare(const Step& step, const Activations& x, int64_t count, int64_t columns,
             std::initializer_list<const QuireWeight*> readers) {
    const RowForms forms = forms_for(step, readers);
    if (forms.any()) step.for_rows(count, columns, [&](int64_t row) { convert(step, x, row, 0, columns, forms); });
}

ProductItems::ProductItems(const Step& step, std::initializer_list<Product> products, const Activations& x, int64_t count)
    : step_(step), products_(products), x_(x), count_(count) {
    const int num_threads = step.asked.num_threads;
    int64_t panels = 0;
    for (const Product& product : products) panels += num_panels(product.weight->n);
    const int64_t wanted = num_threads == 1 ? 1 : num_threads * kItemsPerThread;
    const int64_t row_blocks = (count + kRowBlock - 1) / kRowBlock;
    chunk_ = panels * row_blocks / wanted;
    chunk_ = chunk_ < 1 ? 1 : least(chunk_, 64);
    for (const Product& product : products) items_ += (num_panels(product.weight->n) + chunk_ - 1) / chunk_;
    size_ = items_ * row_blocks;
}

void ProductItems::run(int64_t item) const {
    const int64_t block = item / items_;
    int64_t index = item % items_;
    for (const Product& product : products_) {
        const int64_t panels_here = num_panels(product.weight->n), chunks = (panels_here + chunk_ - 1) / chunk_;
        if (index < chunks) {
            const int64_t first = index * chunk_, end = least(first + chunk_, panels_here);
            const MatmulRange range{block * kRowBlock, least((block + 1) * kRowBlock, count_), first, end};
            return multiply_range(step_, product, x_, range);
        }
        index -= chunks;
    }
}

void multiply(const Step& step, std::initializer_list<Product> products, const Activations& x, int64_t count) {
    const ProductItems items(step, products, x, count);
    parallel_for(step.asked.num_threads, items.size(), [&](int64_t item) { items.run(item); });
}

void multiply_range(const Step& step, const Product& product, const Activations& x, const MatmulRange& range) {
    const QuireWeight& w = *product.weight;
    const float* const bias = w.bias == nullptr ? nullptr : w.bias + range.first_panel * kPanel;
    const MatmulOutput out{product.out + range.first_panel * kPanel, product.out_stride, bias, product.add};
    const RowForms form = form_for(step, w);
    if (form.codes) {
        step.kernels.matmul_quantized(w, x.quantized(), range, out);
    } else if (form.rounded) {
        step.kernels.matmul_bfloat16(w, x.in_bfloat16(), range, out);
    } else {
        step.kernels.matmul_float(w, x.values.data(), x.width, range, out);
    }
}

}  // namespace quire
