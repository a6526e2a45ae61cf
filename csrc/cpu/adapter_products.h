// Gradients of one layer's A and B as grouped products.
#pragma once

#include "adapter_gradients.h"

namespace prelora::cpu {

// As adapter_gradients, of fp32 throughout: S and all dS_i in one call, dA and all dB_i in another, which read x and dy
// once each. Where ranks are large, blocks that are packed for each product make up for the second time.
void adapter_gradients_by_products(const AdapterGradients& gradients, int64_t threads, const Parallel& parallel);

}  // namespace prelora::cpu
