// flat.cuh - what kernels over the flat buffers of parameters share: pieces, and sums in double.   Definition: src/optim/pieces.rs
//
// A buffer holds the parameters one behind the other, each from a multiple of 64 bytes on, zeros in the gaps. Values hold all of them, gradients what is
// trained, moments what the optimiser updates, and bf16 has wider gaps: a parameter starts elsewhere in each.
#pragma once
#include "common.cuh"

// A part of one parameter. Starts and count are multiples of 8: the last piece reaches into the gap behind the parameter, where an update leaves zeros.
struct Piece {
  size_t value, working, gradient, state;
  int count, slot;
};

__device__ __forceinline__ Piece piece_of(const uint4* __restrict__ table, int i) {
  const uint4 a = table[2 * (size_t)i], b = table[2 * (size_t)i + 1];
  return {(size_t)a.x * 8, (size_t)a.y * 8, (size_t)a.z * 8, (size_t)a.w * 8, (int)b.x, (int)b.y};
}

// As block_sum of common.cuh, in double: squares of f32 neither overflow nor lose digits. `scratch`: 32 numbers.
__device__ __forceinline__ double block_sum(double v, double* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  __syncthreads();  // `scratch` may still be read from the time before
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  double all = 0.;
  for (int w = 0; w < warps; w++) all += scratch[w];
  return all;
}
