// cross_entropy.cu - cross-entropy of logits against labels or soft targets, and its gradient.   Definition: src/ops/cross_entropy.rs
//
//   labels        loss[b] = (1 - s) (-ln p[y]) + s mean_k(-ln p[k]),   dz = (p - (1 - s) [k = y] - s / C) / B
//   soft targets  loss[b] = -sum_k t[k] ln p[k],                       dz = (p sum(t) - t) / B
//
//   z, dz [B, C] f32 or bf16, p = softmax(z); y [B] u32; t [B, C] f32; partial [B]: each row's share of the loss
//
// One block a row; it is read three times, for the maximum, the sums and the gradient, the last two times from the cache. Limit: latency at B = 256.
#include "rows.cuh"

namespace {

// A row's maximum m, and sums over the row: e^(z - m), and with a = z - m whatever `term(a, column)` says.
struct Sums { float most, sum, other; };
template <class T, class F> __device__ __forceinline__ Sums sums_of(const T* __restrict__ z, int classes, float* scratch, F term) {
  float most = -INFINITY, sum = 0.f, other = 0.f;
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float v[8];
    load_row(v, z, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (c + j < classes) most = fmaxf(most, v[j]);
  });
  most = block_max(most, scratch);
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float v[8];
    load_row(v, z, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (c + j < classes) {
        sum += expf(v[j] - most);
        other += term(v[j] - most, c + j);
      }
  });
  sum = block_sum(sum, scratch);
  return {most, sum, block_sum(other, scratch)};
}

// Block: 4 warps, one row. share = 1 / B. dz may be null.
template <class T>
__device__ __forceinline__ void with_labels(T* __restrict__ dz, float* __restrict__ partial, const T* __restrict__ z, const uint32_t* __restrict__ labels,
                                            int classes, float smoothing, float share, unsigned* fault) {
  __shared__ float scratch[32];
  const size_t at = (size_t)blockIdx.x * classes;
  int label = (int)labels[blockIdx.x];
  if (!in_range(label, classes, fault)) label = 0;
  const Sums s = sums_of(z + at, classes, scratch, [](float a, int) { return a; });
  if (threadIdx.x == 0) {
    const float ln = logf(s.sum);
    float loss = (1.f - smoothing) * (ln - (to_f32(z[at + label]) - s.most));
    if (smoothing > 0.f) loss += smoothing * (ln - s.other / classes);
    partial[blockIdx.x] = share * loss;
  }
  if (!dz) return;
  const float inverse = 1.f / s.sum, all = smoothing / classes, hit = 1.f - smoothing;
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float v[8];
    load_row(v, z + at, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = share * (expf(v[j] - s.most) * inverse - (c + j == label ? hit + all : all));
    store_row(dz + at, v, c, classes);
  });
}

// The same owners. The targets' sum need not be 1.
template <class T>
__device__ __forceinline__ void with_targets(T* __restrict__ dz, float* __restrict__ partial, const T* __restrict__ z, const float* __restrict__ targets,
                                             int classes, float share) {
  __shared__ float scratch[32];
  const size_t at = (size_t)blockIdx.x * classes;
  float mass = 0.f;
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float t[8];
    load_row(t, targets + at, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++) mass += t[j];
  });
  mass = block_sum(mass, scratch);
  const Sums s = sums_of(z + at, classes, scratch, [&](float a, int c) { return targets[at + c] * a; });
  if (threadIdx.x == 0) partial[blockIdx.x] = share * (mass * logf(s.sum) - s.other);
  if (!dz) return;
  const float inverse = mass / s.sum;
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float v[8], t[8];
    load_row(v, z + at, c, classes);
    load_row(t, targets + at, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = share * (expf(v[j] - s.most) * inverse - t[j]);
    store_row(dz + at, v, c, classes);
  });
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(128, 8) cross_entropy_##NAME(T* dz, float* partial, const T* z, const uint32_t* labels,     \
                                                                            int classes, float smoothing, float share, unsigned* fault) {  \
    with_labels(dz, partial, z, labels, classes, smoothing, share, fault);                                                                  \
  }                                                                                                                                         \
  KERNEL(cross_entropy_##NAME)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(128, 8) cross_entropy_soft_##NAME(T* dz, float* partial, const T* z, const float* targets,  \
                                                                                 int classes, float share) {                               \
    with_targets(dz, partial, z, targets, classes, share);                                                                                  \
  }                                                                                                                                         \
  KERNEL(cross_entropy_soft_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
