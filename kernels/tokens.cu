// tokens.cu - tokens in front of a sequence, taken from it, averaged over it.   Definition: src/ops/tokens.rs
//
//   prepend_fwd      y[b] = [first, second, x[b]], each with its row of the position table if there is one        first, second f32 [C] or [B, C], or null
//   prepend_bwd      dt = sum over images of dy[b, i]                                                            dt [C] f32
//   move_tokens      y[b, i] = x[b, from + j] where i = to + j and 0 <= j < count, else 0                        tokens, its backward, the rest of prepend's
//   mean_tokens_fwd  y[b] = mean of x[b, from..]
//   mean_tokens_bwd  dx[b, t] = dy[b] / count where t >= from, else 0
//
//   x [B, N, C] and y f32 or bf16; table [R, C] f32; sums in f32
//
// Limit: bandwidth. Each reads and writes every row once; prepend_bwd reads one row an image and is bound by latency.
#include "tokens.cuh"

namespace {

// A warp a row of y; a token in front is one for all images (step 0) or one an image (step C).
template <class T>
__device__ __forceinline__ void prepend_fwd(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ first, const float* __restrict__ second,
                                            const float* __restrict__ table, const int* __restrict__ ids, int rows, int tokens, int front, int columns,
                                            int first_step, int second_step, int positions, unsigned* fault) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (r >= rows) return;
  const int image = r / tokens, t = r % tokens;
  const float* token = t == 0 ? first + (size_t)image * first_step : second + (size_t)image * second_step;
  const T* from = x + ((size_t)image * (tokens - front) + t - front) * columns;
  const float* position = table ? table + (size_t)position_of(image, t, tokens, front, ids, positions, fault) * columns : nullptr;
  for (int c = lane * 8; c < columns; c += 256) {
    float v[8], p[8] = {};
    if (t < front) load_row(v, token, c, columns);
    else load_row(v, from, c, columns);
    if (position) load_row(p, position, c, columns);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += p[j];
    store_row(y + (size_t)r * columns, v, c, columns);
  }
}

// Block: 32 columns, a lane one; each of 32 warps takes every 32nd image, then warp 0 adds their sums in order.
template <class T>
__device__ __forceinline__ void prepend_bwd(float* __restrict__ dt, const T* __restrict__ dy, int batch, int tokens, int i, int columns) {
  __shared__ float sums[32][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (c < columns)
    for (int b = warp; b < batch; b += 32) sum += to_f32(dy[((size_t)b * tokens + i) * columns + c]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= columns) return;
  float all = 0.f;
  for (int w = 0; w < 32; w++) all += sums[w][lane];
  dt[c] = all;
}

// A warp a row of y.
template <class T>
__device__ __forceinline__ void move_tokens(T* __restrict__ y, const T* __restrict__ x, int rows, int y_tokens, int x_tokens, int to, int from, int count,
                                            int columns) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;
  const int image = r / y_tokens, j = r % y_tokens - to;
  const T* none = nullptr;
  copy_row<true>(y + (size_t)r * columns, j < 0 || j >= count ? none : x + ((size_t)image * x_tokens + from + j) * columns, columns);
}

// Block: image blockIdx.x, 256 columns from 256 blockIdx.y on. A lane owns 8 columns, a warp every eighth token.
template <class T>
__device__ __forceinline__ void mean_tokens_fwd(T* __restrict__ y, const T* __restrict__ x, int tokens, int from, int columns, float share) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.y * 256 + lane * 8, mine = blockIdx.y * 256 + threadIdx.x;
  float sum[8] = {};
  if (c < columns)
    for (int t = from + warp; t < tokens; t += 8) {
      float v[8];
      load_row(v, x + ((size_t)blockIdx.x * tokens + t) * columns, c, columns);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += v[j];
    }
  const float all = sum_of_warps(sum);
  if (mine < columns) y[(size_t)blockIdx.x * columns + mine] = from_f32<T>(all * share);
}

// A warp a row of dx.
template <class T>
__device__ __forceinline__ void mean_tokens_bwd(T* __restrict__ dx, const T* __restrict__ dy, int rows, int tokens, int from, int columns, float share) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (r >= rows) return;
  const bool inside = r % tokens >= from;
  for (int c = lane * 8; c < columns; c += 256) {
    float v[8] = {};
    if (inside) load_row(v, dy + (size_t)(r / tokens) * columns, c, columns);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= share;
    store_row(dx + (size_t)r * columns, v, c, columns);
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) prepend_fwd_##NAME(T* y, const T* x, const float* first, const float* second,           \
                                                                       const float* table, const int* ids, int rows, int tokens, int front, \
                                                                       int columns, int first_step, int second_step, int positions,         \
                                                                       unsigned* fault) {                                                    \
    prepend_fwd(y, x, first, second, table, ids, rows, tokens, front, columns, first_step, second_step, positions, fault);                   \
  }                                                                                                                                          \
  KERNEL(prepend_fwd_##NAME)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(1024) prepend_bwd_##NAME(float* dt, const T* dy, int batch, int tokens, int i,               \
                                                                        int columns) {                                                       \
    prepend_bwd(dt, dy, batch, tokens, i, columns);                                                                                          \
  }                                                                                                                                          \
  KERNEL(prepend_bwd_##NAME)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256) move_tokens_##NAME(T* y, const T* x, int rows, int y_tokens, int x_tokens, int to,      \
                                                                       int from, int count, int columns) {                                   \
    move_tokens(y, x, rows, y_tokens, x_tokens, to, from, count, columns);                                                                   \
  }                                                                                                                                          \
  KERNEL(move_tokens_##NAME)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256) mean_tokens_fwd_##NAME(T* y, const T* x, int tokens, int from, int columns,             \
                                                                           float share) {                                                    \
    mean_tokens_fwd(y, x, tokens, from, columns, share);                                                                                     \
  }                                                                                                                                          \
  KERNEL(mean_tokens_fwd_##NAME)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256) mean_tokens_bwd_##NAME(T* dx, const T* dy, int rows, int tokens, int from, int columns, \
                                                                           float share) {                                                    \
    mean_tokens_bwd(dx, dy, rows, tokens, from, columns, share);                                                                             \
  }                                                                                                                                          \
  KERNEL(mean_tokens_bwd_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
