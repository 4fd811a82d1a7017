// tensor.cu - the kernels that are no ops: fill, conversion, sums in place.   Definition: src/tensor.rs
//
// Elementwise; a thread takes eight consecutive numbers, so addresses are multiples of 16 bytes but for the tail. Limit: bandwidth.
#include "common.cuh"

namespace {
constexpr int EACH = 8;
template <class F> __device__ __forceinline__ void pieces(long long n, F f) {
  long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * EACH;
  if (i < n) f(i, (int)min((long long)EACH, n - i));
}
}  // namespace

// y = x as another type, rounded to nearest even.
#define CAST(FROM, TO, NAME)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) cast_##NAME(TO* __restrict__ y, const FROM* __restrict__ x, long long n) { \
    pieces(n, [&](long long i, int count) {                                                                       \
      for (int j = 0; j < count; j++) y[i + j] = from_f32<TO>(to_f32(x[i + j]));                                  \
    });                                                                                                           \
  }                                                                                                               \
  KERNEL(cast_##NAME)
CAST(float, bf16, f32_bf16)
CAST(bf16, float, bf16_f32)
CAST(unsigned char, float, u8_f32)
CAST(unsigned char, bf16, u8_bf16)

// sum += x, in f32.
#define ACCUMULATE(S, X, NAME)                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) accumulate_##NAME(S* __restrict__ sum, const X* __restrict__ x, long long n) { \
    pieces(n, [&](long long i, int count) {                                                                       \
      if (count == EACH) {                                                                                        \
        float a[8], b[8];                                                                                         \
        load8(a, sum + i);                                                                                        \
        load8(b, x + i);                                                                                          \
        for (int j = 0; j < EACH; j++) a[j] += b[j];                                                              \
        store8(sum + i, a);                                                                                       \
      } else {                                                                                                    \
        for (int j = 0; j < count; j++) sum[i + j] = from_f32<S>(to_f32(sum[i + j]) + to_f32(x[i + j]));          \
      }                                                                                                           \
    });                                                                                                           \
  }                                                                                                               \
  KERNEL(accumulate_##NAME)
ACCUMULATE(float, float, f32)
ACCUMULATE(bf16, bf16, bf16)

// y = value everywhere; 4-byte and 2-byte numbers are given by their bits.
extern "C" __global__ void __launch_bounds__(256) fill_32(unsigned* __restrict__ y, int bits, long long n) {
  pieces(n, [&](long long i, int count) {
    for (int j = 0; j < count; j++) y[i + j] = (unsigned)bits;
  });
}
KERNEL(fill_32)
extern "C" __global__ void __launch_bounds__(256) fill_16(uint16_t* __restrict__ y, int bits, long long n) {
  pieces(n, [&](long long i, int count) {
    for (int j = 0; j < count; j++) y[i + j] = (uint16_t)bits;
  });
}
KERNEL(fill_16)

// x *= f[0]. Where f is 1, as it is for a loss that stands alone, nothing is read or written.
#define TIMES_SCALAR(T, NAME)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256) times_scalar_##NAME(T* __restrict__ x, const float* __restrict__ f, long long n) { \
    const float factor = f[0];                                                                                    \
    if (factor == 1.f) return;                                                                                    \
    pieces(n, [&](long long i, int count) {                                                                       \
      for (int j = 0; j < count; j++) x[i + j] = from_f32<T>(to_f32(x[i + j]) * factor);                          \
    });                                                                                                           \
  }                                                                                                               \
  KERNEL(times_scalar_##NAME)
TIMES_SCALAR(float, f32)
TIMES_SCALAR(bf16, bf16)

// out[0] = factor * sum of x[0, n). One block of 256; the shares and the tree are fixed by n alone.
extern "C" __global__ void __launch_bounds__(256) sum_f32(float* __restrict__ out, const float* __restrict__ x, int n, float factor) {
  __shared__ float scratch[32];
  float sum = 0.f;
  for (int i = threadIdx.x; i < n; i += 256) sum += x[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) out[0] = sum * factor;
}
KERNEL(sum_f32)

// out[c] = sum over parts of x[part][c]: the second stage of every sum over rows. A block has 32 columns; each of 8 warps takes every eighth part,
// then warp 0 adds the eight in their order.
#define SUM_COLUMNS(T, NAME)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) sum_columns_##NAME(float* __restrict__ out, const T* __restrict__ x, int parts, int columns) { \
    __shared__ float sums[8][32];                                                                                 \
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;                       \
    float sum = 0.f;                                                                                              \
    if (c < columns)                                                                                              \
      for (int p = warp; p < parts; p += 8) sum += to_f32(x[(size_t)p * columns + c]);                            \
    sums[warp][lane] = sum;                                                                                       \
    __syncthreads();                                                                                              \
    if (warp != 0 || c >= columns) return;                                                                        \
    float all = 0.f;                                                                                              \
    for (int w = 0; w < 8; w++) all += sums[w][lane];                                                             \
    out[c] = all;                                                                                                 \
  }                                                                                                               \
  KERNEL(sum_columns_##NAME)
SUM_COLUMNS(float, f32)
SUM_COLUMNS(bf16, bf16)

// partial[block][c] = sum of a share of the rows of x [rows, columns], the first stage: grid (column groups of 32, shares).
#define SUM_ROWS(T, NAME)                                                                                         \
  extern "C" __global__ void __launch_bounds__(256) sum_rows_##NAME(float* __restrict__ partial, const T* __restrict__ x, int rows, int columns) { \
    __shared__ float sums[8][32];                                                                                 \
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;                       \
    const int share = (rows + gridDim.y - 1) / gridDim.y, r0 = blockIdx.y * share, r1 = min(rows, r0 + share);    \
    float sum = 0.f;                                                                                              \
    if (c < columns)                                                                                              \
      for (int r = r0 + warp; r < r1; r += 8) sum += to_f32(x[(size_t)r * columns + c]);                          \
    sums[warp][lane] = sum;                                                                                       \
    __syncthreads();                                                                                              \
    if (warp != 0 || c >= columns) return;                                                                        \
    float all = 0.f;                                                                                              \
    for (int w = 0; w < 8; w++) all += sums[w][lane];                                                             \
    partial[(size_t)blockIdx.y * columns + c] = all;                                                              \
  }                                                                                                               \
  KERNEL(sum_rows_##NAME)
SUM_ROWS(float, f32)
SUM_ROWS(bf16, bf16)
