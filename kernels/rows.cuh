// rows.cuh - what kernels share that work on rows of a matrix [R, C], a thread, a warp or a block at a time.
#pragma once
#include "common.cuh"

// Eight numbers of a row from column c on, fewer at its end; one by one where rows do not start on multiples of 16 bytes.
template <class T> __device__ __forceinline__ void load_row(float (&v)[8], const T* row, int c, int columns) {
  if (columns % 8 == 0) return load8(v, row + c);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = c + j < columns ? to_f32(row[c + j]) : 0.f;
}
template <class T> __device__ __forceinline__ void store_row(T* row, const float (&v)[8], int c, int columns) {
  if (columns % 8 == 0) return store8(row + c, v);
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (c + j < columns) row[c + j] = from_f32<T>(v[j]);
}

// f(c) for each piece of a row that is this thread's, where `threads` of them share it.
template <class F> __device__ __forceinline__ void own_pieces(int thread, int threads, int columns, F f) {
  for (int c = thread * 8; c < columns; c += threads * 8) f(c);
}

// W consecutive numbers: 8 in accesses of 16 bytes where C is a multiple of 8, so that every row starts on a multiple of 16 bytes, else 1.
template <int W, class T> __device__ __forceinline__ void load(float (&v)[W], const T* p) {
  if constexpr (W == 8) load8(v, p);
  else v[0] = to_f32(p[0]);
}
template <int W, class T> __device__ __forceinline__ void store(T* p, const float (&v)[W]) {
  if constexpr (W == 8) store8(p, v);
  else p[0] = from_f32<T>(v[0]);
}

// A number as T holds it.
template <class T> __device__ __forceinline__ float round_to(float x) { return to_f32(from_f32<T>(x)); }

// What is done to a branch before it joins a residual stream: gains of layer scale [C], or null, and stochastic depth, u [B] or null. A row belongs to
// image r / tokens. The rule floor(keep + u) >= 1 is taken in f32; what is kept grows by `grow`.
struct Factors {
  const float* gains;
  const float* u;
  int tokens;
  float keep, grow;

  __device__ __forceinline__ float of_row(int r) const {
    if (!u) return 1.f;
    return floorf(keep + u[r / tokens]) >= 1.f ? grow : 0.f;
  }
  // v times the gains from column c on, times the factor of its row.
  template <int W> __device__ __forceinline__ void times(float (&v)[W], int c, float row) const {
    float g[W];
    if (gains) load<W>(g, gains + c);
#pragma unroll
    for (int j = 0; j < W; j++) v[j] = (gains ? v[j] * g[j] : v[j]) * row;
  }
};

// The first stage of a sum over rows. A block of 8 warps has 32 W columns from 32 W blockIdx.x on, a lane W of them; each warp brings what it summed. Written
// to partial [gridDim.y, C] is their sum, warps added in their order. All threads call it, once.
template <int W> __device__ __forceinline__ void store_share(float* partial, const float (&sum)[W], int columns) {
  __shared__ float sums[8][32 * W];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int j = 0; j < W; j++) sums[warp][lane * W + j] = sum[j];
  __syncthreads();
  const int mine = blockIdx.x * 32 * W + threadIdx.x;
  if (threadIdx.x >= 32 * W || mine >= columns) return;
  float all = 0.f;
  for (int w = 0; w < 8; w++) all += sums[w][threadIdx.x];
  partial[(size_t)blockIdx.y * columns + mine] = all;
}
