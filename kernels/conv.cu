// conv.cu - the windows of a convolution as rows of a matrix and back, and the way between maps and tokens.   Definition: src/ops/conv.rs
//
//   im2col     rows[b, (i, j), (c, u, v)] = x[b, c, s i + u - p, s j + v - p], 0 outside       x [B, C, H, W], rows [B, oh ow, C kh kw]
//   col2im     dx[b, c, y, x] = sum of all numbers of `rows` that are x[b, c, y, x] there
//   transpose  y[b, c, r] = x[b, r, c] + bias[c], bias f32 or null                             x [B, R, C], y [B, C, R]
//
// conv2d is im2col, one product for the whole batch, and a transpose that adds the bias: rows W^T is [B oh ow, O]. So the weight's gradient is one product
// as well, and the bias's a sum over rows. Limit: bandwidth. im2col and transpose move each number once in and once out; a window's numbers come
// in runs of kw, which a thread copies, so the divisions are one set a run.
#include "common.cuh"

namespace {

// A thread owns a run: kw numbers of one row of one window. The image is blockIdx.y.
template <class T>
__device__ __forceinline__ void im2col(T* __restrict__ rows, const T* __restrict__ x, int channels, int h, int w, int kh, int kw, int stride,
                                       int padding, int oh, int ow) {
  const int run = blockIdx.x * 256 + threadIdx.x, window = channels * kh;
  if (run >= oh * ow * window) return;
  const int place = run / window, tap = run - place * window, c = tap / kh, u = tap - c * kh, i = place / ow, j = place - i * ow;
  const int y = i * stride + u - padding, left = j * stride - padding;
  const size_t image = blockIdx.y;
  T* to = rows + (image * oh * ow * window + run) * kw;
  const T* from = x + ((image * channels + c) * h + y) * w + left;
  const bool inside = y >= 0 && y < h;
  for (int v = 0; v < kw; v++) to[v] = inside && left + v >= 0 && left + v < w ? from[v] : from_f32<T>(0.f);
}

// A thread owns a number of dx and adds the windows that hold it, from the lowest to the highest, in f32.
template <class T, class S>
__device__ __forceinline__ void col2im(T* __restrict__ dx, const S* __restrict__ rows, int channels, int h, int w, int kh, int kw, int stride,
                                       int padding, int oh, int ow) {
  const int at = blockIdx.x * 256 + threadIdx.x;
  if (at >= channels * h * w) return;
  const int c = at / (h * w), y = at / w % h + padding, x = at % w + padding;  // within the padded image
  const int i0 = y < kh ? 0 : (y - kh) / stride + 1, i1 = min(oh - 1, y / stride);
  const int j0 = x < kw ? 0 : (x - kw) / stride + 1, j1 = min(ow - 1, x / stride);
  const size_t image = blockIdx.y, window = (size_t)channels * kh * kw;
  float sum = 0.f;
  for (int i = i0; i <= i1; i++)
    for (int j = j0; j <= j1; j++) {
      const size_t place = (image * oh + i) * ow + j;
      sum += to_f32(rows[place * window + (c * kh + y - i * stride) * kw + x - j * stride]);
    }
  dx[image * channels * h * w + at] = from_f32<T>(sum);
}

// Block: 256 threads, a square of 32 x 32 of image blockIdx.z, turned in shared memory; rows of 33 keep its columns apart.
template <class T>
__device__ __forceinline__ void transpose(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ bias, int rows, int columns) {
  __shared__ float square[32][33];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c0 = blockIdx.x * 32, r0 = blockIdx.y * 32;
  const size_t image = (size_t)blockIdx.z * rows * columns;
  const float b = bias && c0 + lane < columns ? bias[c0 + lane] : 0.f;
#pragma unroll
  for (int k = warp; k < 32; k += 8)
    if (r0 + k < rows && c0 + lane < columns) square[k][lane] = to_f32(x[image + (size_t)(r0 + k) * columns + c0 + lane]) + b;
  __syncthreads();
#pragma unroll
  for (int k = warp; k < 32; k += 8)
    if (c0 + k < columns && r0 + lane < rows) y[image + (size_t)(c0 + k) * rows + r0 + lane] = from_f32<T>(square[lane][k]);
}

}  // namespace

#define COL2IM(T, S, NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) col2im_##NAME(T* dx, const S* rows, int channels, int h, int w, int kh, int kw, int stride, \
                                                                  int padding, int oh, int ow) {                                             \
    col2im(dx, rows, channels, h, w, kh, kw, stride, padding, oh, ow);                                                                       \
  }                                                                                                                                          \
  KERNEL(col2im_##NAME)
COL2IM(float, float, f32_f32)
COL2IM(bf16, bf16, bf16_bf16)
COL2IM(bf16, float, f32_bf16)

#define EXPORT(T, NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) im2col_##NAME(T* rows, const T* x, int channels, int h, int w, int kh, int kw, int stride, \
                                                                  int padding, int oh, int ow) {                                             \
    im2col(rows, x, channels, h, w, kh, kw, stride, padding, oh, ow);                                                                        \
  }                                                                                                                                          \
  KERNEL(im2col_##NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) transpose_##NAME(T* y, const T* x, const float* bias, int rows, int columns) {          \
    transpose(y, x, bias, rows, columns);                                                                                                    \
  }                                                                                                                                          \
  KERNEL(transpose_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
