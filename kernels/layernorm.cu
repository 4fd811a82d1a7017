// layernorm.cu - normalise each row of x [R, C], with the residual sum before it on request.   Definition: src/ops/layernorm.rs
//
//   y  = n w + b,  n = (x - mean) rstd          x may be the sum  a + branch g d, which is then written too (rounded first, so that y is the norm of what is stored)
//   dx = base + rstd (dn - avg(dn) - n avg(dn n)),  dn = dy w          dw = sum over rows of dy n,  db = sum over rows of dy
//
// x, y, branch, dy, dx, base f32 or bf16; w, b [C] f32 or both null; saved [R, 2] f32: mean and rstd, the variance in two passes. base, the gradient that x
// has already, may be null. partial [parts, 2, C] f32 or null: shares of dw and db, added by layernorm_bwd_sums_f32.
//
//   version  idea                                                                                    time
//   v1       one thread a row, straight from the CPU loop; one thread 32 rows in the backward        not run on a GPU
//   v2       one warp a row, shuffles, 16-byte loads; dw, db of a warp in shared memory              not run on a GPU
//   v3       v2 with the row, dw and db in registers: C <= 1280, a multiple of 8; else v2 runs       not run on a GPU   <- chosen
//
// Limit: bandwidth. Forward 2 R C numbers, with the sum 4 R C; backward 3 R C, with base 4 R C, and 4 C parts numbers for dw and db.
#include "rows.cuh"

namespace {

// The numbers of a row from column c on: x, or the residual sum as T holds it, which is left in `sum`.
template <bool ADD, int W, class T>
__device__ __forceinline__ void load_row(float (&v)[W], T* sum, const T* x, const T* branch, const Factors& f, float row, size_t at, int c) {
  load<W>(v, x + at + c);
  if constexpr (ADD) {
    float b[W];
    load<W>(b, branch + at + c);
    f.times(b, c, row);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] = round_to<T>(v[j] + b[j]);
    store<W>(sum + at + c, v);
  }
}

// v becomes the result.
template <int W> __device__ __forceinline__ void normalise(float (&v)[W], const float* w, const float* b, int c, float mean, float rstd) {
  float wv[W], bv[W];
  if (w) {
    load<W>(wv, w + c);
    load<W>(bv, b + c);
  }
#pragma unroll
  for (int j = 0; j < W; j++) {
    v[j] = (v[j] - mean) * rstd;
    if (w) v[j] = v[j] * wv[j] + bv[j];
  }
}

// A thread owns a row.
template <bool ADD, class T>
__device__ __forceinline__ void fwd_v1(T* sum, T* __restrict__ y, float* __restrict__ saved, const T* x, const T* branch, const Factors& f,
                                       const float* __restrict__ w, const float* __restrict__ b, int rows, int columns, float eps) {
  const int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= rows) return;
  const size_t at = (size_t)r * columns;
  const float row = ADD ? f.of_row(r) : 1.f;
  const T* source = ADD ? sum : x;
  float v[1], total = 0.f, square = 0.f;
  for (int c = 0; c < columns; c++) {
    load_row<ADD>(v, sum, x, branch, f, row, at, c);
    total += v[0];
  }
  const float mean = total / columns;
  for (int c = 0; c < columns; c++) {
    const float d = to_f32(source[at + c]) - mean;
    square += d * d;
  }
  const float rstd = 1.f / sqrtf(square / columns + eps);
  for (int c = 0; c < columns; c++) {
    load<1>(v, source + at + c);
    normalise(v, w, b, c, mean, rstd);
    store<1>(y + at + c, v);
  }
  saved[2 * (size_t)r] = mean;
  saved[2 * (size_t)r + 1] = rstd;
}

