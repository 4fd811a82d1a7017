// attention_v1.cu - attention in f32 arithmetic, the twin of the CPU's loops, and the small kernels around it.
// Definition: src/ops/attention/mod.rs; formulae and versions: attention.cu; layout: attention.cuh
//
// Four lanes share a row, each has a quarter of its numbers in registers: chunks of four, every fourth chunk. A block has 32 rows of one head and walks over
// tiles of 32 rows of the other side in shared memory; all eight rows of a warp read the same number there at once. Softmax is taken online, eight keys at a
// time. Sums never leave their four lanes: no atomics. Limit: f32 operations, 4 N^2 D forward and 14 N^2 D backward, and as many bytes from shared memory as
// there are multiplications.
#include "attention.cuh"
#include "rows.cuh"

namespace {

constexpr int ROWS = 32, EACH = 8, THREADS = 4 * ROWS;

// This lane's quarter of a row of d numbers; zeros from d on, and everywhere if there is no row.
template <int D, class T> __device__ __forceinline__ void load_quarter(float (&x)[D / 4], const T* row, int d) {
#pragma unroll
  for (int i = 0; i < D / 4; i++) {
    const int c = i / 4 * 16 + (threadIdx.x & 3) * 4 + i % 4;
    x[i] = row && c < d ? to_f32(row[c]) : 0.f;
  }
}
template <int D, class T> __device__ __forceinline__ void store_quarter(T* row, const float (&x)[D / 4], float factor, int d) {
#pragma unroll
  for (int i = 0; i < D / 4; i++) {
    const int c = i / 4 * 16 + (threadIdx.x & 3) * 4 + i % 4;
    if (c < d) row[c] = from_f32<T>(x[i] * factor);
  }
}
// a . row, the same number in the four lanes; `row` [D] lies in shared memory.
template <int D> __device__ __forceinline__ float row_dot(const float (&a)[D / 4], const float* row) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    const float4 x = *reinterpret_cast<const float4*>(row + 16 * i + (threadIdx.x & 3) * 4);
    sum += (a[4 * i] * x.x + a[4 * i + 1] * x.y) + (a[4 * i + 2] * x.z + a[4 * i + 3] * x.w);
  }
  return quad_sum(sum);
}
// y += w row.
template <int D> __device__ __forceinline__ void row_add(float (&y)[D / 4], float w, const float* row) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    const float4 x = *reinterpret_cast<const float4*>(row + 16 * i + (threadIdx.x & 3) * 4);
    y[4 * i] += w * x.x;
    y[4 * i + 1] += w * x.y;
    y[4 * i + 2] += w * x.z;
    y[4 * i + 3] += w * x.w;
  }
}
// 32 rows of `x`, the r-th being row at(r) for r < valid, into shared memory; the rest becomes zeros.
template <int D, class T, class At> __device__ __forceinline__ void load_tile(float* tile, const T* x, size_t stride, int valid, int d, At at) {
  for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
    const int r = i / D, c = i % D;
    tile[i] = r < valid && c < d ? to_f32(x[at(r) * stride + c]) : 0.f;
  }
}

// Four lanes a query. Shared: a tile of k and of v, a barrier before and after each use. Block 0 of a head leaves the scores of query 0 in class_rows and
// makes probabilities of them at its end.
template <int D, class T>
__device__ __forceinline__ void attention_fwd_v1(T* __restrict__ y, float* __restrict__ lse, float* __restrict__ class_rows,
                                                 const T* __restrict__ qkv, const unsigned* __restrict__ ids, int n, int keys, int heads, int d,
                                                 float scale, unsigned* fault) {
  __align__(16) __shared__ float k[ROWS * D], v[ROWS * D];
  __shared__ float lse0;
  const int h = blockIdx.y, b = blockIdx.z, r = blockIdx.x * ROWS + (threadIdx.x >> 2);
  const size_t row = (size_t)3 * heads * d, head = (size_t)heads * d, bh = (size_t)b * heads + h;
  const T* x = qkv + b * (n * row) + (size_t)h * d;
  const Tokens tokens = tokens_of(ids, b, keys, n, fault);
  float* row0 = class_rows && blockIdx.x == 0 ? class_rows + bh * keys : nullptr;
  float q[D / 4], sums[D / 4] = {}, most = -INFINITY, sum = 0.f;
  load_quarter<D>(q, r < n ? x + r * row : nullptr, d);
  for (int t0 = 0; t0 < keys; t0 += ROWS) {
    auto token = [&](int i) { return tokens(t0 + i); };
    __syncthreads();  // the tile before has been used
    load_tile<D>(k, x + head, row, keys - t0, d, token);
    load_tile<D>(v, x + 2 * head, row, keys - t0, d, token);
    __syncthreads();
    for (int j0 = 0; j0 < ROWS && t0 + j0 < keys; j0 += EACH) {
      float s[EACH], top = most;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        s[j] = t0 + j0 + j < keys ? row_dot<D>(q, k + (j0 + j) * D) : -INFINITY;
        if (row0 && threadIdx.x == 0 && t0 + j0 + j < keys) row0[t0 + j0 + j] = s[j];
        top = fmaxf(top, s[j]);
      }
      const float fix = expf((most - top) * scale);  // 0 the first time: `top` is finite since the first of eight is a key
      most = top;
      sum *= fix;
#pragma unroll
      for (int i = 0; i < D / 4; i++) sums[i] *= fix;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const float p = expf((s[j] - most) * scale);
        sum += p;
        row_add<D>(sums, p, v + (j0 + j) * D);
      }
    }
  }
  const float total = most * scale + logf(sum);
  if (r < n) {
    store_quarter<D>(y + ((size_t)b * n + r) * head + (size_t)h * d, sums, 1.f / sum, d);
    if (lse && (threadIdx.x & 3) == 0) lse[bh * n + r] = total;
  }
  if (!row0) return;  // the same for all threads
  if (threadIdx.x == 0) lse0 = total;
  __syncthreads();
  for (int j = threadIdx.x; j < keys; j += THREADS) row0[j] = expf(row0[j] * scale - lse0);
}

