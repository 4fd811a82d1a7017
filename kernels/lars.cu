// lars.cu - the factors by which LARS brings gradients to the size of their weights; sgd.cu makes the update.   Definition: src/optim/lars.rs
//
//   q = trust |p| / |g + decay p|, or 1 where either norm is 0, where the parameter is a vector, and where it has no gradient
//
// p, g flat f32; pieces [pieces, 2] of uint4; firsts [slots + 1]: where the pieces of each slot start; scalars [slots] of (decay, lr, 1 for a matrix or 0 for a
// vector, 1 or 0 where there is no gradient). Sums are in double, in two stages and a fixed order. Limit: bandwidth. 8 bytes a parameter.
#include "flat.cuh"

// partial [pieces, 2]: sums of p^2 and (g + decay p)^2. Block: one piece, 256 threads, eight numbers a thread at a time.
extern "C" __global__ void __launch_bounds__(256, 2) lars_norms_f32(double* __restrict__ partial, const float* __restrict__ p, const float* __restrict__ g,
                                                                    const uint4* __restrict__ pieces, const float4* __restrict__ scalars) {
  __shared__ double scratch[32];
  const Piece piece = piece_of(pieces, blockIdx.x);
  const float4 s = scalars[piece.slot];
  double weight = 0., gradient = 0.;
  if (s.z != 0.f && s.w != 0.f)
    for (int i = threadIdx.x * 8; i < piece.count; i += 256 * 8) {
      float P[8], G[8];
      load8(P, p + piece.value + i);
      load8(G, g + piece.gradient + i);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const double w = P[j], d = fmaf(s.x, P[j], G[j]);
        weight += w * w;
        gradient += d * d;
      }
    }
  weight = block_sum(weight, scratch);
  gradient = block_sum(gradient, scratch);
  if (threadIdx.x == 0) {
    partial[2 * (size_t)blockIdx.x] = weight;
    partial[2 * (size_t)blockIdx.x + 1] = gradient;
  }
}
KERNEL(lars_norms_f32)

// q [slots]. Block: one slot, 256 threads, which take its pieces in turn. The coefficient is trust + rest: what f32 leaves of the host's f64.
extern "C" __global__ void __launch_bounds__(256, 2) lars_trust_f32(float* __restrict__ q, const double* __restrict__ partial, const unsigned* __restrict__ firsts,
                                                                    float trust, float rest) {
  __shared__ double scratch[32];
  const unsigned first = firsts[blockIdx.x], last = firsts[blockIdx.x + 1];
  double weight = 0., gradient = 0.;
  for (unsigned i = first + threadIdx.x; i < last; i += 256) {
    weight += partial[2 * (size_t)i];
    gradient += partial[2 * (size_t)i + 1];
  }
  weight = sqrt(block_sum(weight, scratch));
  gradient = sqrt(block_sum(gradient, scratch));
  if (threadIdx.x == 0) q[blockIdx.x] = weight > 0. && gradient > 0. ? (float)(((double)trust + rest) * weight / gradient) : 1.f;
}
KERNEL(lars_trust_f32)
