// distill_kl.cu - distillation from a teacher's logits, and its gradient.   Definition: src/ops/distill_kl.rs
//
//   loss = T^2 sum_b,c p_t (ln p_t - ln p_s) / D,   dz = T (p_s - p_t) / D         p = softmax(z / T);  D is B or B C
//
//   student z, dz [B, C] f32 or bf16; teacher [B, C] f32 or bf16; partial [B]: each row's share of the loss
//
// With a = (z - max) / T a row's divergence is sum e^a_t (a_t - a_s) / L_t - ln L_t + ln L_s. Each L is kept as what it has above 1, so that a nearly
// one-hot row keeps what is left of its divergence. One block a row, read three times, twice from the cache. Limit: latency at B = 256.
#include "rows.cuh"

namespace {

// Block: 4 warps, one row. loss_share = T^2 / D, share = T / D. dz may be null.
template <class T, class U>
__device__ __forceinline__ void distill_kl(T* __restrict__ dz, float* __restrict__ partial, const T* __restrict__ student, const U* __restrict__ teacher,
                                           int classes, float sharpness, float loss_share, float share) {
  __shared__ float scratch[32];
  const size_t at = (size_t)blockIdx.x * classes;
  float ms = -INFINITY, mt = -INFINITY;
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float s[8], t[8];
    load_row(s, student + at, c, classes);
    load_row(t, teacher + at, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (c + j < classes) ms = fmaxf(ms, s[j]), mt = fmaxf(mt, t[j]);
  });
  ms = block_max(ms, scratch);
  mt = block_max(mt, scratch);

  // How often the maximum is met, counted exactly, and the sum of what is below it.
  float most_s = 0.f, most_t = 0.f, below_s = 0.f, below_t = 0.f, cross = 0.f;
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float s[8], t[8];
    load_row(s, student + at, c, classes);
    load_row(t, teacher + at, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (c + j < classes) {
        const float a_s = (s[j] - ms) * sharpness, a_t = (t[j] - mt) * sharpness, es = expf(a_s), et = expf(a_t);
        if (a_s == 0.f) most_s += 1.f; else below_s += es;
        if (a_t == 0.f) most_t += 1.f; else below_t += et;
        if (et != 0.f) cross += et * (a_t - a_s);  // where e^a_t is 0 the term is 0, also where a_s is minus infinity
      }
  });
  const float over_s = block_sum(most_s, scratch) - 1.f + block_sum(below_s, scratch);
  const float over_t = block_sum(most_t, scratch) - 1.f + block_sum(below_t, scratch);
  cross = block_sum(cross, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = loss_share * (cross / (1.f + over_t) - log1pf(over_t) + log1pf(over_s));
  if (!dz) return;
  const float inverse_s = 1.f / (1.f + over_s), inverse_t = 1.f / (1.f + over_t);
  own_pieces(threadIdx.x, blockDim.x, classes, [&](int c) {
    float s[8], t[8];
    load_row(s, student + at, c, classes);
    load_row(t, teacher + at, c, classes);
#pragma unroll
    for (int j = 0; j < 8; j++)
      s[j] = share * (expf((s[j] - ms) * sharpness) * inverse_s - expf((t[j] - mt) * sharpness) * inverse_t);
    store_row(dz + at, s, c, classes);
  });
}

// labels[b] = the column of the largest number of row b, the first of equal ones. One warp a row.
template <class T> __device__ __forceinline__ void first_largest(uint32_t* __restrict__ labels, const T* __restrict__ z, int rows, int classes) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (r >= rows) return;
  float most = -INFINITY;
  int best = classes;
  auto take = [&](float value, int column) {
    if (value > most || (value == most && column < best)) most = value, best = column;
  };
  for (int c = lane; c < classes; c += 32) take(to_f32(z[(size_t)r * classes + c]), c);
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const float value = __shfl_xor_sync(0xffffffffu, most, o);
    take(value, __shfl_xor_sync(0xffffffffu, best, o));
  }
  if (lane == 0) labels[r] = best < classes ? best : 0;  // a row without numbers
}

}  // namespace

#define EXPORT(T, U, NAME)                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(128, 8) distill_kl_##NAME(T* dz, float* partial, const T* student, const U* teacher,        \
                                                                         int classes, float sharpness, float loss_share, float share) {    \
    distill_kl(dz, partial, student, teacher, classes, sharpness, loss_share, share);                                                       \
  }                                                                                                                                         \
  KERNEL(distill_kl_##NAME)
EXPORT(float, float, f32_f32)
EXPORT(bf16, float, bf16_f32)
EXPORT(bf16, bf16, bf16_bf16)

#define LARGEST(T, NAME)                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256) first_largest_##NAME(uint32_t* labels, const T* z, int rows, int classes) {             \
    first_largest(labels, z, rows, classes);                                                                                                \
  }                                                                                                                                         \
  KERNEL(first_largest_##NAME)
LARGEST(float, f32)
LARGEST(bf16, bf16)
