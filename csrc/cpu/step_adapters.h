// What adapters add to a step's products: y += (x A^T) B^T for the rows of each, in runs of rows that have the same one.
//
// Both products go through the kernels of the weights, whose outputs are one chain along K: a row's result does not depend
// on the rows beside it. The adapter's part is added to the finished base product, in one addition.
#pragma once

#include "step_products.h"

namespace quire {

// A place where adapters add something: matrices of one layer that read one input.
struct AdapterSite {
    int layer;
    QuireAdapterGroup QuireAdapterLayer::* group;
};

// Which rows of the step have which adapter. Before anything is converted.
void cut_adapter_runs(QuireDecoder& decoder, const QuireStepParams& asked, const DecoderKernels& kernels);

// Room for x A^T. False if there is no memory.
bool reserve_adapted(const Step& step);

// All rows of x times each product's weight, with what the adapters add; products[i] is the group's b[i].
void multiply_adapted(const Step& step, std::initializer_list<Product> products, const Activations& x, AdapterSite site);

// x A^T of the runs, for calls of `expand`.
void shrink(const Step& step, const Activations& x, AdapterSite site);

// What the group's b[index] adds to a range of a product that is already there.
void expand(const Step& step, const Product& product, AdapterSite site, int index, const MatmulRange& range);

}  // namespace quire
