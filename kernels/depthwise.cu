// depthwise.cu - a k x k filter of each channel's plane, of what a mask lets through.   Definition: src/ops/depthwise.rs
//
//   y[b, c, i, j] = bias[c] + sum_{u, v} w[c, u, v] (m x)[b, c, i + u - k/2, j + v - k/2]          dx = m * the same of dy with w turned round
//   dw[c, u, v] = sum_{b, i, j} dy[b, c, i, j] (m x)[b, c, i + u - k/2, j + v - k/2]               db[c] = sum_{b, i, j} dy[b, c, i, j]
//
// x, y [B, C, H, W] f32 or bf16; w [C, k, k], bias [C], m [B, H, W] f32; bias and m may be null. All sums in f32.
//
//   version  idea                                                                            B=256 C=256 56 x 56, k=5, bf16
//   v1       one thread a number of y, straight from the CPU loop, any k; dw a block a plane  not run on a GPU
//   v2       a tile with its halo in shared memory, a strip of 7 numbers of y in registers    not run on a GPU   <- chosen for k=5
//
// Limit: bandwidth. Forward and dx move x and y once (4 bytes a number in bf16, 25 FMAs); v2 reads its halo of 4 rows and columns a tile of 28 x 32 again,
// mostly from the L2, and asks shared memory for 55 numbers a strip where v1 asks the L1 for 175. dw moves dy and x once.
#include "common.cuh"

namespace {

// A thread owns a number of y. `turned`: w turned round, and the mask times the result instead of x.
template <class T>
__device__ __forceinline__ void filter_v1(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias,
                                          const float* __restrict__ mask, int channels, int h, int wide, int k, long long n, bool turned) {
  const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
  if (at >= n) return;
  const int size = h * wide, plane = (int)(at / size), pixel = (int)(at - (long long)plane * size), i = pixel / wide, j = pixel - i * wide;
  const int c = plane % channels, taps = k * k;
  const T* from = x + (size_t)plane * size;
  const float* m = mask ? mask + (size_t)(plane / channels) * size : nullptr;
  float sum = bias ? bias[c] : 0.f;
  for (int tap = 0; tap < taps; tap++) {
    const int yy = i + tap / k - k / 2, xx = j + tap % k - k / 2;
    if (yy < 0 || yy >= h || xx < 0 || xx >= wide) continue;
    const float seen = m && !turned ? m[yy * wide + xx] : 1.f;
    sum = fmaf(to_f32(from[yy * wide + xx]) * seen, w[c * taps + (turned ? taps - 1 - tap : tap)], sum);
  }
  if (m && turned) sum *= m[pixel];
  y[at] = from_f32<T>(sum);
}

// Block: 256 threads, one plane, tap after tap. partial_w [B, C, k, k], partial_b [B, C].
template <class T>
__device__ __forceinline__ void weight_v1(float* __restrict__ partial_w, float* __restrict__ partial_b, const T* __restrict__ dy,
                                          const T* __restrict__ x, const float* __restrict__ mask, int channels, int h, int wide, int k) {
  __shared__ float scratch[32];
  const int plane = blockIdx.x, size = h * wide, taps = k * k;
  const float* m = mask ? mask + (size_t)(plane / channels) * size : nullptr;
  dy += (size_t)plane * size;
  x += (size_t)plane * size;
  float bias = 0.f;
  for (int tap = 0; tap < taps; tap++) {
    float sum = 0.f;
    for (int pixel = threadIdx.x; pixel < size; pixel += 256) {
      const int i = pixel / wide, yy = i + tap / k - k / 2, xx = pixel - i * wide + tap % k - k / 2;
      const float d = to_f32(dy[pixel]);
      if (tap == 0) bias += d;
      if (yy < 0 || yy >= h || xx < 0 || xx >= wide) continue;
      sum = fmaf(d, to_f32(x[yy * wide + xx]) * (m ? m[yy * wide + xx] : 1.f), sum);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial_w[(size_t)plane * taps + tap] = sum;
  }
  bias = block_sum(bias, scratch);
  if (threadIdx.x == 0) partial_b[plane] = bias;
}

constexpr int WARPS = 4, STRIP = 7, ROWS = WARPS * STRIP;  // a tile: at most 28 rows of 32 numbers, a strip of 7 rows a warp, a column a lane

// How a plane is cut: tiles as equal as they can be.
struct Tiles {
  int across, down, width, height;
  __device__ Tiles(int h, int wide) : across((wide + 31) / 32), down((h + ROWS - 1) / ROWS) {
    width = (wide + across - 1) / across;
    height = (h + down - 1) / down;
  }
};

// The tile at (y0, x0) of a plane with K/2 numbers around it, times the mask; zeros outside the plane and in the rows below the tile.
template <int K, class T>
__device__ __forceinline__ void load_tile(float (&tile)[ROWS + K - 1][32 + K - 1], const T* __restrict__ x, const float* __restrict__ m, int y0,
                                          int x0, int height, int width, int h, int wide) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int r = warp; r < ROWS + K - 1; r += WARPS) {
    const int y = y0 + r - K / 2;
    const bool inside = r < height + K - 1 && y >= 0 && y < h;
    for (int c = lane; c < width + K - 1; c += 32) {
      const int xx = x0 + c - K / 2;
      float v = 0.f;
      if (inside && xx >= 0 && xx < wide) {
        v = to_f32(x[y * wide + xx]);
        if (m) v *= m[y * wide + xx];
      }
      tile[r][c] = v;
    }
  }
}

