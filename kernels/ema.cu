// ema.cu - the running average of all values.   Definition: src/optim/ema.rs
//
//   ema = ema + rest (w - ema)          ema, w flat f32, n a multiple of 8
//
// A thread takes eight consecutive numbers. Limit: bandwidth. 8 bytes read and 4 written a number; 8 and 8 for the exchange.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256, 2) ema_f32(float* __restrict__ ema, const float* __restrict__ w, long long n, float rest) {
  const long long i = ((long long)blockIdx.x * 256 + threadIdx.x) * 8;
  if (i >= n) return;
  float a[8], b[8];
  load8(a, ema + i);
  load8(b, w + i);
#pragma unroll
  for (int j = 0; j < 8; j++) a[j] = fmaf(rest, b[j] - a[j], a[j]);
  store8(ema + i, a);
}
KERNEL(ema_f32)

// Each takes the other's numbers.
extern "C" __global__ void __launch_bounds__(256, 2) ema_swap_f32(float* __restrict__ ema, float* __restrict__ w, long long n) {
  const long long i = ((long long)blockIdx.x * 256 + threadIdx.x) * 8;
  if (i >= n) return;
  float a[8], b[8];
  load8(a, ema + i);
  load8(b, w + i);
  store8(ema + i, b);
  store8(w + i, a);
}
KERNEL(ema_swap_f32)
