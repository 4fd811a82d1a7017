// tensor.cu - the kernels that are no ops: fill, conversion, sums in place, sums over rows.   Definition: src/tensor.rs, src/ops/mod.rs
//
// Elementwise kernels give a thread eight consecutive numbers in accesses of 16 bytes (8 for bytes), and the tail one by one. Limit: bandwidth.
#include "rows.cuh"

namespace {

constexpr int EACH = 8;

// f(first, count) for the numbers that are this thread's: eight, fewer at the end, or none.
template <class F> __device__ __forceinline__ void pieces(long long n, F f) {
  const long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * EACH;
  if (i < n) f(i, n - i < EACH ? (int)(n - i) : EACH);
}

// The first `count` of eight numbers that start on a multiple of 16 bytes.
template <class T> __device__ __forceinline__ void load_piece(float (&v)[8], const T* p, int count) { load_row(v, p, 0, count); }
__device__ __forceinline__ void load_piece(float (&v)[8], const unsigned char* p, int count) {
  const uint2 bytes = count == EACH ? *reinterpret_cast<const uint2*>(p) : make_uint2(0, 0);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    if (count == EACH) v[j] = (float)((j < 4 ? bytes.x : bytes.y) >> 8 * (j & 3) & 0xffu);
    else v[j] = j < count ? (float)p[j] : 0.f;
  }
}

// Block: 8 warps, 32 W columns of x from 32 W blockIdx.x on, and every gridDim.y-th group of 8 rows. A lane owns W columns, a warp a row at a time; at the end
// warps are added in their order. partial [gridDim.y, C].
template <int W, class T> __device__ __forceinline__ void sum_rows(float* __restrict__ partial, const T* __restrict__ x, int rows, int columns) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = (blockIdx.x * 32 + lane) * W;
  float sum[W] = {};
  if (c < columns) {
#pragma unroll 4
    for (int r = blockIdx.y * 8 + warp; r < rows; r += gridDim.y * 8) {
      float v[W];
      load<W>(v, x + (size_t)r * columns + c);
#pragma unroll
      for (int j = 0; j < W; j++) sum[j] += v[j];
    }
  }
  store_share(partial, sum, columns);
}

}  // namespace

// y = x as another type, rounded to nearest even.
#define CAST(FROM, TO, NAME)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256) cast_##NAME(TO* __restrict__ y, const FROM* __restrict__ x, long long n) {               \
    pieces(n, [&](long long i, int count) {                                                                                                  \
      float v[8];                                                                                                                            \
      load_piece(v, x + i, count);                                                                                                           \
      store_row(y + i, v, 0, count);                                                                                                         \
    });                                                                                                                                      \
  }                                                                                                                                          \
  KERNEL(cast_##NAME)
CAST(float, bf16, f32_bf16)
CAST(bf16, float, bf16_f32)
CAST(unsigned char, float, u8_f32)
CAST(unsigned char, bf16, u8_bf16)

// sum += x, in f32.
#define ACCUMULATE(T, NAME)                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256) accumulate_##NAME(T* __restrict__ sum, const T* __restrict__ x, long long n) {           \
    pieces(n, [&](long long i, int count) {                                                                                                  \
      float a[8], b[8];                                                                                                                      \
      load_piece(a, sum + i, count);                                                                                                         \
      load_piece(b, x + i, count);                                                                                                           \
      for (int j = 0; j < EACH; j++) a[j] += b[j];                                                                                           \
      store_row(sum + i, a, 0, count);                                                                                                       \
    });                                                                                                                                      \
  }                                                                                                                                          \
  KERNEL(accumulate_##NAME)
ACCUMULATE(float, f32)
ACCUMULATE(bf16, bf16)

// y = value everywhere; 4-byte and 2-byte numbers are given by their bits.
#define FILL(T, NAME)                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256) fill_##NAME(T* __restrict__ y, int bits, long long n) {                                  \
    const unsigned word = sizeof(T) == 4 ? (unsigned)bits : (unsigned)bits << 16 | ((unsigned)bits & 0xffffu);                               \
    pieces(n, [&](long long i, int count) {                                                                                                  \
      if (count == EACH) {                                                                                                                   \
        for (int j = 0; j < (int)sizeof(T) / 2; j++) reinterpret_cast<uint4*>(y + i)[j] = make_uint4(word, word, word, word);                \
      } else {                                                                                                                               \
        for (int j = 0; j < count; j++) y[i + j] = (T)bits;                                                                                  \
      }                                                                                                                                      \
    });                                                                                                                                      \
  }                                                                                                                                          \
  KERNEL(fill_##NAME)
FILL(unsigned, 32)
FILL(uint16_t, 16)

// x *= f[0]. Where f is 1, as it is for a loss that stands alone, nothing is read or written.
#define TIMES_SCALAR(T, NAME)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) times_scalar_##NAME(T* __restrict__ x, const float* __restrict__ f, long long n) {       \
    const float factor = f[0];                                                                                                               \
    if (factor == 1.f) return;                                                                                                               \
    pieces(n, [&](long long i, int count) {                                                                                                  \
      float v[8];                                                                                                                            \
      load_piece(v, x + i, count);                                                                                                           \
      for (int j = 0; j < EACH; j++) v[j] *= factor;                                                                                         \
      store_row(x + i, v, 0, count);                                                                                                         \
    });                                                                                                                                      \
  }                                                                                                                                          \
  KERNEL(times_scalar_##NAME)
TIMES_SCALAR(float, f32)
TIMES_SCALAR(bf16, bf16)

// out[0] = factor * sum of x[0, n). One block of 1024 threads, which take groups of four in turn, the numbers behind the last group going to the first threads;
// the shares and the tree are fixed by n alone.
extern "C" __global__ void __launch_bounds__(1024, 1) sum_f32(float* __restrict__ out, const float* __restrict__ x, int n, float factor) {
  __shared__ float scratch[32];
  float sum = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < n / 4; i += 1024) {
    const float4 v = reinterpret_cast<const float4*>(x)[i];
    sum += (v.x + v.y) + (v.z + v.w);
  }
  if ((int)threadIdx.x < n % 4) sum += x[n - n % 4 + threadIdx.x];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) out[0] = sum * factor;
}
KERNEL(sum_f32)

// out[c] = sum over parts of x[part][c]: the second stage of every sum over rows. A block has 32 columns; each of 32 warps takes every 32nd part,
// then warp 0 adds the 32 in their order.
extern "C" __global__ void __launch_bounds__(1024, 1) sum_columns_f32(float* __restrict__ out, const float* __restrict__ x, int parts, int columns) {
  __shared__ float sums[32][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (c < columns) {
#pragma unroll 8
    for (int p = warp; p < parts; p += 32) sum += x[(size_t)p * columns + c];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= columns) return;
  float all = 0.f;
  for (int w = 0; w < 32; w++) all += sums[w][lane];
  out[c] = all;
}
KERNEL(sum_columns_f32)

// partial [shares, C]: each share's sum of rows of x [rows, C], the first stage. Grid: groups of 256 columns where C is a multiple of 8, else of 32, and shares.
#define SUM_ROWS(T, NAME)                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 4) sum_rows_##NAME(float* partial, const T* x, int rows, int columns) {                  \
    if (columns % 8 == 0) sum_rows<8>(partial, x, rows, columns);                                                                            \
    else sum_rows<1>(partial, x, rows, columns);                                                                                             \
  }                                                                                                                                          \
  KERNEL(sum_rows_##NAME)
SUM_ROWS(float, f32)
SUM_ROWS(bf16, bf16)