// Block: 4 warps, a tile of one plane. A lane owns 7 numbers below each other and goes down its column: a row of K numbers serves up to K of them.
template <int K, class T>
__device__ __forceinline__ void filter_v2(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias,
                                          const float* __restrict__ mask, int channels, int h, int wide, bool turned) {
  __shared__ float tile[ROWS + K - 1][32 + K - 1];
  const Tiles t(h, wide);
  const int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * STRIP;
  const int plane = blockIdx.x / (t.across * t.down), cut = blockIdx.x % (t.across * t.down);
  const int y0 = cut / t.across * t.height, x0 = cut % t.across * t.width, c = plane % channels;
  const float* m = mask ? mask + (size_t)(plane / channels) * h * wide : nullptr;
  load_tile<K>(tile, x + (size_t)plane * h * wide, turned ? nullptr : m, y0, x0, t.height, t.width, h, wide);
  float taps[K * K];
#pragma unroll
  for (int i = 0; i < K * K; i++) taps[i] = w[c * K * K + (turned ? K * K - 1 - i : i)];
  __syncthreads();
  if (lane >= t.width || x0 + lane >= wide || first >= t.height) return;
  float sum[STRIP];
#pragma unroll
  for (int s = 0; s < STRIP; s++) sum[s] = bias ? bias[c] : 0.f;
#pragma unroll
  for (int r = 0; r < STRIP + K - 1; r++) {
    float row[K];
#pragma unroll
    for (int v = 0; v < K; v++) row[v] = tile[first + r][lane + v];
#pragma unroll
    for (int s = 0; s < STRIP; s++)
      if (r >= s && r - s < K)
#pragma unroll
        for (int v = 0; v < K; v++) sum[s] = fmaf(row[v], taps[(r - s) * K + v], sum[s]);
  }
#pragma unroll
  for (int s = 0; s < STRIP; s++) {
    const int i = y0 + first + s, at = i * wide + x0 + lane;
    if (first + s < t.height && i < h) y[(size_t)plane * h * wide + at] = from_f32<T>(m && turned ? sum[s] * m[at] : sum[s]);
  }
}

