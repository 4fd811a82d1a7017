// softmax.cu - softmax of each row of x [R, C].   Definition: src/ops/softmax.rs
//
//   y = e^(x - max) / sum of e^(x - max)          dx = y (dy - y . dy)          x, y, dy, dx f32 or bf16, sums f32
//
//   version  idea                                                      time
//   v1       one thread a row, straight from the CPU loop              not run on a GPU
//   v2       one warp a row, sums and maxima by shuffles               not run on a GPU   <- chosen
//
// Limit: bandwidth. Forward 2 R C numbers (the second and third sweep find the row in L1), backward 3 R C; two exponentials a number in the forward.
#include "rows.cuh"

namespace {

// A thread owns a row.
template <class T> __device__ __forceinline__ void fwd_v1(T* __restrict__ y, const T* __restrict__ x, int rows, int columns) {
  const int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= rows) return;
  const size_t at = (size_t)r * columns;
  float most = -INFINITY, sum = 0.f;
  for (int c = 0; c < columns; c++) most = fmaxf(most, to_f32(x[at + c]));
  for (int c = 0; c < columns; c++) sum += expf(to_f32(x[at + c]) - most);
  const float inverse = 1.f / sum;
  for (int c = 0; c < columns; c++) y[at + c] = from_f32<T>(expf(to_f32(x[at + c]) - most) * inverse);
}
template <class T>
__device__ __forceinline__ void bwd_v1(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ y, int rows, int columns) {
  const int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= rows) return;
  const size_t at = (size_t)r * columns;
  float dot = 0.f;
  for (int c = 0; c < columns; c++) dot += to_f32(y[at + c]) * to_f32(dy[at + c]);
  for (int c = 0; c < columns; c++) dx[at + c] = from_f32<T>(to_f32(y[at + c]) * (to_f32(dy[at + c]) - dot));
}

// A warp owns a row; lane l has W numbers from column l W on, then 32 W further on, and so forth.
template <int W, class T> __device__ __forceinline__ void fwd_v2(T* __restrict__ y, const T* __restrict__ x, int rows, int columns) {
  const int first = (threadIdx.x & 31) * W, r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;  // the whole warp
  const size_t at = (size_t)r * columns;
  float v[W], most = -INFINITY, sum = 0.f;
  for (int c = first; c < columns; c += 32 * W) {
    load<W>(v, x + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) most = fmaxf(most, v[j]);
  }
  most = warp_max(most);
  for (int c = first; c < columns; c += 32 * W) {
    load<W>(v, x + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) sum += expf(v[j] - most);
  }
  const float inverse = 1.f / warp_sum(sum);
  for (int c = first; c < columns; c += 32 * W) {
    load<W>(v, x + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] = expf(v[j] - most) * inverse;
    store<W>(y + at + c, v);
  }
}
template <int W, class T>
__device__ __forceinline__ void bwd_v2(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ y, int rows, int columns) {
  const int first = (threadIdx.x & 31) * W, r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;
  const size_t at = (size_t)r * columns;
  float v[W], g[W], dot = 0.f;
  for (int c = first; c < columns; c += 32 * W) {
    load<W>(v, y + at + c);
    load<W>(g, dy + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) dot += v[j] * g[j];
  }
  dot = warp_sum(dot);
  for (int c = first; c < columns; c += 32 * W) {
    load<W>(v, y + at + c);
    load<W>(g, dy + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] *= g[j] - dot;
    store<W>(dx + at + c, v);
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                       \
  extern "C" __global__ void __launch_bounds__(128) softmax_fwd_v1_##NAME(T* y, const T* x, int rows, int columns) {                          \
    fwd_v1(y, x, rows, columns);                                                                                                              \
  }                                                                                                                                           \
  KERNEL(softmax_fwd_v1_##NAME)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(128) softmax_bwd_v1_##NAME(T* dx, const T* dy, const T* y, int rows, int columns) {            \
    bwd_v1(dx, dy, y, rows, columns);                                                                                                         \
  }                                                                                                                                           \
  KERNEL(softmax_bwd_v1_##NAME)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256, 4) softmax_fwd_v2_##NAME(T* y, const T* x, int rows, int columns) {                       \
    if (columns % 8 == 0) fwd_v2<8>(y, x, rows, columns);                                                                                     \
    else fwd_v2<1>(y, x, rows, columns);                                                                                                      \
  }                                                                                                                                           \
  KERNEL(softmax_fwd_v2_##NAME)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256, 4) softmax_bwd_v2_##NAME(T* dx, const T* dy, const T* y, int rows, int columns) {         \
    if (columns % 8 == 0) bwd_v2<8>(dx, dy, y, rows, columns);                                                                                \
    else bwd_v2<1>(dx, dy, y, rows, columns);                                                                                                 \
  }                                                                                                                                           \
  KERNEL(softmax_bwd_v2_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
