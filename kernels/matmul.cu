// matmul.cu - heads cut out of packed rows and put back, and linear maps across heads.   Definition: src/ops/matmul.rs
//
//   split  y[b, h, t, d] = x[b, t, column + h D + d]                 x [B, N, S], y [B, H, N, D]
//   join   y[b, t, column + h D + d] = x[b, h, t, d], 0 in the other columns of y [B, N, S]
//   mix    y[b, g, s] = bias[g] + sum_h w[g, h] x[b, h, s]           x [B, H, M], y [B, G, M]; w [G, H] and bias [G] f32
//          dx is the same with w turned; dw[g, h] = sum_{b, s} dy[b, g, s] x[b, h, s], db[g] = sum_{b, s} dy[b, g, s]
//
// The products themselves are the library's. Limit: bandwidth. split and join move each number once in and once out; mix reads x and writes y once
// for G <= 16, its backward reads dy and x once for H <= 8.
#include "common.cuh"

namespace {

// One piece of a row: eight numbers in one access of 16 or 32 bytes, or one number.
template <int EACH, class T> __device__ __forceinline__ void copy(T* to, const T* from) {
  if (EACH == 8) {
    const uint4* a = reinterpret_cast<const uint4*>(from);
    uint4* b = reinterpret_cast<uint4*>(to);
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) b[i] = a[i];
  } else {
    *to = *from;
  }
}
template <int EACH, class T> __device__ __forceinline__ void zeros(T* to) {
#pragma unroll
  for (int i = 0; i < EACH; i++) to[i] = from_f32<T>(0.f);
}

// A thread owns one piece of y; the image is blockIdx.y.
template <int EACH, class T>
__device__ __forceinline__ void split_heads(T* __restrict__ y, const T* __restrict__ x, int heads, int tokens, int width, int stride, int column) {
  const int pieces = width / EACH, i = blockIdx.x * 256 + threadIdx.x;
  if (i >= heads * tokens * pieces) return;
  const int row = i / pieces, d = (i - row * pieces) * EACH, head = row / tokens, token = row - head * tokens;
  const size_t image = blockIdx.y;
  copy<EACH>(y + image * heads * tokens * width + (size_t)i * EACH, x + (image * tokens + token) * stride + column + head * width + d);
}

// A thread owns one piece of y, of the heads or of what lies beside them.
template <int EACH, class T>
__device__ __forceinline__ void join_heads(T* __restrict__ y, const T* __restrict__ x, int heads, int tokens, int width, int stride, int column) {
  const int pieces = stride / EACH, i = blockIdx.x * 256 + threadIdx.x;
  if (i >= tokens * pieces) return;
  const int token = i / pieces, c = (i - token * pieces) * EACH - column;
  const size_t image = blockIdx.y;
  T* to = y + image * tokens * stride + (size_t)i * EACH;
  if (c < 0 || c >= heads * width) return zeros<EACH>(to);
  const int head = c / width, d = c - head * width;
  copy<EACH>(to, x + ((image * heads + head) * tokens + token) * width + d);
}

// A thread owns position s of image blockIdx.y in all G results, sixteen at a time in registers; the head's sums go from the first head to the last.
// w [G, H] lies `row` apart by g and `step` apart by h. Shared: 16 rows of w.
template <class T>
__device__ __forceinline__ void mix_heads(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ w,
                                          const float* __restrict__ bias, int heads, int out, int positions, int row, int step) {
  SHARED(float, weights);  // [heads][16]
  const int s = blockIdx.x * 256 + threadIdx.x;
  const size_t image = blockIdx.y;
  x += image * heads * positions + s;
  y += image * out * positions + s;
  for (int g = 0; g < out; g += 16) {
    __syncthreads();  // the weights before have been read
    for (int i = threadIdx.x; i < heads * 16; i += 256) {
      const int from = g + (i & 15);
      weights[i] = from < out ? w[from * row + (i >> 4) * step] : 0.f;
    }
    __syncthreads();
    if (s < positions) {
      float sum[16];
#pragma unroll
      for (int j = 0; j < 16; j++) sum[j] = bias && g + j < out ? bias[g + j] : 0.f;
#pragma unroll 4
      for (int h = 0; h < heads; h++) {
        const float v = to_f32(x[(size_t)h * positions]);
#pragma unroll
        for (int j = 0; j < 16; j++) sum[j] = fmaf(weights[h * 16 + j], v, sum[j]);
      }
#pragma unroll
      for (int j = 0; j < 16; j++)
        if (g + j < out) y[(size_t)(g + j) * positions] = from_f32<T>(sum[j]);
    }
  }
}

