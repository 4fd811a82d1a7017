// region_conv.cu - a k x k filter of each channel over tokens that stand in regions of a grid.   Definition: src/ops/regions/conv.rs
//
//   y[b, t, c] = bias[c] + sum_{u, v} w[c, u, v] x[b, t + (u - k/2, v - k/2), c]             neighbours on the fine grid, 0 where they are not there
//   dx = the same of dy with w turned round, 0 at hidden regions                             a neighbour of y is not there if it is hidden, one of dx is
//   dw[c, u, v] = sum_{b, t} dy[b, t, c] x[b, t + (u - k/2, v - k/2), c]                     db[c] = sum_{b, t} dy[b, t, c]
//
// x, y [B, K side side, C] f32 or bf16; w [C, k, k], bias [C], hidden [B, L] f32; bias, kept and places, hidden may be null. All sums in f32.
//
//   version  idea                                                                         B=256 K=49 C=256, side 4, k=5, bf16
//   v1       one thread a number of y, straight from the CPU loop, any side and k         not run on a GPU
//   v2       a thread a channel (two in bf16) of a region: taps and sums in registers,    not run on a GPU   <- chosen for side 4 and 2, k=5,
//            tokens of the nine regions around streamed, those that are not there skipped           and even C in bf16
//
// Limit: bandwidth. Forward and dx move x and y once (4 bytes a number in bf16, 25 FMAs); v2 asks the caches for 4 numbers of x a number of y at side 4 and
// for 9 at side 2, where v1 asks for 25 of x and 25 of w. dw moves dy and x once and leaves 100 bytes a channel and block.
#include "regions.cuh"

namespace {

// A thread owns a number of y. `turned`: w turned round, and hidden regions are 0 in the result instead of in x.
template <class T>
__device__ __forceinline__ void filter_v1(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, Grid grid,
                                          int channels, int side, int cell, int k, long long n, bool turned, unsigned* fault) {
  const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
  if (at >= n) return;
  const int c = (int)(at % channels), token = (int)(at / channels), each = side * side, i = token / each, p = token - i * each;
  const int image = i / grid.present, region = grid.region(i, fault), taps = k * k;
  if (turned && grid.is_hidden(image, region)) {
    y[at] = from_f32<T>(0.f);
    return;
  }
  if (turned) grid.hidden = nullptr;
  const int row = region / grid.across * side + row_of(p, side, cell), column = region % grid.across * side + column_of(p, side, cell);
  float sum = bias ? bias[c] : 0.f;
  for (int tap = 0; tap < taps; tap++) {
    const int yy = row + tap / k - k / 2, xx = column + tap % k - k / 2;
    if (yy < 0 || xx < 0) continue;
    const int place = grid.place(image, yy / side, xx / side);
    if (place < 0) continue;
    const size_t from = ((size_t)image * grid.present + place) * each + token_of(yy % side, xx % side, side, cell);
    sum = fmaf(to_f32(x[from * channels + c]), w[c * taps + (turned ? taps - 1 - tap : tap)], sum);
  }
  y[at] = from_f32<T>(sum);
}

// Block: 256 channels, `each` regions, tap blockIdx.z; a thread owns a channel. partial_w [shares, C, k, k], partial_b [shares, C].
template <class T>
__device__ __forceinline__ void weight_v1(float* __restrict__ partial_w, float* __restrict__ partial_b, const T* __restrict__ dy, const T* __restrict__ x,
                                          Grid grid, int channels, int side, int cell, int k, int regions, int each, unsigned* fault) {
  const int c = blockIdx.y * 256 + threadIdx.x, tokens = side * side, tap = blockIdx.z;
  if (c >= channels) return;
  float sum = 0.f, bias = 0.f;
  for (int i = blockIdx.x * each; i < min((int)(blockIdx.x + 1) * each, regions); i++) {
    const int image = i / grid.present, region = grid.region(i, fault);
    for (int p = 0; p < tokens; p++) {
      const float d = to_f32(dy[((size_t)i * tokens + p) * channels + c]);
      bias += d;
      const int yy = region / grid.across * side + row_of(p, side, cell) + tap / k - k / 2;
      const int xx = region % grid.across * side + column_of(p, side, cell) + tap % k - k / 2;
      if (yy < 0 || xx < 0) continue;
      const int place = grid.place(image, yy / side, xx / side);
      if (place < 0) continue;
      const size_t from = ((size_t)image * grid.present + place) * tokens + token_of(yy % side, xx % side, side, cell);
      sum = fmaf(d, to_f32(x[from * channels + c]), sum);
    }
  }
  partial_w[((size_t)blockIdx.x * channels + c) * (k * k) + tap] = sum;
  if (tap == 0) partial_b[(size_t)blockIdx.x * channels + c] = bias;
}

constexpr int THREADS = 64, CELL = 2;

// The channels of a thread, as one access of 4 bytes: both of a bf16 pair, where rows start on multiples of pairs.
template <int W, class T> __device__ __forceinline__ void load(float (&v)[W], const T* p) {
  if constexpr (W == 2) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(p);
    v[0] = low_bf16(pair);
    v[1] = high_bf16(pair);
  } else {
    v[0] = to_f32(p[0]);
  }
}
template <int W, class T> __device__ __forceinline__ void store(T* p, const float (&v)[W]) {
  if constexpr (W == 2) *reinterpret_cast<uint32_t*>(p) = pack_bf16(v[0], v[1]);
  else p[0] = from_f32<T>(v[0]);
}

