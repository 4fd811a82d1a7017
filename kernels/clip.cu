// clip.cu - the length of all gradients together, and the factor that brings it below a limit.   Definition: src/optim/clip.rs
//
//   norm = sqrt(sum of x^2),   factor = min(1, most / (norm + 1e-6)), or 1 where the norm is not finite          x flat f32, n a multiple of 8
//
// Sums are in double, in two stages and a fixed order; times_scalar of tensor.cu applies the factor. Limit: bandwidth. 4 bytes a parameter, and 8 more where the
// factor is not 1.
#include "flat.cuh"

// partial [gridDim.x]: sums of squares. A thread takes eight consecutive numbers, a block every gridDim.x-th group of 2048.
extern "C" __global__ void __launch_bounds__(256, 2) clip_squares_f32(double* __restrict__ partial, const float* __restrict__ x, long long n) {
  __shared__ double scratch[32];
  double sum = 0.;
  for (long long i = ((long long)blockIdx.x * 256 + threadIdx.x) * 8; i < n; i += (long long)gridDim.x * 2048) {
    float v[8];
    load8(v, x + i);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += (double)v[j] * (double)v[j];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
KERNEL(clip_squares_f32)

// norm [1], factor [1]. One block of 256, which take the parts in turn.
extern "C" __global__ void __launch_bounds__(256, 2) clip_norm_f32(float* __restrict__ norm, float* __restrict__ factor, const double* __restrict__ partial,
                                                                   int parts, float most) {
  __shared__ double scratch[32];
  double sum = 0.;
  for (int i = threadIdx.x; i < parts; i += 256) sum += partial[i];
  sum = sqrt(block_sum(sum, scratch));
  if (threadIdx.x != 0) return;
  const double f = most / (sum + 1e-6);
  norm[0] = (float)sum;
  factor[0] = sum < (double)INFINITY && f < 1. ? (float)f : 1.f;
}
KERNEL(clip_norm_f32)
