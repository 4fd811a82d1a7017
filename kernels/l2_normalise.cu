// l2_normalise.cu - rows of length one.   Definition: src/ops/l2_normalise.rs
//
//   y = x / max(|x|, eps)          dx = (dy - n (n . dy)) / |x|,  n = x / |x|,  or dy / eps where |x| < eps
//
// x, y, dy, dx [R, C] f32 or bf16; |x| [R] f32. Limit: bandwidth. Forward 2 R C numbers, backward 3 R C.
#include "rows.cuh"

namespace {

// A warp owns a row; lane l has W numbers from column l W on, then 32 W further on, and so forth.
template <int W, class T>
__device__ __forceinline__ void forward(T* __restrict__ y, float* __restrict__ norms, const T* __restrict__ x, int rows, int columns, float eps) {
  const int lane = threadIdx.x & 31, r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;  // the whole warp
  const size_t at = (size_t)r * columns;
  float v[W], square = 0.f;
  for (int c = lane * W; c < columns; c += 32 * W) {
    load<W>(v, x + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) square += v[j] * v[j];
  }
  const float norm = sqrtf(warp_sum(square)), inverse = 1.f / fmaxf(norm, eps);
  for (int c = lane * W; c < columns; c += 32 * W) {
    load<W>(v, x + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] *= inverse;
    store<W>(y + at + c, v);
  }
  if (lane == 0) norms[r] = norm;
}

// The same owners.
template <int W, class T>
__device__ __forceinline__ void backward(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ norms,
                                         int rows, int columns, float eps) {
  const int lane = threadIdx.x & 31, r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;
  const size_t at = (size_t)r * columns;
  const float norm = norms[r], inverse = 1.f / fmaxf(norm, eps);
  float v[W], g[W], dot = 0.f;
  if (norm >= eps) {  // the same for the whole warp
    for (int c = lane * W; c < columns; c += 32 * W) {
      load<W>(v, x + at + c);
      load<W>(g, dy + at + c);
#pragma unroll
      for (int j = 0; j < W; j++) dot += v[j] * inverse * g[j];
    }
    dot = warp_sum(dot);
  }
  for (int c = lane * W; c < columns; c += 32 * W) {
    load<W>(v, x + at + c);
    load<W>(g, dy + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) g[j] = (g[j] - v[j] * inverse * dot) * inverse;
    store<W>(dx + at + c, g);
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 4) l2_normalise_fwd_##NAME(T* y, float* norms, const T* x, int rows, int columns,         \
                                                                               float eps) {                                                   \
    if (columns % 8 == 0) forward<8>(y, norms, x, rows, columns, eps);                                                                         \
    else forward<1>(y, norms, x, rows, columns, eps);                                                                                          \
  }                                                                                                                                            \
  KERNEL(l2_normalise_fwd_##NAME)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 4) l2_normalise_bwd_##NAME(T* dx, const T* dy, const T* x, const float* norms, int rows,  \
                                                                               int columns, float eps) {                                      \
    if (columns % 8 == 0) backward<8>(dx, dy, x, norms, rows, columns, eps);                                                                   \
    else backward<1>(dx, dy, x, norms, rows, columns, eps);                                                                                    \
  }                                                                                                                                            \
  KERNEL(l2_normalise_bwd_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