// Units of 1024 positions of one image; block (share, 8 x 8 square of dw) takes every gridDim.x-th unit. A thread owns every 256th position and sums
// 8 x 8 products in registers; warps are summed as trees, then in their order. partial_w [shares, G, H], partial_b [shares, G].
template <class T>
__device__ __forceinline__ void mix_heads_bwd(float* __restrict__ partial_w, float* __restrict__ partial_b, const T* __restrict__ dy,
                                              const T* __restrict__ x, int batch, int heads, int out, int positions) {
  __shared__ float sums[8][72];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int squares = (heads + 7) / 8, g0 = blockIdx.y / squares * 8, h0 = blockIdx.y % squares * 8;
  const int chunks = (positions + 1023) / 1024, units = batch * chunks;
  float sum[8][8] = {}, bias[8] = {};
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int image = unit / chunks, first = (unit - image * chunks) * 1024, end = min(positions, first + 1024);
    const T* a = dy + ((size_t)image * out + g0) * positions;
    const T* b = x + ((size_t)image * heads + h0) * positions;
#pragma unroll 1  // two positions at once need more than 128 registers
    for (int s = first + threadIdx.x; s < end; s += 256) {
      float p[8], q[8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        p[j] = g0 + j < out ? to_f32(a[j * positions + s]) : 0.f;
        q[j] = h0 + j < heads ? to_f32(b[j * positions + s]) : 0.f;
      }
#pragma unroll
      for (int j = 0; j < 8; j++) {
        bias[j] += p[j];
#pragma unroll
        for (int k = 0; k < 8; k++) sum[j][k] = fmaf(p[j], q[k], sum[j][k]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const float all = warp_sum(sum[j][k]);
      if (lane == 0) sums[warp][j * 8 + k] = all;
    }
    const float all = warp_sum(bias[j]);
    if (lane == 0) sums[warp][64 + j] = all;
  }
  __syncthreads();
  if (threadIdx.x >= 72) return;
  float all = 0.f;
  for (int v = 0; v < 8; v++) all += sums[v][threadIdx.x];
  const int i = threadIdx.x, g = g0 + (i < 64 ? i / 8 : i - 64), h = h0 + i % 8;
  if (g >= out) return;
  if (i < 64 && h < heads) partial_w[((size_t)blockIdx.x * out + g) * heads + h] = all;
  if (i >= 64 && h0 == 0) partial_b[(size_t)blockIdx.x * out + g] = all;
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) split_heads_fwd_##NAME(T* y, const T* x, int heads, int tokens, int width, int stride,   \
                                                                           int column, int each) {                                           \
    if (each == 8) split_heads<8>(y, x, heads, tokens, width, stride, column);                                                               \
    else split_heads<1>(y, x, heads, tokens, width, stride, column);                                                                         \
  }                                                                                                                                          \
  KERNEL(split_heads_fwd_##NAME)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256) join_heads_fwd_##NAME(T* y, const T* x, int heads, int tokens, int width, int stride,    \
                                                                          int column, int each) {                                            \
    if (each == 8) join_heads<8>(y, x, heads, tokens, width, stride, column);                                                                \
    else join_heads<1>(y, x, heads, tokens, width, stride, column);                                                                          \
  }                                                                                                                                          \
  KERNEL(join_heads_fwd_##NAME)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 4) mix_heads_fwd_##NAME(T* y, const T* x, const float* w, const float* bias, int heads,  \
                                                                            int out, int positions, int row, int step) {                     \
    mix_heads(y, x, w, bias, heads, out, positions, row, step);                                                                              \
  }                                                                                                                                          \
  KERNEL(mix_heads_fwd_##NAME)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256, 2) mix_heads_bwd_##NAME(float* partial_w, float* partial_b, const T* dy, const T* x,     \
                                                                            int batch, int heads, int out, int positions) {                  \
    mix_heads_bwd(partial_w, partial_b, dy, x, batch, heads, out, positions);                                                                \
  }                                                                                                                                          \
  KERNEL(mix_heads_bwd_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
