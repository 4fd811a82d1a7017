// lamb.cu - LAMB for all parameters: the moments and both norms, the ratio of each parameter, the move.   Definition: src/optim/lamb.rs
//
//   g = scale g,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   u = rate m / (sqrt(v) root + eps) + decay p
//   p = p - lr q u,   q = |p| / |u|, or 1 where the parameter does not decay and where either norm is 0
//
// p, m, v, g flat f32; working flat bf16 or null; scale [1] = min(1, most / norm); pieces [pieces, 2] of uint4; firsts [slots + 1]: where the pieces of each slot
// start; scalars [slots] of (decay, rate = 1 / (1 - b1^t), root = 1 / sqrt(1 - b2^t), lr), root being 0 where there is no gradient. Sums are in double, in two
// stages and a fixed order. Limit: bandwidth. 16 bytes read and 8 written a parameter, then 12 read and 4 written, 2 more for the working copy.
#include "flat.cuh"

__device__ __forceinline__ float lamb_step(float p, float m, float v, float4 s, float eps) {
  return fmaf(s.x, p, s.y * m / fmaf(sqrtf(v), s.z, eps));
}

// scale [1]. One block of 256, which take the sums of squares in turn; norm is the length of all gradients.
extern "C" __global__ void __launch_bounds__(256, 2) lamb_scale_f32(float* __restrict__ scale, const double* __restrict__ squares, int parts, float most) {
  __shared__ double scratch[32];
  double sum = 0.;
  for (int i = threadIdx.x; i < parts; i += 256) sum += squares[i];
  const double norm = sqrt(block_sum(sum, scratch));
  if (threadIdx.x == 0) scale[0] = norm > (double)most ? (float)((double)most / norm) : 1.f;
}
KERNEL(lamb_scale_f32)

// partial [pieces, 2]: sums of p^2 and u^2. Block: one piece, 256 threads, eight numbers a thread at a time. Each number has one owner.
extern "C" __global__ void __launch_bounds__(256, 2)
    lamb_moments_f32(float* __restrict__ m, float* __restrict__ v, double* __restrict__ partial, const float* __restrict__ p, const float* __restrict__ g,
                     const float* __restrict__ scale, const uint4* __restrict__ pieces, const float4* __restrict__ scalars, float b1, float b2, float rest1,
                     float rest2, float eps) {
  __shared__ double scratch[32];
  const Piece piece = piece_of(pieces, blockIdx.x);
  const float4 s = scalars[piece.slot];
  const float factor = scale[0];
  double weight = 0., step = 0.;
  if (s.z != 0.f)
    for (int i = threadIdx.x * 8; i < piece.count; i += 256 * 8) {
      float P[8], G[8], M[8], V[8];
      load8(G, g + piece.gradient + i);
      load8(M, m + piece.state + i);
      load8(V, v + piece.state + i);
      load8(P, p + piece.value + i);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float shortened = G[j] * factor;
        M[j] = fmaf(rest1, shortened, b1 * M[j]);
        V[j] = fmaf(rest2 * shortened, shortened, b2 * V[j]);
        const double w = P[j], u = lamb_step(P[j], M[j], V[j], s, eps);
        weight += w * w;
        step += u * u;
      }
      store8(m + piece.state + i, M);
      store8(v + piece.state + i, V);
    }
  weight = block_sum(weight, scratch);
  step = block_sum(step, scratch);
  if (threadIdx.x == 0) {
    partial[2 * (size_t)blockIdx.x] = weight;
    partial[2 * (size_t)blockIdx.x + 1] = step;
  }
}
KERNEL(lamb_moments_f32)

// q [slots]. Block: one slot, 256 threads, which take its pieces in turn.
extern "C" __global__ void __launch_bounds__(256, 2) lamb_ratio_f32(float* __restrict__ q, const double* __restrict__ partial, const unsigned* __restrict__ firsts,
                                                                    const float4* __restrict__ scalars) {
  __shared__ double scratch[32];
  const unsigned first = firsts[blockIdx.x], last = firsts[blockIdx.x + 1];
  double weight = 0., step = 0.;
  for (unsigned i = first + threadIdx.x; i < last; i += 256) {
    weight += partial[2 * (size_t)i];
    step += partial[2 * (size_t)i + 1];
  }
  weight = block_sum(weight, scratch);
  step = block_sum(step, scratch);
  if (threadIdx.x == 0) q[blockIdx.x] = scalars[blockIdx.x].x != 0.f && weight > 0. && step > 0. ? (float)sqrt(weight / step) : 1.f;
}
KERNEL(lamb_ratio_f32)

// Block: one piece, 256 threads, eight numbers a thread at a time. Each number has one owner; nothing is shared.
extern "C" __global__ void __launch_bounds__(256, 4)
    lamb_f32(float* __restrict__ p, bf16* __restrict__ working, const float* __restrict__ m, const float* __restrict__ v, const float* __restrict__ q,
             const uint4* __restrict__ pieces, const float4* __restrict__ scalars, float eps) {
  const Piece piece = piece_of(pieces, blockIdx.x);
  const float4 s = scalars[piece.slot];
  if (s.z == 0.f) return;
  const float rate = s.w * q[piece.slot];
  for (int i = threadIdx.x * 8; i < piece.count; i += 256 * 8) {
    float P[8], M[8], V[8];
    load8(M, m + piece.state + i);
    load8(V, v + piece.state + i);
    load8(P, p + piece.value + i);
#pragma unroll
    for (int j = 0; j < 8; j++) P[j] -= rate * lamb_step(P[j], M[j], V[j], s, eps);
    store8(p + piece.value + i, P);
    if (working) store8(working + piece.working + i, P);
  }
}
KERNEL(lamb_f32)
