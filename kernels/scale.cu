// scale.cu - products with something smaller than the tensor.   Definition: src/ops/scale.rs
//
//   scale           y = f x
//   scale_channels  y = base + x g[c] d[image]         dx = dy g d,  dg = sum over rows of dy x d
//
// x, y, base, dy [R, C] f32 or bf16; g [C] f32 or null, d the factor of stochastic depth from u [B] f32 or null; base may be null. So one kernel is layer
// scale, stochastic depth, both, and both added to a residual stream.
//
// Limit: bandwidth. scale: 2 R C numbers; forward 2 R C, with base 3 R C; backward 2 R C, with dg 3 R C. dg comes with it, in two stages without atomics.
#include "rows.cuh"

namespace {

// Block: 8 warps, 32 W columns from 32 W blockIdx.x on, and every gridDim.y-th group of 8 rows. A lane owns W columns, a warp a row at a time.
template <int W, class T>
__device__ __forceinline__ void channels_fwd(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ base, const Factors& f, int rows,
                                             int columns) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = (blockIdx.x * 32 + lane) * W;
  if (c >= columns) return;
  for (int r = blockIdx.y * 8 + warp; r < rows; r += gridDim.y * 8) {
    const size_t at = (size_t)r * columns + c;
    float v[W], b[W] = {};
    load<W>(v, x + at);
    if (base) load<W>(b, base + at);
    f.times(v, c, f.of_row(r));
#pragma unroll
    for (int j = 0; j < W; j++) v[j] += b[j];
    store<W>(y + at, v);
  }
}

// The same owners. partial [gridDim.y, C] or null: a block's share of dg, its warps added in their order. dx may be null; x is read for dg only.
template <int W, class T>
__device__ __forceinline__ void channels_bwd(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
                                             const Factors& f, int rows, int columns) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = (blockIdx.x * 32 + lane) * W;
  float sum[W] = {};
  if (c < columns) {
    for (int r = blockIdx.y * 8 + warp; r < rows; r += gridDim.y * 8) {
      const size_t at = (size_t)r * columns + c;
      const float row = f.of_row(r);
      float g[W], v[W];
      load<W>(g, dy + at);
      if (partial) {
        load<W>(v, x + at);
#pragma unroll
        for (int j = 0; j < W; j++) sum[j] += g[j] * v[j] * row;
      }
      f.times(g, c, row);
      if (dx) store<W>(dx + at, g);
    }
  }
  if (!partial) return;  // the same for all threads
  store_share(partial, sum, columns);
}

}  // namespace

// The launch gives a block 256 columns where C is a multiple of 8, else 32.
#define EXPORT(T, NAME)                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256) scale_##NAME(T* __restrict__ y, const T* __restrict__ x, long long n, float factor) {      \
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;                                                                      \
    if (i + 8 <= n) {                                                                                                                          \
      float v[8];                                                                                                                              \
      load8(v, x + i);                                                                                                                         \
      for (int j = 0; j < 8; j++) v[j] *= factor;                                                                                              \
      store8(y + i, v);                                                                                                                        \
    } else {                                                                                                                                   \
      for (; i < n; i++) y[i] = from_f32<T>(to_f32(x[i]) * factor);                                                                            \
    }                                                                                                                                          \
  }                                                                                                                                            \
  KERNEL(scale_##NAME)                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(256, 4) scale_channels_fwd_##NAME(T* y, const T* x, const T* base, const float* gains,         \
                                                                                 const float* u, int rows, int columns, int tokens,           \
                                                                                 float keep, float grow) {                                    \
    const Factors f{gains, u, tokens, keep, grow};                                                                                             \
    if (columns % 8 == 0) channels_fwd<8>(y, x, base, f, rows, columns);                                                                       \
    else channels_fwd<1>(y, x, base, f, rows, columns);                                                                                        \
  }                                                                                                                                            \
  KERNEL(scale_channels_fwd_##NAME)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 4) scale_channels_bwd_##NAME(T* dx, float* partial, const T* dy, const T* x,              \
                                                                                 const float* gains, const float* u, int rows, int columns,   \
                                                                                 int tokens, float keep, float grow) {                        \
    const Factors f{gains, u, tokens, keep, grow};                                                                                             \
    if (columns % 8 == 0) channels_bwd<8>(dx, partial, dy, x, f, rows, columns);                                                               \
    else channels_bwd<1>(dx, partial, dy, x, f, rows, columns);                                                                                \
  }                                                                                                                                            \
  KERNEL(scale_channels_bwd_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
