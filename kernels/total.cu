// total.cu - the weighted sum of losses.   Definition: src/ops/total.rs
#include "common.cuh"

// y[0] += w x[0]. One thread.
extern "C" __global__ void add_scaled_scalar(float* __restrict__ y, const float* __restrict__ x, float w) { y[0] += w * x[0]; }
KERNEL(add_scaled_scalar)