// Four lanes a query. Shared: a tile of k and of v, a barrier before and after each use.
template <int D, class T>
__device__ __forceinline__ void attention_bwd_v1_dq(T* __restrict__ dqkv, const T* __restrict__ dy, const T* __restrict__ qkv,
                                                    const unsigned* __restrict__ ids, const float* __restrict__ lse, const float* __restrict__ delta,
                                                    int n, int keys, int heads, int d, float scale, unsigned* fault) {
  __align__(16) __shared__ float k[ROWS * D], v[ROWS * D];
  const int h = blockIdx.y, b = blockIdx.z, r = blockIdx.x * ROWS + (threadIdx.x >> 2);
  const size_t row = (size_t)3 * heads * d, head = (size_t)heads * d, at = b * (n * row) + (size_t)h * d, bh = (size_t)b * heads + h;
  const T* x = qkv + at;
  const Tokens tokens = tokens_of(ids, b, keys, n, fault);
  float q[D / 4], g[D / 4], dq[D / 4] = {};
  load_quarter<D>(q, r < n ? x + r * row : nullptr, d);
  load_quarter<D>(g, r < n ? dy + ((size_t)b * n + r) * head + (size_t)h * d : nullptr, d);
  const float l = r < n ? lse[bh * n + r] : INFINITY, e = r < n ? delta[bh * n + r] : 0.f;
  for (int t0 = 0; t0 < keys; t0 += ROWS) {
    auto token = [&](int i) { return tokens(t0 + i); };
    __syncthreads();  // the tile before has been used
    load_tile<D>(k, x + head, row, keys - t0, d, token);
    load_tile<D>(v, x + 2 * head, row, keys - t0, d, token);
    __syncthreads();
#pragma unroll 2
    for (int j = 0; j < min(ROWS, keys - t0); j++) {
      const float s = row_dot<D>(q, k + j * D), dp = row_dot<D>(g, v + j * D);
      row_add<D>(dq, expf(s * scale - l) * (dp - e), k + j * D);
    }
  }
  if (r < n) store_quarter<D>(dqkv + at + r * row, dq, scale, d);
}

// Four lanes a key. Shared: a tile of q and of g with their lse and delta, a barrier before and after each use. With a list of keys the rows of dk and dv
// that it does not name are not written.
template <int D, class T>
__device__ __forceinline__ void attention_bwd_v1_dkv(T* __restrict__ dqkv, const T* __restrict__ dy, const T* __restrict__ qkv,
                                                     const unsigned* __restrict__ ids, const float* __restrict__ lse,
                                                     const float* __restrict__ delta, int n, int keys, int heads, int d, float scale,
                                                     unsigned* fault) {
  __align__(16) __shared__ float q[ROWS * D], g[ROWS * D];
  __shared__ float l[ROWS], e[ROWS];
  const int h = blockIdx.y, b = blockIdx.z, key = blockIdx.x * ROWS + (threadIdx.x >> 2);
  const size_t row = (size_t)3 * heads * d, head = (size_t)heads * d, at = b * (n * row) + (size_t)h * d, bh = (size_t)b * heads + h;
  const size_t own = key < keys ? at + tokens_of(ids, b, keys, n, fault)(key) * row : at;
  float k[D / 4], v[D / 4], dk[D / 4] = {}, dv[D / 4] = {};
  load_quarter<D>(k, key < keys ? qkv + own + head : nullptr, d);
  load_quarter<D>(v, key < keys ? qkv + own + 2 * head : nullptr, d);
  for (int t0 = 0; t0 < n; t0 += ROWS) {
    auto token = [&](int i) { return t0 + i; };
    __syncthreads();  // the tile before has been used
    load_tile<D>(q, qkv + at, row, n - t0, d, token);
    load_tile<D>(g, dy + (size_t)b * n * head + (size_t)h * d, head, n - t0, d, token);
    if (threadIdx.x < ROWS && t0 + threadIdx.x < n) {
      l[threadIdx.x] = lse[bh * n + t0 + threadIdx.x];
      e[threadIdx.x] = delta[bh * n + t0 + threadIdx.x];
    }
    __syncthreads();
#pragma unroll 2
    for (int i = 0; i < min(ROWS, n - t0); i++) {
      const float p = expf(row_dot<D>(k, q + i * D) * scale - l[i]), dp = row_dot<D>(v, g + i * D);
      row_add<D>(dv, p, g + i * D);
      row_add<D>(dk, p * (dp - e[i]), q + i * D);
    }
  }
  if (key >= keys) return;
  store_quarter<D>(dqkv + own + head, dk, scale, d);
  store_quarter<D>(dqkv + own + 2 * head, dv, 1.f, d);
}