// Calls f(row, column, numbers of x) for each token around region i that is there, from K/2 above its first row to K/2 below its last; rows and columns are
// counted from its corner and known to the compiler. Which regions are there is the same for all threads. x points to the thread's channels of its first row.
template <int SIDE, int K, int W, class T, class F>
__device__ __forceinline__ void around(const Grid& grid, const T* __restrict__ x, int image, int region, int channels, F f) {
  static_assert(K / 2 <= SIDE, "neighbours lie in the nine regions around");
  constexpr int H = K / 2;
#pragma unroll
  for (int n = 0; n < 9; n++) {
    const int place = grid.place(image, region / grid.across + n / 3 - 1, region % grid.across + n % 3 - 1);
    if (place < 0) continue;
    const T* from = x + ((size_t)image * grid.present + place) * (SIDE * SIDE) * channels;
#pragma unroll
    for (int p = 0; p < SIDE * SIDE; p++) {
      const int row = (n / 3 - 1) * SIDE + p / SIDE, column = (n % 3 - 1) * SIDE + p % SIDE;
      if (row < -H || row >= SIDE + H || column < -H || column >= SIDE + H) continue;
      float v[W];
      load(v, from + token_of(p / SIDE, p % SIDE, SIDE, CELL) * channels);
      f(row, column, v);
    }
  }
}

// Block: 64 threads with W channels each from blockIdx.y on, `each` regions one after the other. The taps stay in registers.
template <int SIDE, int K, int W, bool TURNED, class T>
__device__ __forceinline__ void filter_v2(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, Grid grid,
                                          int channels, int regions, int each, unsigned* fault) {
  constexpr int TOKENS = SIDE * SIDE, H = K / 2;
  const int c = (blockIdx.y * THREADS + threadIdx.x) * W;
  if (c >= channels) return;
  float taps[K * K][W], start[W];
#pragma unroll
  for (int l = 0; l < W; l++) {
    start[l] = bias ? bias[c + l] : 0.f;
#pragma unroll
    for (int tap = 0; tap < K * K; tap++) taps[tap][l] = w[(c + l) * (K * K) + (TURNED ? K * K - 1 - tap : tap)];
  }
  Grid seen = grid;
  if (TURNED) seen.hidden = nullptr;
  for (int i = blockIdx.x * each; i < min((int)(blockIdx.x + 1) * each, regions); i++) {
    const int image = i / grid.present, region = grid.region(i, fault);
    float sum[TOKENS][W];
#pragma unroll
    for (int p = 0; p < TOKENS; p++)
#pragma unroll
      for (int l = 0; l < W; l++) sum[p][l] = start[l];
    if (!TURNED || !grid.is_hidden(image, region))
      around<SIDE, K, W>(seen, x + c, image, region, channels, [&](int row, int column, const float(&v)[W]) {
#pragma unroll
        for (int p = 0; p < TOKENS; p++) {
          const int u = row - p / SIDE + H, t = column - p % SIDE + H;
          if (u < 0 || u >= K || t < 0 || t >= K) continue;
#pragma unroll
          for (int l = 0; l < W; l++) sum[p][l] = fmaf(v[l], taps[u * K + t][l], sum[p][l]);
        }
      });
    T* to = y + (size_t)i * TOKENS * channels + c;
#pragma unroll
    for (int p = 0; p < TOKENS; p++) store(to + token_of(p / SIDE, p % SIDE, SIDE, CELL) * channels, sum[p]);
  }
}

