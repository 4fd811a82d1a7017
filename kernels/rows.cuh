// rows.cuh - rows walked in pieces of eight numbers: 16-byte accesses where a row is a multiple of eight long, single ones else.
#pragma once
#include "common.cuh"

// Columns c.. of a row as far as there are any, zeros beyond its end.
template <class T> __device__ __forceinline__ void load_piece(float (&v)[8], const T* row, int c, int columns) {
  if (columns % 8 == 0) return load8(v, row + c);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = c + j < columns ? to_f32(row[c + j]) : 0.f;
}
template <class T> __device__ __forceinline__ void store_piece(T* row, int c, int columns, const float (&v)[8]) {
  if (columns % 8 == 0) return store8(row + c, v);
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (c + j < columns) row[c + j] = from_f32<T>(v[j]);
}

// f(c) for each piece of a row that is this thread's, where `threads` of them share it.
template <class F> __device__ __forceinline__ void own_pieces(int thread, int threads, int columns, F f) {
  for (int c = thread * 8; c < columns; c += threads * 8) f(c);
}
