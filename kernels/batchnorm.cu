// batchnorm.cu - batch normalisation without weight and bias.   Definition: src/ops/batchnorm.rs
//
//   y  = n = (x - mean) rstd,   rstd = 1 / sqrt(variance + eps), mean and biased variance of each column, in two passes
//   dx = rstd (dy - avg(dy) - n avg(dy n))          given statistics: y = (x - mean) rstd,  dx = rstd dy
//
// x, y, dy, dx [R, C] f32 or bf16, a row an image; mean, variance [C] f32.
//
// Limit: latency at the sizes of a linear probe (1024 x 768 is 1.6 MB in bf16). Bytes: forward 2 R C numbers, backward 3 R C; the later sweeps read from L2.
#include "common.cuh"

namespace {

// The sum over all rows of f(row), the same in all warps: each adds every 32nd row, then all add the 32 shares in their order. All threads call it.
template <class F> __device__ __forceinline__ float column_sum(float (&shares)[32][32], int rows, F f) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float sum = 0.f;
  for (int r = warp; r < rows; r += 32) sum += f(r);
  __syncthreads();  // the shares may still be read from the time before
  shares[warp][lane] = sum;
  __syncthreads();
  float all = 0.f;
  for (int w = 0; w < 32; w++) all += shares[w][lane];
  return all;
}

// Block: 32 warps and 32 columns, a lane each; warp w has rows w, w + 32 and so forth.
template <class T>
__device__ __forceinline__ void forward(T* __restrict__ y, float* __restrict__ mean, float* __restrict__ variance, const T* __restrict__ x, int rows,
                                        int columns, float eps) {
  __shared__ float shares[32][32];
  const int warp = threadIdx.x >> 5, c = blockIdx.x * 32 + (threadIdx.x & 31);
  const bool mine = c < columns;
  auto value = [&](int r) { return mine ? to_f32(x[(size_t)r * columns + c]) : 0.f; };
  const float average = column_sum(shares, rows, value) / rows;
  const float spread = column_sum(shares, rows, [&](int r) {
    const float d = value(r) - average;
    return d * d;
  }) / rows;
  if (!mine) return;
  const float rstd = 1.f / sqrtf(spread + eps);
  for (int r = warp; r < rows; r += 32) y[(size_t)r * columns + c] = from_f32<T>((value(r) - average) * rstd);
  if (warp == 0) {
    mean[c] = average;
    variance[c] = spread;
  }
}

// The same owners.
template <class T>
__device__ __forceinline__ void backward(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ mean,
                                         const float* __restrict__ variance, int rows, int columns, float eps) {
  __shared__ float shares[32][32];
  const int warp = threadIdx.x >> 5, c = blockIdx.x * 32 + (threadIdx.x & 31);
  const bool mine = c < columns;
  const float centre = mine ? mean[c] : 0.f, rstd = mine ? 1.f / sqrtf(variance[c] + eps) : 0.f;
  auto upstream = [&](int r) { return mine ? to_f32(dy[(size_t)r * columns + c]) : 0.f; };
  auto normalised = [&](int r) { return mine ? (to_f32(x[(size_t)r * columns + c]) - centre) * rstd : 0.f; };
  const float average = column_sum(shares, rows, upstream) / rows;
  const float projection = column_sum(shares, rows, [&](int r) { return upstream(r) * normalised(r); }) / rows;
  if (!mine) return;
  for (int r = warp; r < rows; r += 32)
    dx[(size_t)r * columns + c] = from_f32<T>(rstd * (upstream(r) - average - normalised(r) * projection));
}

// Block: 8 warps, 32 columns, and every gridDim.y-th group of 8 rows. mean may be null: then the result is x rstd, which is dx if x is dy.
template <class T>
__device__ __forceinline__ void given(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ variance,
                                      int rows, int columns, float eps) {
  const int warp = threadIdx.x >> 5, c = blockIdx.x * 32 + (threadIdx.x & 31);
  if (c >= columns) return;
  const float centre = mean ? mean[c] : 0.f, rstd = 1.f / sqrtf(variance[c] + eps);
  for (int r = blockIdx.y * 8 + warp; r < rows; r += gridDim.y * 8) {
    const size_t at = (size_t)r * columns + c;
    y[at] = from_f32<T>((to_f32(x[at]) - centre) * rstd);
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(1024, 1) batchnorm_fwd_##NAME(T* y, float* mean, float* variance, const T* x, int rows,      \
                                                                             int columns, float eps) {                                      \
    forward(y, mean, variance, x, rows, columns, eps);                                                                                       \
  }                                                                                                                                          \
  KERNEL(batchnorm_fwd_##NAME)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(1024, 1) batchnorm_bwd_##NAME(T* dx, const T* dy, const T* x, const float* mean,             \
                                                                             const float* variance, int rows, int columns, float eps) {     \
    backward(dx, dy, x, mean, variance, rows, columns, eps);                                                                                 \
  }                                                                                                                                          \
  KERNEL(batchnorm_bwd_##NAME)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256) batchnorm_given_##NAME(T* y, const T* x, const float* mean, const float* variance,      \
                                                                           int rows, int columns, float eps) {                              \
    given(y, x, mean, variance, rows, columns, eps);                                                                                         \
  }                                                                                                                                          \
  KERNEL(batchnorm_given_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
