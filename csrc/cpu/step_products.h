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

bool is_quantized(const QuireWeight& w);

// Does one of the weights want its rows as bytes too?
bool wants_codes(std::initializer_list<const QuireWeight*> weights);

// The rows as bytes too, if one of the weights that will read them is made of codes.
void prepare(const Step& step, const Activations& x, int64_t count, int64_t columns,
             std::initializer_list<const QuireWeight*> readers);

// The first `count` rows of x times each product's weight.
void multiply(const Step& step, std::initializer_list<Product> products, const Activations& x, int64_t count);

// One item of it.
void multiply_range(const Step& step, const Product& product, const Activations& x, const MatmulRange& range);

}  // namespace quire
