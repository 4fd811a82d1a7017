// tile.cuh - matrices [rows, D] of bf16 in shared memory, and the tensor-core products between 16-row strips of them.
//
// One warp owns M strips of 16 rows: what it loads from shared memory for the other side serves all of them, so M = 2 halves that traffic
// and doubles the registers. Three shapes of product cover attention, its backward and the relation losses:
//   strip_dot   c[16M x 16] = A[16M x D] . X[16 rows, D]^T    scores of 16M queries against 16 keys
//   strip_add   y[16M x D] += P[16M x 16] . X[16 rows, D]     weighted sum of 16 rows
//   pack_tile   turns the f32 result of the first into the bf16 left operand of the second, without leaving registers
// D is the padded head width (a multiple of 16); d <= D is the true one, columns d..D are zeros in shared memory.
#pragma once
#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Where the 16-byte chunk `c` of row `r` lies, in elements. The exclusive-or spreads any 8 consecutive rows of one chunk over all
// 32 banks for each D: with C = D/8 chunks a row, rows repeat their banks after 8/G rows, G = gcd(C, 8). The pattern has period 8, so
// swz(r0 + r, c) = r0 * D + swz(r, c) for r0 a multiple of 8: write it so, and the lane's part is computed once.
template <int D> __device__ __forceinline__ int swz(int r, int c) {
  static_assert(D % 16 == 0, "head width is padded to 16");
  constexpr int C = D / 8, G = C % 8 == 0 ? 8 : C % 4 == 0 ? 4 : 2;
  const int low = (c & (G - 1)) ^ (r / (8 / G) % G);  // the upper bits stay, so that the compiler can tell them from the lane's part
  return r * D + (((c & ~(G - 1)) | low) << 3);
}

// Copies rows of `g` (row stride in elements, d columns) to shared memory: row r of `s` is row at(r) of `g` for r < valid; rows up to `rows`
// and columns up to D become zeros. Asynchronous (commit and wait are the caller's) when rows are 16-byte aligned, that is when d is a multiple
// of 8.
template <int D, class At>
__device__ __forceinline__ void load_rows_at(bf16* s, const bf16* g, int rows, int valid, size_t stride, int d,
                                             int first, int step, At at) {
  for (int i = first; i < rows * (D / 8); i += step) {
    int r = i / (D / 8), c = i % (D / 8);
    int have = r < valid ? min(8, d - 8 * c) : 0;  // how many of the 8 values exist
    bf16* to = s + swz<D>(r, c);
    const bf16* from = g + (have > 0 ? at(r) * stride + 8 * c : 0);
    if (d % 8 == 0) {
      cp_async16(to, from, have > 0 ? 16 : 0);
    } else {
      for (int e = 0; e < 8; e++) to[e] = e < have ? from[e] : __float2bfloat16(0.f);
    }
  }
}

// The same for rows that lie one behind the other.
template <int D>
__device__ __forceinline__ void load_rows(bf16* s, const bf16* g, int rows, int valid, size_t stride, int d,
                                          int first, int step) {
  load_rows_at<D>(s, g, rows, valid, stride, d, first, step, [](int r) { return r; });
}

// M strips of 16 rows from r0 on as left operands: f[m][k] holds rows 16m.., columns 16k..16k+15.
template <int D, int M> __device__ __forceinline__ void load_strip(uint32_t (&f)[M][D / 16][4], const bf16* x, int r0) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int k = 0; k < D / 16; k++) ldmatrix_x4<false>(f[m][k], x + (r0 + 16 * m) * D + swz<D>(lane & 15, 2 * k + (lane >> 4)));
}

// c[m] = A[m] . X[r0..r0+15]^T. Lane l holds rows l/4 and l/4+8 (index i/2) of columns 8t + 2(l%4) + i%2, as c[m][t][i].
template <int D, int M>
__device__ __forceinline__ void strip_dot(float (&c)[M][2][4], const uint32_t (&a)[M][D / 16][4], const bf16* x, int r0) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) c[m][0][i] = c[m][1][i] = 0.f;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t b[4];
    ldmatrix_x4<false>(b, x + r0 * D + swz<D>((lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
#pragma unroll
    for (int m = 0; m < M; m++) {
      mma_bf16(c[m][0], a[m][k], b[0], b[1]);
      mma_bf16(c[m][1], a[m][k], b[2], b[3]);
    }
  }
}

// y[m] += P[m] . X[r0..r0+15]; y[m][t] holds columns 8t..8t+7 in the same lane layout as above.
template <int D, int M>
__device__ __forceinline__ void strip_add(float (&y)[M][D / 8][4], const uint32_t (&p)[M][4], const bf16* x, int r0) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int t = 0; t < D / 16; t++) {
    uint32_t b[4];
    ldmatrix_x4<true>(b, x + r0 * D + swz<D>(lane & 15, 2 * t + (lane >> 4)));
#pragma unroll
    for (int m = 0; m < M; m++) {
      mma_bf16(y[m][2 * t], p[m], b[0], b[1]);
      mma_bf16(y[m][2 * t + 1], p[m], b[2], b[3]);
    }
  }
}

template <int M> __device__ __forceinline__ void pack_tile(uint32_t (&p)[M][4], const float (&c)[M][2][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[m][i] = pack_bf16(c[m][i / 2][i % 2 * 2], c[m][i / 2][i % 2 * 2 + 1]);
}

template <int M, int T> __device__ __forceinline__ void zero(float (&y)[M][T][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) y[m][t][i] = 0.f;
}

// Writes y * (lo for rows 0..7, hi for 8..15) as bf16, row r as row at(r) of `g`, 16 bytes a lane, through `stage`: 8 rows of shared memory that
// only this warp uses. Rows from `valid` on and columns from d on are not written.
template <int D, class At>
__device__ __forceinline__ void store_strip_at(bf16* g, size_t stride, int valid, int d, const float (&y)[D / 8][4], float lo,
                                               float hi, bf16* stage, At at) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float mul = half ? hi : lo;
    __syncwarp();  // the half before (or the strip before) has been read
#pragma unroll
    for (int t = 0; t < D / 8; t++)
      *reinterpret_cast<__nv_bfloat162*>(stage + swz<D>(lane >> 2, t) + (lane & 3) * 2) =
          __floats2bfloat162_rn(y[t][2 * half] * mul, y[t][2 * half + 1] * mul);
    __syncwarp();
    for (int i = lane; i < D; i += 32) {  // 8 rows of D/8 chunks
      int r = i / (D / 8), c = i % (D / 8);
      if (8 * half + r >= valid || 8 * c >= d) continue;
      bf16* to = g + at(8 * half + r) * stride + 8 * c;
      const bf16* from = stage + swz<D>(r, c);
      if (d % 8 == 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else for (int e = 0; e < min(8, d - 8 * c); e++) to[e] = from[e];
    }
  }
}

// The same for rows that lie one behind the other.
template <int D>
__device__ __forceinline__ void store_strip(bf16* g, size_t stride, int valid, int d, const float (&y)[D / 8][4], float lo,
                                            float hi, bf16* stage) {
  store_strip_at<D>(g, stride, valid, d, y, lo, hi, stage, [](int r) { return r; });
}

// Sum and maximum over the four lanes that share a row of a strip.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