// Block: 4 warps, channel blockIdx.x of every gridDim.y-th image, tile after tile. A lane owns the same strips as above and sums all taps over them
// in registers; at the end warps are summed as trees, then in their order. partial_w [shares, C, K, K], partial_b [shares, C].
template <int K, class T>
__device__ __forceinline__ void weight_v2(float* __restrict__ partial_w, float* __restrict__ partial_b, const T* __restrict__ dy,
                                          const T* __restrict__ x, const float* __restrict__ mask, int batch, int channels, int h, int wide) {
  __shared__ float tile[ROWS + K - 1][32 + K - 1];
  __shared__ float sums[WARPS][K * K + 1];
  const Tiles t(h, wide);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = warp * STRIP, c = blockIdx.x;
  float sum[K * K] = {}, bias = 0.f;
  for (int image = blockIdx.y; image < batch; image += gridDim.y) {
    const size_t plane = ((size_t)image * channels + c) * h * wide;
    const float* m = mask ? mask + (size_t)image * h * wide : nullptr;
    for (int cut = 0; cut < t.across * t.down; cut++) {
      const int y0 = cut / t.across * t.height, x0 = cut % t.across * t.width;
      load_tile<K>(tile, x + plane, m, y0, x0, t.height, t.width, h, wide);
      __syncthreads();
      if (lane < t.width && x0 + lane < wide && first < t.height) {
        float d[STRIP];
#pragma unroll
        for (int s = 0; s < STRIP; s++) {
          const int i = y0 + first + s;
          d[s] = first + s < t.height && i < h ? to_f32(dy[plane + (size_t)i * wide + x0 + lane]) : 0.f;
          bias += d[s];
        }
#pragma unroll
        for (int r = 0; r < STRIP + K - 1; r++) {
          float row[K];
#pragma unroll
          for (int v = 0; v < K; v++) row[v] = tile[first + r][lane + v];
#pragma unroll
          for (int s = 0; s < STRIP; s++)
            if (r >= s && r - s < K)
#pragma unroll
              for (int v = 0; v < K; v++) sum[(r - s) * K + v] = fmaf(d[s], row[v], sum[(r - s) * K + v]);
        }
      }
      __syncthreads();  // the tile has been read
    }
  }
#pragma unroll
  for (int i = 0; i < K * K; i++) {
    const float all = warp_sum(sum[i]);
    if (lane == 0) sums[warp][i] = all;
  }
  bias = warp_sum(bias);
  if (lane == 0) sums[warp][K * K] = bias;
  __syncthreads();
  if (threadIdx.x > K * K) return;
  float all = 0.f;
  for (int v = 0; v < WARPS; v++) all += sums[v][threadIdx.x];
  const size_t part = (size_t)blockIdx.y * channels + c;
  if (threadIdx.x < K * K) partial_w[part * (K * K) + threadIdx.x] = all;
  else partial_b[part] = all;
}

}  // namespace

#define EXPORT_V1(T, NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) depthwise_fwd_v1_##NAME(T* y, const T* x, const float* w, const float* bias,             \
                                                                            const float* mask, int channels, int h, int wide, int k,         \
                                                                            long long n) {                                                   \
    filter_v1(y, x, w, bias, mask, channels, h, wide, k, n, false);                                                                          \
  }                                                                                                                                          \
  KERNEL(depthwise_fwd_v1_##NAME)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256) depthwise_bwd_x_v1_##NAME(T* dx, const T* dy, const float* w, const float* mask,         \
                                                                              int channels, int h, int wide, int k, long long n) {           \
    filter_v1(dx, dy, w, nullptr, mask, channels, h, wide, k, n, true);                                                                      \
  }                                                                                                                                          \
  KERNEL(depthwise_bwd_x_v1_##NAME)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256) depthwise_bwd_w_v1_##NAME(float* partial_w, float* partial_b, const T* dy, const T* x,   \
                                                                              const float* mask, int channels, int h, int wide, int k) {     \
    weight_v1(partial_w, partial_b, dy, x, mask, channels, h, wide, k);                                                                      \
  }                                                                                                                                          \
  KERNEL(depthwise_bwd_w_v1_##NAME)
EXPORT_V1(float, f32)
EXPORT_V1(bf16, bf16)

#define EXPORT_V2(T, NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128, 8) depthwise_fwd_v2_##NAME(T* y, const T* x, const float* w, const float* bias,          \
                                                                               const float* mask, int channels, int h, int wide) {           \
    filter_v2<5>(y, x, w, bias, mask, channels, h, wide, false);                                                                             \
  }                                                                                                                                          \
  KERNEL(depthwise_fwd_v2_##NAME)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(128, 8) depthwise_bwd_x_v2_##NAME(T* dx, const T* dy, const float* w, const float* mask,      \
                                                                                 int channels, int h, int wide) {                            \
    filter_v2<5>(dx, dy, w, (const float*)nullptr, mask, channels, h, wide, true);                                                           \
  }                                                                                                                                          \
  KERNEL(depthwise_bwd_x_v2_##NAME)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(128, 7) depthwise_bwd_w_v2_##NAME(float* partial_w, float* partial_b, const T* dy, const T* x, \
                                                                                 const float* mask, int batch, int channels, int h,          \
                                                                                 int wide) {                                                 \
    weight_v2<5>(partial_w, partial_b, dy, x, mask, batch, channels, h, wide);                                                               \
  }                                                                                                                                          \
  KERNEL(depthwise_bwd_w_v2_##NAME)
EXPORT_V2(float, f32)
EXPORT_V2(bf16, bf16)
