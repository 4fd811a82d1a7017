// add.cu - sums of tensors.   Definition: src/ops/add.rs
//
//   add   y = a + b, in f32, rounded once           Limit: bandwidth, 3 numbers an element
#include "common.cuh"

#define EXPORT(T, NAME)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) add_##NAME(T* __restrict__ y, const T* __restrict__ a, const T* __restrict__ b, long long n) { \
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;                                                            \
    if (i + 8 <= n) {                                                                                                                \
      float u[8], v[8];                                                                                                              \
      load8(u, a + i);                                                                                                               \
      load8(v, b + i);                                                                                                               \
      for (int j = 0; j < 8; j++) u[j] += v[j];                                                                                      \
      store8(y + i, u);                                                                                                              \
    } else {                                                                                                                         \
      for (; i < n; i++) y[i] = from_f32<T>(to_f32(a[i]) + to_f32(b[i]));                                                            \
    }                                                                                                                                \
  }                                                                                                                                  \
  KERNEL(add_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