// A warp owns a row; lane l has W numbers from column l W on, then 32 W further on, and so forth. What it reads of the sum it has written itself.
template <bool ADD, int W, class T>
__device__ __forceinline__ void fwd_v2(T* sum, T* __restrict__ y, float* __restrict__ saved, const T* x, const T* branch, const Factors& f,
                                       const float* __restrict__ w, const float* __restrict__ b, int rows, int columns, float eps) {
  const int lane = threadIdx.x & 31, r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;  // the whole warp
  const size_t at = (size_t)r * columns;
  const float row = ADD ? f.of_row(r) : 1.f;
  const T* source = ADD ? sum : x;
  float v[W], total = 0.f, square = 0.f;
  for (int c = lane * W; c < columns; c += 32 * W) {
    load_row<ADD>(v, sum, x, branch, f, row, at, c);
#pragma unroll
    for (int j = 0; j < W; j++) total += v[j];
  }
  const float mean = warp_sum(total) / columns;
  for (int c = lane * W; c < columns; c += 32 * W) {
    load<W>(v, source + at + c);
#pragma unroll
    for (int j = 0; j < W; j++) square += (v[j] - mean) * (v[j] - mean);
  }
  const float rstd = 1.f / sqrtf(warp_sum(square) / columns + eps);
  for (int c = lane * W; c < columns; c += 32 * W) {
    load<W>(v, source + at + c);
    normalise(v, w, b, c, mean, rstd);
    store<W>(y + at + c, v);
  }
  if (lane == 0) *reinterpret_cast<float2*>(saved + 2 * (size_t)r) = make_float2(mean, rstd);
}

// A warp owns a row of at most 256 V columns and keeps it: lane l has columns 256 i + 8 l .. + 8 for i < V. Every number is read once.
template <bool ADD, int V, class T>
__device__ __forceinline__ void fwd_v3(T* sum, T* __restrict__ y, float* __restrict__ saved, const T* __restrict__ x, const T* __restrict__ branch,
                                       const Factors& f, const float* __restrict__ w, const float* __restrict__ b, int rows, int columns,
                                       float eps) {
  const int lane = threadIdx.x & 31, r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;
  const size_t at = (size_t)r * columns;
  const float row = ADD ? f.of_row(r) : 1.f;
  float v[V][8], total = 0.f, square = 0.f;
#pragma unroll
  for (int i = 0; i < V; i++) {
    const int c = i * 256 + lane * 8;
    if (c >= columns) continue;
    load_row<ADD>(v[i], sum, x, branch, f, row, at, c);
#pragma unroll
    for (int j = 0; j < 8; j++) total += v[i][j];
  }
  const float mean = warp_sum(total) / columns;
#pragma unroll
  for (int i = 0; i < V; i++) {
    if (i * 256 + lane * 8 >= columns) continue;
#pragma unroll
    for (int j = 0; j < 8; j++) square += (v[i][j] - mean) * (v[i][j] - mean);
  }
  const float rstd = 1.f / sqrtf(warp_sum(square) / columns + eps);
#pragma unroll
  for (int i = 0; i < V; i++) {
    const int c = i * 256 + lane * 8;
    if (c >= columns) continue;
    normalise(v[i], w, b, c, mean, rstd);
    store8(y + at + c, v[i]);
  }
  if (lane == 0) *reinterpret_cast<float2*>(saved + 2 * (size_t)r) = make_float2(mean, rstd);
}

