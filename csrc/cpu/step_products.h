// A step's matrix products: rows of activations times packed weights.
#pragma once

#include <initializer_list>

#include "step.h"

namespace quire {

constexpr int64_t kRowBlock = 96;       // rows that pass over a panel together: their codes stay in the L2 cache
constexpr int64_t kItemsPerThread = 6;  // of a matrix product, so that the last item is short

// One of the products that share an input.
struct Product {
    const QuireWeight* weight;
    float* out;  // of row 0
    int64_t out_stride;
    bool add;
};

// What some rows' readers want beside float32.
struct RowForms {
    bool codes;    // for weights that are codes
    bool rounded;  // for bfloat16 weights, if the instruction set multiplies that

    bool any() const { return codes || rounded; }
};

// Those of the weights, and of the adapters in use beside them.
RowForms forms_for(const Step& step, std::initializer_list<const QuireWeight*> readers);

// Columns begin .. end of a row into these forms; as for DecoderKernels::quantize.
void convert(const Step& step, const Activations& x, int64_t row, int64_t begin, int64_t end, RowForms forms);

// All columns of the first `count` rows into what their readers want.
void prepare(const Step& step, const Activations& x, int64_t count, int64_t columns,
             std::initializer_list<const QuireWeight*> readers);

// The items of some products of the first `count` rows of x, to be run in any order and on any thread. `products` must
// outlive it.
class ProductItems {
public:
    ProductItems(const Step& step, std::initializer_list<Product> products, const Activations& x, int64_t count);

    int64_t size() const { return size_; }
    void run(int64_t item) const;

private:
    const Step& step_;
    const std::initializer_list<Product> products_;
    const Activations& x_;
    const int64_t count_;
    int64_t chunk_ = 0;  // panels of an item
    int64_t items_ = 0;  // of a row block
    int64_t size_ = 0;
};

// The first `count` rows of x times each product's weight.
void multiply(const Step& step, std::initializer_list<Product> products, const Activations& x, int64_t count);

// One item of it.
void multiply_range(const Step& step, const Product& product, const Activations& x, const MatmulRange& range);

}  // namespace quire
