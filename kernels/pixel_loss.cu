// pixel_loss.cu - squared error of predicted hidden patches, straight from the images.   Definition: src/ops/pixel_loss.rs
//
//   loss = sum_r m[r] mean_P (x[r] - t[r])^2 / sum(m),   dx[r] = 2 m[r] (x[r] - t[r]) / (P sum(m))
//   t = a patch of the image, or on request (patch - mean) / sqrt(var + eps), var with P - 1; eps < 0: as it is
//
//   x, dx [B, L, P] f32 or bf16, values in the order y, x, channel; images [B, C, H, W] f32; m [B, L] f32; L = (H/p)(W/p), P = p p C
//
//   version  idea                                                                       B=256, 224 x 224, p=16, bf16, 3 of 4 patches hidden
//   v1       any patch; single values, the patch is read four times                     not run on a GPU
//   v2       p = 16, C = 3: 24 values a lane in registers, image and prediction         not run on a GPU   <- chosen
//            read once in accesses of 16 bytes
//
// Limit: bandwidth. Of a hidden patch 4 P bytes of image and the prediction are read; dx is written for all.
// The mean is corrected once by the mean of what is left, so that a nearly constant bright patch keeps its digits.
#include "rows.cuh"

namespace {

// Factor of a patch's squared errors. Masks that hide nothing make loss and gradient 0.
__device__ __forceinline__ float share_of(const float* count, int values) { return count[0] == 0.f ? 0.f : 1.f / (count[0] * values); }

// One warp a patch; a lane takes every 32nd value.
template <class T>
__device__ __forceinline__ void pixel_loss_v1(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ x, const float* __restrict__ images,
                                              const float* __restrict__ mask, const float* __restrict__ count, int patches, int channels,
                                              int height, int width, int p, float eps) {
  __shared__ float scratch[32];
  const int lane = threadIdx.x & 31, r = blockIdx.x * 8 + (threadIdx.x >> 5), across = width / p, grid = (height / p) * across;
  const int P = p * p * channels;
  float loss = 0.f;
  if (r < patches) {
    const size_t at = (size_t)r * P;
    const float weight = mask[r], share = weight == 0.f ? 0.f : weight * share_of(count, P);
    if (weight == 0.f) {
      if (dx)
        for (int i = lane; i < P; i += 32) dx[at + i] = from_f32<T>(0.f);
    } else {
      const int n = r % grid;
      const float* corner = images + ((size_t)(r / grid) * channels * height + n / across * p) * width + n % across * p;
      auto pixel = [&](int i) { return corner[((size_t)(i % channels) * height + i / channels / p) * width + i / channels % p]; };
      float mean = 0.f, left = 0.f, rstd = 1.f;
      if (eps >= 0.f) {
        for (int i = lane; i < P; i += 32) mean += pixel(i);
        mean = warp_sum(mean) / P;
        for (int i = lane; i < P; i += 32) left += pixel(i) - mean;
        left = warp_sum(left) / P;
        float squares = 0.f;
        for (int i = lane; i < P; i += 32) {
          const float d = (pixel(i) - mean) - left;
          squares += d * d;
        }
        rstd = 1.f / sqrtf(warp_sum(squares) / (P - 1) + eps);
      }
      for (int i = lane; i < P; i += 32) {
        const float e = to_f32(x[at + i]) - ((pixel(i) - mean) - left) * rstd;
        loss += e * e;
        if (dx) dx[at + i] = from_f32<T>(2.f * share * e);
      }
      loss *= share;
    }
  }
  loss = block_sum(loss, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = loss;
}

// p = 16, C = 3, one warp a patch: lane l has line l / 2, pixels 8 (l % 2) .. + 7 in all channels: values 24 l .. 24 l + 23 of the prediction.
template <class T>
__device__ __forceinline__ void pixel_loss_v2(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ x, const float* __restrict__ images,
                                              const float* __restrict__ mask, const float* __restrict__ count, int patches, int height, int width,
                                              float eps) {
  constexpr int P = 768;
  __shared__ float scratch[32];
  const int lane = threadIdx.x & 31, r = blockIdx.x * 8 + (threadIdx.x >> 5), across = width / 16, grid = (height / 16) * across;
  float loss = 0.f;
  if (r < patches) {
    const size_t at = (size_t)r * P + 24 * lane;
    const float weight = mask[r];
    float e[3][8] = {};
    if (weight != 0.f) {
      const float share = weight * share_of(count, P);
      const int n = r % grid;
      const size_t line = (size_t)(r / grid) * 3 * height + n / across * 16 + lane / 2;
      const float* pixels = images + line * width + n % across * 16 + lane % 2 * 8;
      float t[3][8], mean = 0.f, rstd = 1.f;
#pragma unroll
      for (int c = 0; c < 3; c++) load8(t[c], pixels + (size_t)c * height * width);
#pragma unroll
      for (int c = 0; c < 3; c++) load8(e[c], x + at + 8 * c);
      if (eps >= 0.f) {
#pragma unroll
        for (int pass = 0; pass < 2; pass++) {
          mean = 0.f;
#pragma unroll
          for (int i = 0; i < 24; i++) mean += t[i / 8][i % 8];
          mean = warp_sum(mean) / P;
#pragma unroll
          for (int i = 0; i < 24; i++) t[i / 8][i % 8] -= mean;
        }
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < 24; i++) squares += t[i / 8][i % 8] * t[i / 8][i % 8];
        rstd = 1.f / sqrtf(warp_sum(squares) / (P - 1) + eps);
      }
#pragma unroll
      for (int i = 0; i < 24; i++) {  // value i of the lane: pixel i / 3, channel i % 3
        const float d = e[i / 8][i % 8] - t[i % 3][i / 3] * rstd;
        loss += d * d;
        e[i / 8][i % 8] = 2.f * share * d;
      }
      loss *= share;
    }
    if (dx) {
#pragma unroll
      for (int c = 0; c < 3; c++) store8(dx + at + 8 * c, e[c]);
    }
  }
  loss = block_sum(loss, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = loss;
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 4) pixel_loss_v1_##NAME(                                                              \
      T* dx, float* partial, const T* x, const float* images, const float* mask, const float* count, int patches, int channels,           \
      int height, int width, int p, float eps) {                                                                                      \
    pixel_loss_v1(dx, partial, x, images, mask, count, patches, channels, height, width, p, eps);                                    \
  }                                                                                                                                        \
  KERNEL(pixel_loss_v1_##NAME)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 3) pixel_loss_v2_##NAME(                                                              \
      T* dx, float* partial, const T* x, const float* images, const float* mask, const float* count, int patches, int height, int width,  \
      float eps) {                                                                                                                    \
    pixel_loss_v2(dx, partial, x, images, mask, count, patches, height, width, eps);                                                 \
  }                                                                                                                                        \
  KERNEL(pixel_loss_v2_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