// A thread owns 32 rows and partial[thread], as a piece of the CPU's loop does.
template <class T>
__device__ __forceinline__ void bwd_v1(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
                                       const float* __restrict__ w, const T* __restrict__ base, const float* __restrict__ saved, int rows,
                                       int columns) {
  const int part = blockIdx.x * blockDim.x + threadIdx.x, last = min(rows, (part + 1) * 32);
  if (part * 32 >= rows) return;
  float* dw = partial ? partial + (size_t)part * 2 * columns : nullptr;
  for (int c = 0; dw && c < 2 * columns; c++) dw[c] = 0.f;
  for (int r = part * 32; r < last; r++) {
    const size_t at = (size_t)r * columns;
    const float mean = saved[2 * (size_t)r], rstd = saved[2 * (size_t)r + 1];
    float sum = 0.f, product = 0.f;
    for (int c = 0; c < columns; c++) {
      const float n = (to_f32(x[at + c]) - mean) * rstd, g = to_f32(dy[at + c]), dn = w ? g * w[c] : g;
      if (dw) {
        dw[c] += g * n;
        dw[columns + c] += g;
      }
      sum += dn;
      product += dn * n;
    }
    const float average = sum / columns, projection = product / columns;
    for (int c = 0; dx && c < columns; c++) {
      const float n = (to_f32(x[at + c]) - mean) * rstd, g = to_f32(dy[at + c]), dn = w ? g * w[c] : g;
      const float d = rstd * (dn - average - n * projection);
      dx[at + c] = from_f32<T>(base ? to_f32(base[at + c]) + d : d);
    }
  }
}

// x becomes n, g becomes dn; dw and db grow by what this row gives.
template <int W>
__device__ __forceinline__ void terms(float (&x)[W], float (&g)[W], float (&dw)[W], float (&db)[W], const float* w, int c, float mean, float rstd,
                                      float& sum, float& product) {
  float wv[W];
  if (w) load<W>(wv, w + c);
#pragma unroll
  for (int j = 0; j < W; j++) {
    x[j] = (x[j] - mean) * rstd;
    dw[j] += g[j] * x[j];
    db[j] += g[j];
    if (w) g[j] *= wv[j];
    sum += g[j];
    product += g[j] * x[j];
  }
}

// dx of W columns from n and dn.
template <int W, class T>
__device__ __forceinline__ void give(T* dx, const T* base, const float (&n)[W], const float (&dn)[W], float average, float projection, float rstd) {
  float v[W], b[W] = {};
  if (base) load<W>(b, base);
#pragma unroll
  for (int j = 0; j < W; j++) v[j] = b[j] + rstd * (dn[j] - average - n[j] * projection);
  store<W>(dx, v);
}

// A warp owns a row at a time, and 2 C floats of shared memory for its share of dw and db: a lane's columns are its own, so nothing is synchronised before
// the end, where the block's threads add the warps' shares in their order. The second sweep finds the row in L1.
template <int W, class T>
__device__ __forceinline__ void bwd_v2(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
                                       const float* __restrict__ w, const T* __restrict__ base, const float* __restrict__ saved, int rows,
                                       int columns) {
  SHARED(float, shares);  // [warps][2][C], or nothing if there is no partial
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  float* own = shares + (size_t)warp * 2 * columns;
  const float zero[W] = {};
  if (partial)
    for (int c = lane * W; c < columns; c += 32 * W) {
      store<W>(own + c, zero);
      store<W>(own + columns + c, zero);
    }
  for (int r = blockIdx.x * warps + warp; r < rows; r += gridDim.x * warps) {
    const size_t at = (size_t)r * columns;
    const float mean = saved[2 * (size_t)r], rstd = saved[2 * (size_t)r + 1];
    float n[W], g[W], dw[W] = {}, db[W] = {}, sum = 0.f, product = 0.f;
    for (int c = lane * W; c < columns; c += 32 * W) {
      load<W>(n, x + at + c);
      load<W>(g, dy + at + c);
      if (partial) {
        load<W>(dw, own + c);
        load<W>(db, own + columns + c);
      }
      terms(n, g, dw, db, w, c, mean, rstd, sum, product);
      if (partial) {
        store<W>(own + c, dw);
        store<W>(own + columns + c, db);
      }
    }
    const float average = warp_sum(sum) / columns, projection = warp_sum(product) / columns;
    for (int c = lane * W; dx && c < columns; c += 32 * W) {
      load<W>(n, x + at + c);
      load<W>(g, dy + at + c);
      terms(n, g, dw, db, w, c, mean, rstd, sum, product);
      give(dx + at + c, base ? base + at + c : nullptr, n, g, average, projection, rstd);
    }
  }
  if (!partial) return;  // the same for all threads
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * columns; c += blockDim.x) {
    float all = 0.f;
    for (int k = 0; k < warps; k++) all += shares[(size_t)k * 2 * columns + c];
    partial[(size_t)blockIdx.x * 2 * columns + c] = all;
  }
}

