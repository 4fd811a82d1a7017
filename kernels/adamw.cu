// adamw.cu - AdamW for all parameters in one launch, with the bf16 copy that products read.   Definition: src/optim/adamw.rs
//
//   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p = p - (lr wd p + rate m / (sqrt(v) root + eps)),   rate = lr / (1 - b1^t),   root = 1 / sqrt(1 - b2^t)
//
// p, m, v, g flat f32; working flat bf16 or null; pieces [pieces, 2] of uint4; scalars [slots] of (lr wd, rate, root, 1 or 0 where there is no gradient).
// Limit: bandwidth. 16 bytes read and 12 written a parameter, 2 more for the working copy.
#include "flat.cuh"

// Block: one piece, 256 threads, eight numbers a thread at a time. Each number has one owner; nothing is shared.
extern "C" __global__ void __launch_bounds__(256, 4)
    adamw_f32(float* __restrict__ p, bf16* __restrict__ working, float* __restrict__ m, float* __restrict__ v, const float* __restrict__ g,
              const uint4* __restrict__ pieces, const float4* __restrict__ scalars, float b1, float b2, float rest1, float rest2, float eps) {
  const Piece piece = piece_of(pieces, blockIdx.x);
  const float4 s = scalars[piece.slot];
  if (s.w == 0.f) return;
  for (int i = threadIdx.x * 8; i < piece.count; i += 256 * 8) {
    float P[8], G[8], M[8], V[8];
    load8(G, g + piece.gradient + i);
    load8(M, m + piece.state + i);
    load8(V, v + piece.state + i);
    load8(P, p + piece.value + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      M[j] = fmaf(rest1, G[j], b1 * M[j]);
      V[j] = fmaf(rest2 * G[j], G[j], b2 * V[j]);
      const float size = fmaf(sqrtf(V[j]), s.z, eps);
      // Decay and move are summed before they meet p: in f32, 1 - lr wd would lose most of a small lr wd.
      P[j] -= fmaf(s.x, P[j], s.y * M[j] / size);
    }
    store8(m + piece.state + i, M);
    store8(v + piece.state + i, V);
    store8(p + piece.value + i, P);
    if (working) store8(working + piece.working + i, P);
  }
}
KERNEL(adamw_f32)
