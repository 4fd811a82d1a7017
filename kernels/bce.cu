// bce.cu - binary cross-entropy of logits, and its gradient.   Definition: src/ops/bce.rs
//
//   loss = mean(max(z, 0) - z t + ln(1 + e^-|z|)),   dz = (sigmoid(z) - t) / n        z, dz [n] f32 or bf16; t [n] f32, or [t > 0] on request
//
// One pass. Limit: bandwidth; z and t are read, dz is written.
#include "rows.cuh"

namespace {

// Block: 256 threads, every gridDim.x-th group of 2048 numbers, eight a thread. partial [gridDim.x]; share = 1 / n; dz may be null.
template <class T>
__device__ __forceinline__ void bce(T* __restrict__ dz, float* __restrict__ partial, const T* __restrict__ z, const float* __restrict__ targets,
                                    int n, int binarise, float share) {
  __shared__ float scratch[32];
  float sum = 0.f;
  for (long long first = (blockIdx.x * 256LL + threadIdx.x) * 8; first < n; first += gridDim.x * 2048LL) {
    float v[8], t[8];
    const int count = (int)min(8LL, n - first);
    // The last piece may be shorter, whatever n is.
    load_row(v, z + first, 0, count);
    load_row(t, targets + first, 0, count);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (j >= count) continue;
      const float x = v[j], e = expf(-fabsf(x));
      const float hit = binarise ? (t[j] > 0.f ? 1.f : 0.f) : t[j];
      sum += (x < 0.f ? 0.f : x) - x * hit + log1pf(e);  // not fmaxf, which would drop a NaN
      v[j] = share * ((x < 0.f ? e : 1.f) / (1.f + e) - hit);
    }
    if (dz) store_row(dz + first, v, 0, count);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = share * sum;
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 4) bce_##NAME(T* dz, float* partial, const T* z, const float* targets, int n,      \
                                                                  int binarise, float share) {                                         \
    bce(dz, partial, z, targets, n, binarise, share);                                                                                   \
  }                                                                                                                                     \
  KERNEL(bce_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
