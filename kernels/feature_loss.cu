// feature_loss.cu - distance between features and constant ones, and its gradient.   Definition: src/ops/feature_loss.rs, src/ops/masked_mse.rs
//
//   loss = sum_r w[r] mean_C f(x[r] - t[r]) / sum(w),   dx[r] = w[r] f'(x[r] - t[r]) / (C sum(w))      f: |d|, d^2, or d^2 / (2 beta) below beta
//
//   x, dx [R, C] f32 or bf16; t [R, C] f32 or bf16; w [R] f32 or null: all rows count alike
//
// One pass: loss and gradient for an upstream gradient of 1. Limit: bandwidth. x and t are read, dx is written; of rows with w = 0 only dx is touched.
#include "rows.cuh"

namespace {

enum Distance { L1, L2, SMOOTH_L1 };

__device__ __forceinline__ float sign(float d) { return d > 0.f ? 1.f : d < 0.f ? -1.f : d; }

// f(d), and f'(d) in its place.
template <int KIND> __device__ __forceinline__ float distance(float& d, float beta) {
  const float e = d, size = fabsf(e);
  if (KIND == L2) {
    d = 2.f * e;
    return e * e;
  }
  if (KIND == SMOOTH_L1 && size < beta) {
    d = e / beta;
    return e * e * (0.5f / beta);
  }
  d = sign(e);
  return KIND == L1 ? size : size - 0.5f * beta;
}

// One warp a row, every 8 gridDim.x-th one; a lane takes every 32nd piece. dx may be null.
template <int KIND, class T, class U>
__device__ __forceinline__ float rows_of(T* __restrict__ dx, const T* __restrict__ x, const U* __restrict__ target, const float* __restrict__ weights,
                                         int rows, int columns, float beta, float share) {
  const int lane = threadIdx.x & 31;
  float sum = 0.f;
  for (int r = blockIdx.x * 8 + (threadIdx.x >> 5); r < rows; r += gridDim.x * 8) {
    const size_t at = (size_t)r * columns;
    const float weight = weights ? weights[r] : 1.f, factor = weight * share;
    float row = 0.f;
    own_pieces(lane, 32, columns, [&](int c) {
      float d[8] = {};
      if (weight != 0.f) {
        float t[8];
        load_row(d, x + at, c, columns);
        load_row(t, target + at, c, columns);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          d[j] -= t[j];
          row += distance<KIND>(d[j], beta);
          d[j] *= factor;
        }
      }
      if (dx) store_row(dx + at, d, c, columns);
    });
    if (weight != 0.f) sum += factor * row;
  }
  return sum;
}

// Block: 8 warps. partial [gridDim.x]: a block's share of the loss. share: 1 / C, or 1 / (R C) without weights; count [1]: the sum of the weights, or
// null. Weights that sum to 0 make loss and gradient 0.
template <class T, class U>
__device__ __forceinline__ void feature_loss(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ x, const U* __restrict__ target,
                                             const float* __restrict__ weights, const float* __restrict__ count, int rows, int columns, int kind,
                                             float beta, float share) {
  __shared__ float scratch[32];
  if (count) share = count[0] == 0.f ? 0.f : share / count[0];
  float sum;
  if (kind == L1) sum = rows_of<L1>(dx, x, target, weights, rows, columns, beta, share);
  else if (kind == L2) sum = rows_of<L2>(dx, x, target, weights, rows, columns, beta, share);
  else sum = rows_of<SMOOTH_L1>(dx, x, target, weights, rows, columns, beta, share);
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

}  // namespace

#define EXPORT(T, U, NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 4) feature_loss_##NAME(T* dx, float* partial, const T* x, const U* target,              \
                                                                           const float* weights, const float* count, int rows, int columns, \
                                                                           int kind, float beta, float share) {                             \
    feature_loss(dx, partial, x, target, weights, count, rows, columns, kind, beta, share);                                                 \
  }                                                                                                                                         \
  KERNEL(feature_loss_##NAME)
EXPORT(float, float, f32_f32)
EXPORT(bf16, float, bf16_f32)
EXPORT(bf16, bf16, bf16_bf16)
