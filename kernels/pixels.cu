// pixels.cu - patches of images as regression targets.   Definition: src/targets/pixels.rs
//
//   targets[b, l, (py, px, channel)] = image[b, channel, y, x], or (it - mean) / sqrt(var + eps) with the mean and the sample variance of the patch
//
//   images [B, channels, H, W] f32 or bf16; targets [B, L, p p channels] f32, the channel fastest
//
// Limit: bandwidth, the images once and the targets once: 310 MB or 65 us for 256 images of 3 x 224 x 224 in f32. The pixels of a patch are read up to three
// times, out of L1 after the first.
//
// Statistics are two passes over the distances from the patch's first pixel, which are exact where the patch is nearly constant: a constant patch gives 0.
#include "common.cuh"

// A warp a patch, a lane every 32nd value.
#define EXPORT(T, NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) pixel_targets_##NAME(float* __restrict__ targets, const T* __restrict__ images,      \
                                                                         int patches, int channels, int height, int width, int patch,    \
                                                                         float eps)    {                                                \
    const int r = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31, values = patch * patch * channels;                        \
    if (r >= patches) return;                                                                                                             \
    const int across = width / patch, count = height / patch * across, n = r % count;                                                     \
    const T* corner = images + ((size_t)(r / count) * channels * height + n / across * patch) * width + n % across * patch;               \
    float* row = targets + (size_t)r * values;                                                                                            \
    auto pixel = [&](int i) {                                                                                                             \
      const int at = i / channels;                                                                                                        \
      return to_f32(corner[((size_t)(i % channels) * height + at / patch) * width + at % patch]);                                         \
    };                                                                                                                                    \
    if (eps < 0.f) {                                                                                                                      \
      for (int i = lane; i < values; i += 32) row[i] = pixel(i);                                                                          \
      return;                                                                                                                             \
    }                                                                                                                                     \
    const float first = pixel(0);                                                                                                         \
    float sum = 0.f, squares = 0.f;                                                                                                       \
    for (int i = lane; i < values; i += 32) sum += pixel(i) - first;                                                                      \
    const float mean = warp_sum(sum) / (float)values;                                                                                     \
    for (int i = lane; i < values; i += 32) {                                                                                             \
      const float d = pixel(i) - first - mean;                                                                                            \
      squares += d * d;                                                                                                                   \
    }                                                                                                                                     \
    const float deviation = sqrtf(warp_sum(squares) / (float)(values - 1) + eps)  ;                                                       \
    for (int i = lane; i < values; i += 32) row[i] = (pixel(i) - first - mean) / deviation;                                               \
  }                                                                                                                                       \
  KERNEL(pixel_targets_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