// A warp owns a row of at most 256 V columns at a time and keeps it; lane l has columns 256 i + 8 l .. + 8 for i < V and their dw and db. At the end the
// block's threads add the warps' shares in their order, 256 columns at a time.
template <int V, class T>
__device__ __forceinline__ void bwd_v3(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
                                       const float* __restrict__ w, const T* __restrict__ base, const float* __restrict__ saved, int rows,
                                       int columns) {
  __shared__ float shares[8][256];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float dw[V][8] = {}, db[V][8] = {};
  for (int r = blockIdx.x * 8 + warp; r < rows; r += gridDim.x * 8) {
    const size_t at = (size_t)r * columns;
    const float2 s = *reinterpret_cast<const float2*>(saved + 2 * (size_t)r);
    float n[V][8], g[V][8], sum = 0.f, product = 0.f;
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int c = i * 256 + lane * 8;
      if (c >= columns) continue;
      load8(n[i], x + at + c);
      load8(g[i], dy + at + c);
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int c = i * 256 + lane * 8;
      if (c < columns) terms(n[i], g[i], dw[i], db[i], w, c, s.x, s.y, sum, product);
    }
    const float average = warp_sum(sum) / columns, projection = warp_sum(product) / columns;
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int c = i * 256 + lane * 8;
      if (dx && c < columns) give(dx + at + c, base ? base + at + c : nullptr, n[i], g[i], average, projection, s.y);
    }
  }
  if (!partial) return;  // the same for all threads
#pragma unroll
  for (int i = 0; i < 2 * V; i++) {
    __syncthreads();  // the shares may still be read from the time before
    store8(shares[warp] + lane * 8, i < V ? dw[i] : db[i - V]);
    __syncthreads();
    const int c = i % V * 256 + threadIdx.x;
    float all = 0.f;
    for (int k = 0; k < 8; k++) all += shares[k][threadIdx.x];
    if (c < columns) partial[((size_t)blockIdx.x * 2 + i / V) * columns + c] = all;
  }
}

}  // namespace