// Block: as above. A thread sums the taps of its channels over the block's regions in registers. partial_w [shares, C, K, K], partial_b [shares, C].
template <int SIDE, int K, int W, class T>
__device__ __forceinline__ void weight_v2(float* __restrict__ partial_w, float* __restrict__ partial_b, const T* __restrict__ dy, const T* __restrict__ x,
                                          Grid grid, int channels, int regions, int each, unsigned* fault) {
  constexpr int TOKENS = SIDE * SIDE, H = K / 2;
  const int c = (blockIdx.y * THREADS + threadIdx.x) * W;
  if (c >= channels) return;
  float sum[K * K][W] = {}, bias[W] = {};
  for (int i = blockIdx.x * each; i < min((int)(blockIdx.x + 1) * each, regions); i++) {
    const T* own = dy + (size_t)i * TOKENS * channels + c;
    float d[TOKENS][W];
#pragma unroll
    for (int p = 0; p < TOKENS; p++) {
      load(d[p], own + token_of(p / SIDE, p % SIDE, SIDE, CELL) * channels);
#pragma unroll
      for (int l = 0; l < W; l++) bias[l] += d[p][l];
    }
    around<SIDE, K, W>(grid, x + c, i / grid.present, grid.region(i, fault), channels, [&](int row, int column, const float(&v)[W]) {
#pragma unroll
      for (int p = 0; p < TOKENS; p++) {
        const int u = row - p / SIDE + H, t = column - p % SIDE + H;
        if (u < 0 || u >= K || t < 0 || t >= K) continue;
#pragma unroll
        for (int l = 0; l < W; l++) sum[u * K + t][l] = fmaf(d[p][l], v[l], sum[u * K + t][l]);
      }
    });
  }
  const size_t at = (size_t)blockIdx.x * channels + c;
#pragma unroll
  for (int l = 0; l < W; l++) {
    partial_b[at + l] = bias[l];
#pragma unroll
    for (int tap = 0; tap < K * K; tap++) partial_w[(at + l) * (K * K) + tap] = sum[tap][l];
  }
}

}  // namespace

#define EXPORT_V1(T, NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) region_conv_fwd_v1_##NAME(                                                               \
      T* y, const T* x, const float* w, const float* bias, const int* kept, const unsigned* places, const float* hidden, int down,           \
      int across, int present, int channels, int side, int cell, int k, long long n, unsigned* fault) {                                      \
    filter_v1(y, x, w, bias, Grid{down, across, present, kept, places, hidden}, channels, side, cell, k, n, false, fault);                   \
  }                                                                                                                                          \
  KERNEL(region_conv_fwd_v1_##NAME)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256) region_conv_bwd_x_v1_##NAME(                                                             \
      T* dx, const T* dy, const float* w, const int* kept, const unsigned* places, const float* hidden, int down, int across,                \
      int present, int channels, int side, int cell, int k, long long n, unsigned* fault) {                                                  \
    filter_v1(dx, dy, w, (const float*)nullptr, Grid{down, across, present, kept, places, hidden}, channels, side, cell, k, n, true, fault); \
  }                                                                                                                                          \
  KERNEL(region_conv_bwd_x_v1_##NAME)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256) region_conv_bwd_w_v1_##NAME(                                                             \
      float* partial_w, float* partial_b, const T* dy, const T* x, const int* kept, const unsigned* places, const float* hidden, int down,   \
      int across, int present, int channels, int side, int cell, int k, int regions, int each, unsigned* fault) {                            \
    weight_v1(partial_w, partial_b, dy, x, Grid{down, across, present, kept, places, hidden}, channels, side, cell, k, regions, each, fault);\
  }                                                                                                                                          \
  KERNEL(region_conv_bwd_w_v1_##NAME)
EXPORT_V1(float, f32)
EXPORT_V1(bf16, bf16)

#define EXPORT_V2(T, W, NAME, SIDE)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, 8) region_conv_fwd_v2_##NAME##_side##SIDE(                                           \
      T* y, const T* x, const float* w, const float* bias, const int* kept, const unsigned* places, const float* hidden, int down,           \
      int across, int present, int channels, int regions, int each, unsigned* fault) {                                                       \
    filter_v2<SIDE, 5, W, false>(y, x, w, bias, Grid{down, across, present, kept, places, hidden}, channels, regions, each, fault);          \
  }                                                                                                                                          \
  KERNEL(region_conv_fwd_v2_##NAME##_side##SIDE)                                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, 8) region_conv_bwd_x_v2_##NAME##_side##SIDE(                                         \
      T* dx, const T* dy, const float* w, const int* kept, const unsigned* places, const float* hidden, int down, int across,                \
      int present, int channels, int regions, int each, unsigned* fault) {                                                                   \
    filter_v2<SIDE, 5, W, true>(dx, dy, w, (const float*)nullptr, Grid{down, across, present, kept, places, hidden}, channels, regions, each, fault);\
  }                                                                                                                                          \
  KERNEL(region_conv_bwd_x_v2_##NAME##_side##SIDE)                                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 8) region_conv_bwd_w_v2_##NAME##_side##SIDE(                                         \
      float* partial_w, float* partial_b, const T* dy, const T* x, const int* kept, const unsigned* places, const float* hidden, int down,   \
      int across, int present, int channels, int regions, int each, unsigned* fault) {                                                       \
    weight_v2<SIDE, 5, W>(partial_w, partial_b, dy, x, Grid{down, across, present, kept, places, hidden}, channels, regions, each, fault);   \
  }                                                                                                                                          \
  KERNEL(region_conv_bwd_w_v2_##NAME##_side##SIDE)
EXPORT_V2(float, 1, f32, 4)
EXPORT_V2(float, 1, f32, 2)
EXPORT_V2(bf16, 2, bf16, 4)
EXPORT_V2(bf16, 2, bf16, 2)
