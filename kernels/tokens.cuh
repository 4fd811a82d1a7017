// tokens.cuh - what kernels that move tokens share: whole rows, places among ids, rows of a position table.
#pragma once
#include "rows.cuh"

// A warp copies a row as it is, or writes zeros where `from` is null. WIDE: 16 bytes a lane where the rows allow it.
template <bool WIDE, class T> __device__ __forceinline__ void copy_row(T* to, const T* from, int columns) {
  constexpr int EACH = 16 / sizeof(T);
  const int lane = threadIdx.x & 31;
  if (WIDE && columns % EACH == 0) {
    for (int c = lane; c < columns / EACH; c += 32)
      reinterpret_cast<uint4*>(to)[c] = from ? reinterpret_cast<const uint4*>(from)[c] : make_uint4(0, 0, 0, 0);
  } else {
    for (int c = lane; c < columns; c += 32) to[c] = from ? from[c] : from_f32<T>(0.f);
  }
}

// A warp looks for a number among n: its place, or -1. All lanes call it and get the same answer.
__device__ __forceinline__ int place_of(int wanted, const int* __restrict__ numbers, int n) {
  const int lane = threadIdx.x & 31;
  for (int first = 0; first < n; first += 32) {
    unsigned found = __ballot_sync(0xffffffffu, first + lane < n && numbers[first + lane] == wanted);
    if (found) return first + __ffs((int)found) - 1;
  }
  return -1;
}

// Row of a position table of so many rows for token t of an image: the `front` tokens and, where there are no ids, all tokens have their own; the others are
// numbered by ids [B, tokens - front].
__device__ __forceinline__ int position_of(int image, int t, int tokens, int front, const int* __restrict__ ids, int rows, unsigned* fault) {
  if (!ids || t < front) return t;
  int id = ids[(size_t)image * (tokens - front) + t - front];
  return in_range(id, rows - front, fault) ? front + id : front;
}

// A block of 8 warps has 256 columns, a lane eight of them; each warp brings its share of their sums. The answer is the sum for column threadIdx.x, warps
// added in their order. All threads call it, once.
__device__ __forceinline__ float sum_of_warps(const float (&share)[8]) {
  __shared__ float sums[8][256];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int j = 0; j < 8; j++) sums[warp][lane * 8 + j] = share[j];
  __syncthreads();
  float all = 0.f;
#pragma unroll
  for (int w = 0; w < 8; w++) all += sums[w][threadIdx.x];
  return all;
}