// delta = rows(dy y). Eight lanes a row of d numbers, rows as they lie in y [B, N, H, d]; 16 bytes a lane where d is a multiple of 8. Limit: bandwidth.
template <class T>
__device__ __forceinline__ void attention_delta(float* __restrict__ delta, const T* __restrict__ dy, const T* __restrict__ y, int n, int heads, int d,
                                                int rows) {
  const int r = blockIdx.x * 16 + (threadIdx.x >> 3), part = threadIdx.x & 7;
  float sum = 0.f;
  for (int c = part * 8; r < rows && c < d; c += 64) {
    float a[8], b[8];
    load_row(a, y + (size_t)r * d, c, d);
    load_row(b, dy + (size_t)r * d, c, d);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += a[j] * b[j];
  }
#pragma unroll
  for (int o = 4; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  const int h = r % heads, token = r / heads % n, b = r / heads / n;
  if (r < rows && part == 0) delta[((size_t)b * heads + h) * n + token] = sum;
}

}  // namespace

// mean [B, K] over the heads of rows [B, H, K], head by head in order. A thread a number.
extern "C" __global__ void __launch_bounds__(256) mean_over_heads_f32(float* __restrict__ mean, const float* __restrict__ rows, int batch, int heads,
                                                                      int keys, float scale) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= batch * keys) return;
  const float* x = rows + (size_t)(i / keys) * heads * keys + i % keys;
  float sum = 0.f;
  for (int h = 0; h < heads; h++) sum += x[(size_t)h * keys];
  mean[i] = sum * scale;
}
KERNEL(mean_over_heads_f32)

#define DELTA(T, NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(128) attention_delta_##NAME(float* delta, const T* dy, const T* y, int n, int heads, int d,  \
                                                                           int rows) {                                                      \
    attention_delta(delta, dy, y, n, heads, d, rows);                                                                                       \
  }                                                                                                                                         \
  KERNEL(attention_delta_##NAME)
#define BACKWARD(SIDE, D, T, NAME, BLOCKS)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) attention_bwd_v1_##SIDE##_##NAME##_d##D(                                        \
      T* dqkv, const T* dy, const T* qkv, const unsigned* ids, const float* lse, const float* delta, int n, int keys, int heads, int d,     \
      float scale, unsigned* fault) {                                                                                                       \
    attention_bwd_v1_##SIDE<D>(dqkv, dy, qkv, ids, lse, delta, n, keys, heads, d, scale, fault);                                            \
  }                                                                                                                                         \
  KERNEL(attention_bwd_v1_##SIDE##_##NAME##_d##D)
#define V1(D, T, NAME, BLOCKS)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) attention_fwd_v1_##NAME##_d##D(                                                 \
      T* y, float* lse, float* class_rows, const T* qkv, const unsigned* ids, int n, int keys, int heads, int d, float scale,               \
      unsigned* fault) {                                                                                                                    \
    attention_fwd_v1<D>(y, lse, class_rows, qkv, ids, n, keys, heads, d, scale, fault);                                                     \
  }                                                                                                                                         \
  KERNEL(attention_fwd_v1_##NAME##_d##D)                                                                                                    \
  BACKWARD(dq, D, T, NAME, BLOCKS)                                                                                                          \
  BACKWARD(dkv, D, T, NAME, BLOCKS)
#define WIDTHS(T, NAME)                                                                                                                     \
  DELTA(T, NAME)                                                                                                                            \
  V1(16, T, NAME, 6)                                                                                                                        \
  V1(32, T, NAME, 5)                                                                                                                        \
  V1(48, T, NAME, 4)                                                                                                                        \
  V1(64, T, NAME, 4)                                                                                                                        \
  V1(80, T, NAME, 3)                                                                                                                        \
  V1(128, T, NAME, 2)
WIDTHS(float, f32)
WIDTHS(bf16, bf16)
