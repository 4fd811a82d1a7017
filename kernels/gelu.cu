// gelu.cu - the error-function GELU, with the bias of the layer before it.   Definition: src/ops/gelu.rs
//
//   y = h Phi(h),  h = x + bias          dx = dy (Phi(h) + h phi(h)),  dbias = sum over rows of dx          x, y, dx [R, C] f32 or bf16; bias [C] alike or null
//
// Limit: bandwidth. Forward 2 R C numbers, backward 3 R C; the bias gradient comes with it, in two stages without atomics.
#include "rows.cuh"

namespace {

__device__ __forceinline__ float normal(float h) { return 0.5f * (1.f + erff(h * 0.70710678118654752f)); }

// Block: 8 warps, 256 columns from 256 blockIdx.x on, and every gridDim.y-th group of 8 rows. A lane owns 8 columns, a warp a row at a time.
template <class T>
__device__ __forceinline__ void gelu_fwd(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ bias, int rows, int columns) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 256 + lane * 8;
  if (c >= columns) return;
  float b[8] = {};
  if (bias) load_row(b, bias, c, columns);
  for (int r = blockIdx.y * 8 + warp; r < rows; r += gridDim.y * 8) {
    float v[8];
    const size_t at = (size_t)r * columns;
    load_row(v, x + at, c, columns);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float h = v[j] + b[j];
      v[j] = h * normal(h);
    }
    store_row(y + at, v, c, columns);
  }
}

// The same owners. partial [gridDim.y, C] or null: a block's share of the bias gradient, its warps added in their order.
template <class T>
__device__ __forceinline__ void gelu_bwd(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
                                         const T* __restrict__ bias, int rows, int columns) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 256 + lane * 8;
  float sum[8] = {};
  if (c < columns) {
    float b[8] = {};
    if (bias) load_row(b, bias, c, columns);
    for (int r = blockIdx.y * 8 + warp; r < rows; r += gridDim.y * 8) {
      float v[8], g[8];
      const size_t at = (size_t)r * columns;
      load_row(v, x + at, c, columns);
      load_row(g, dy + at, c, columns);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float h = v[j] + b[j];
        g[j] *= normal(h) + h * 0.3989422804014327f * expf(-0.5f * h * h);
        sum[j] += g[j];
      }
      store_row(dx + at, g, c, columns);
    }
  }
  if (!partial) return;  // the same for all threads
  store_share(partial, sum, columns);
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256, 2) gelu_fwd_##NAME(T* y, const T* x, const T* bias, int rows, int columns) {           \
    gelu_fwd(y, x, bias, rows, columns);                                                                                                    \
  }                                                                                                                                         \
  KERNEL(gelu_fwd_##NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 2) gelu_bwd_##NAME(T* dx, float* partial, const T* dy, const T* x, const T* bias,      \
                                                                       int rows, int columns) {                                             \
    gelu_bwd(dx, partial, dy, x, bias, rows, columns);                                                                                      \
  }                                                                                                                                         \
  KERNEL(gelu_bwd_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
