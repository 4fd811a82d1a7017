// sgd.cu - gradient descent with momentum for all parameters in one launch; LARS with a factor for each of them.   Definition: src/optim/sgd.rs, src/optim/lars.rs
//
//   d = trust (g + decay p),   buffer = momentum buffer + d,   p = p - lr buffer
//
// p, buffer, g flat f32; working flat bf16 or null; trust [slots] or null for 1; pieces [pieces, 2] of uint4; scalars [slots] of (decay, lr, not read, 1 or 0
// where there is no gradient). Limit: bandwidth. 12 bytes read and 8 written a parameter, 2 more for the working copy.
#include "flat.cuh"

// Block: one piece, 256 threads, eight numbers a thread at a time. Each number has one owner; nothing is shared.
extern "C" __global__ void __launch_bounds__(256, 4)
    sgd_f32(float* __restrict__ p, bf16* __restrict__ working, float* __restrict__ buffer, const float* __restrict__ g, const float* __restrict__ trust,
            const uint4* __restrict__ pieces, const float4* __restrict__ scalars, float momentum) {
  const Piece piece = piece_of(pieces, blockIdx.x);
  const float4 s = scalars[piece.slot];
  if (s.w == 0.f) return;
  const float q = trust ? trust[piece.slot] : 1.f;
  for (int i = threadIdx.x * 8; i < piece.count; i += 256 * 8) {
    float P[8], G[8], B[8];
    load8(G, g + piece.gradient + i);
    load8(B, buffer + piece.state + i);
    load8(P, p + piece.value + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      B[j] = fmaf(momentum, B[j], q * fmaf(s.x, P[j], G[j]));
      P[j] -= s.y * B[j];  // nvcc makes one fma of it: on a GPU this is rounded once, on the CPU twice
    }
    store8(buffer + piece.state + i, B);
    store8(p + piece.value + i, P);
    if (working) store8(working + piece.working + i, P);
  }
}
KERNEL(sgd_f32)