// dw and db (either may be null) of partial [parts, 2, C]. Block: 32 columns of one of them (blockIdx.y); each of 32 warps adds every 32nd part, then warp 0
// the 32 shares in their order.
extern "C" __global__ void __launch_bounds__(1024, 1) layernorm_bwd_sums_f32(float* __restrict__ dw, float* __restrict__ db,
                                                                            const float* __restrict__ partial, int parts, int columns) {
  __shared__ float shares[32][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
  float* out = blockIdx.y ? db : dw;
  if (!out) return;
  float sum = 0.f;
  if (c < columns)
    for (int p = warp; p < parts; p += 32) sum += partial[((size_t)p * 2 + blockIdx.y) * columns + c];
  shares[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= columns) return;
  float all = 0.f;
  for (int k = 0; k < 32; k++) all += shares[k][lane];
  out[c] = all;
}
KERNEL(layernorm_bwd_sums_f32)

#define PLAIN(T) T *y, float *saved, const T *x, const float *w, const float *b, int rows, int columns, float eps
#define SUMMED(T)                                                                                                                           \
  T *sum, T *y, float *saved, const T *x, const T *branch, const float *gains, const float *u, const float *w, const float *b, int rows,    \
      int columns, int tokens, float keep, float grow, float eps
#define BACKWARD(T)                                                                                                                         \
  T *dx, float *partial, const T *dy, const T *x, const float *w, const T *base, const float *saved, int rows, int columns

#define EXPORT(T, NAME)                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(128) layernorm_fwd_v1_##NAME(PLAIN(T)) {                                                     \
    fwd_v1<false>((T*)nullptr, y, saved, x, x, Factors{}, w, b, rows, columns, eps);                                                        \
  }                                                                                                                                         \
  KERNEL(layernorm_fwd_v1_##NAME)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(128) add_layernorm_fwd_v1_##NAME(SUMMED(T)) {                                                \
    fwd_v1<true>(sum, y, saved, x, branch, Factors{gains, u, tokens, keep, grow}, w, b, rows, columns, eps);                                \
  }                                                                                                                                         \
  KERNEL(add_layernorm_fwd_v1_##NAME)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256, 4) layernorm_fwd_v2_##NAME(PLAIN(T)) {                                                  \
    if (columns % 8 == 0) fwd_v2<false, 8>((T*)nullptr, y, saved, x, x, Factors{}, w, b, rows, columns, eps);                               \
    else fwd_v2<false, 1>((T*)nullptr, y, saved, x, x, Factors{}, w, b, rows, columns, eps);                                                \
  }                                                                                                                                         \
  KERNEL(layernorm_fwd_v2_##NAME)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 4) add_layernorm_fwd_v2_##NAME(SUMMED(T)) {                                             \
    const Factors f{gains, u, tokens, keep, grow};                                                                                          \
    if (columns % 8 == 0) fwd_v2<true, 8>(sum, y, saved, x, branch, f, w, b, rows, columns, eps);                                           \
    else fwd_v2<true, 1>(sum, y, saved, x, branch, f, w, b, rows, columns, eps);                                                            \
  }                                                                                                                                         \
  KERNEL(add_layernorm_fwd_v2_##NAME)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(128) layernorm_bwd_v1_##NAME(BACKWARD(T)) {                                                  \
    bwd_v1(dx, partial, dy, x, w, base, saved, rows, columns);                                                                              \
  }                                                                                                                                         \
  KERNEL(layernorm_bwd_v1_##NAME)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 2) layernorm_bwd_v2_##NAME(BACKWARD(T)) {                                               \
    if (columns % 8 == 0) bwd_v2<8>(dx, partial, dy, x, w, base, saved, rows, columns);                                                     \
    else bwd_v2<1>(dx, partial, dy, x, w, base, saved, rows, columns);                                                                      \
  }                                                                                                                                         \
  KERNEL(layernorm_bwd_v2_##NAME)                                                                                                           \
  WIDTH(T, NAME, 1, 256, 2) WIDTH(T, NAME, 2, 512, 2) WIDTH(T, NAME, 3, 768, 2) WIDTH(T, NAME, 4, 1024, 1) WIDTH(T, NAME, 5, 1280, 1)

#define WIDTH(T, NAME, V, C, BLOCKS)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 3) layernorm_fwd_v3_##NAME##_c##C(PLAIN(T)) {                                           \
    fwd_v3<false, V>((T*)nullptr, y, saved, x, x, Factors{}, w, b, rows, columns, eps);                                                     \
  }                                                                                                                                         \
  KERNEL(layernorm_fwd_v3_##NAME##_c##C)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 3) add_layernorm_fwd_v3_##NAME##_c##C(SUMMED(T)) {                                      \
    fwd_v3<true, V>(sum, y, saved, x, branch, Factors{gains, u, tokens, keep, grow}, w, b, rows, columns, eps);                             \
  }                                                                                                                                         \
  KERNEL(add_layernorm_fwd_v3_##NAME##_c##C)                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, BLOCKS) layernorm_bwd_v3_##NAME##_c##C(BACKWARD(T)) {                                   \
    bwd_v3<V>(dx, partial, dy, x, w, base, saved, rows, columns);                                                                           \
  }                                                                                                                                         \
  KERNEL(layernorm_bwd_v3_##NAME##_c##C)

EXPORT(float, f32)
EXPORT(bf16, bf16)
