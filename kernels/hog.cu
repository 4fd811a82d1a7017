// hog.cu - histograms of oriented gradients as regression targets.   Definition: src/targets/hog.rs
//
//   image f32 [B, C, H, W] or u8 [B, H, W, C]; cells of 8 x 8 or 4 x 4 pixels, 9 bins of 20 degrees; patches of 2 x 2 cells
//   cells of side S: histograms, normalised [B, C, H/S, W/S, 9] f32 or null; target [B, H/2S W/2S, 4 9 C] f32
//
// Every step is the CPU's, operation by operation, so the results are the CPU's bit for bit: the bin is a count of half-planes and no arctangent, products
// that are added are written as fmaf, and a bin's pixels are added in their order.
//
// Limit: instructions, about 300 a warp for the 64 pixels of a cell and channel, two thirds of them the sums; 150528 numbers are read and 21168 written
// an image of 224 x 224 x 3.
#include "common.cuh"

namespace {

constexpr int BINS = 9, WARPS = 4;

// (cos, sin) of 20 k degrees, k = 1..8.
__constant__ float COS[BINS - 1] = {0.93969262078590838f, 0.76604444311897804f, 0.5f, 0.17364817766693035f,
                                    -0.17364817766693035f, -0.5f, -0.76604444311897804f, -0.93969262078590838f};
__constant__ float SIN[BINS - 1] = {0.34202014332566873f, 0.64278760968653933f, 0.86602540378443865f, 0.98480775301220806f,
                                    0.98480775301220806f, 0.86602540378443865f, 0.64278760968653933f, 0.34202014332566873f};
// exp(-(i - 7.5)^2 / 128) over the sum of all 16, i = 0..7; the other half mirrors it. The same for cells of 4 pixels.
__constant__ float WINDOW8[8] = {0.047048331531176497f, 0.052486206607453088f, 0.057644820788092153f, 0.062328912536125339f,
                                   0.066348782025081335f, 0.069532926557048125f, 0.071740138579353685f, 0.072869881375669798f};
__constant__ float WINDOW4[4] = {0.09944193968615872f, 0.11994987571054136f, 0.135921016106958f, 0.14468716849634192f};

// The image as the gradients read it.
template <class T> struct Plane {
  const T* pixels;
  int height, width, row, step;
  __device__ float at(int y, int x) const { return to_f32(pixels[(size_t)y * row + (size_t)x * step]); }
  // Beyond the border the image is mirrored, the border itself not repeated.
  __device__ float mirrored(int y, int x) const {
    y = y < 0 ? -y : y >= height ? 2 * height - 2 - y : y;
    x = x < 0 ? -x : x >= width ? 2 * width - 2 - x : x;
    return at(y, x);
  }
};

// The two numbers whose arctangent is the orientation: (vertical, horizontal) for DMJD, (horizontal, vertical) for MaskFeat.
template <class T> __device__ __forceinline__ float2 gradient(const Plane<T>& p, int y, int x, bool maskfeat) {
  if (!maskfeat) {
    const float down = y > 0 && y < p.height - 1 ? p.at(y + 1, x) - p.at(y - 1, x) : 0.f;
    const float right = x > 0 && x < p.width - 1 ? p.at(y, x + 1) - p.at(y, x - 1) : 0.f;
    return make_float2(down, right);
  }
  const float a = p.mirrored(y - 1, x - 1), b = p.mirrored(y - 1, x), c = p.mirrored(y - 1, x + 1);
  const float d = p.mirrored(y, x - 1), f = p.mirrored(y, x + 1);
  const float g = p.mirrored(y + 1, x - 1), h = p.mirrored(y + 1, x), i = p.mirrored(y + 1, x + 1);
  return make_float2(((a - c) + (g - i)) + 2.f * (d - f), ((a - g) + (c - i)) + 2.f * (b - h));
}

// Warp: one cell, channel after channel. A lane takes pixels l and l + 32 into shared memory, then lane k adds those of bin k in their order. The
// statistics over the bins pass through all lanes in the order of the bins.
template <int CELL, class T>
__device__ __forceinline__ void hog(float* __restrict__ target, float* __restrict__ histograms, float* __restrict__ normalised,
                                    const T* __restrict__ images, int batch, int channels, int height, int width, bool planar, bool maskfeat,
                                    float eps) {
  constexpr int PIXELS = CELL * CELL;
  const float* window = CELL == 8 ? WINDOW8 : WINDOW4;
  __align__(16) __shared__ float weights[WARPS][PIXELS];
  __align__(16) __shared__ int bins[WARPS][PIXELS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, down = height / CELL, across = width / CELL;
  const int cell = blockIdx.x * WARPS + warp;
  if (cell >= batch * down * across) return;  // the same for all lanes
  const int image = cell / (down * across), i = cell / across % down, j = cell % across;
  const int token = i / 2 * (across / 2) + j / 2, dh = i % 2, dw = j % 2;
  float* mine = target + ((size_t)image * (down / 2) * (across / 2) + token) * (4 * BINS) * channels;
  for (int c = 0; c < channels; c++) {
    Plane<T> p;
    p.height = height;
    p.width = width;
    p.row = planar ? width : width * channels;
    p.step = planar ? 1 : channels;
    p.pixels = images + (size_t)image * channels * height * width + (planar ? (size_t)c * height * width : c);
    __syncwarp();  // the channel before has been read
#pragma unroll
    for (int pixel = lane; pixel < PIXELS; pixel += 32) {
      const int y = i * CELL + pixel / CELL, x = j * CELL + pixel % CELL;
      float2 g = gradient(p, y, x, maskfeat);
      float weight = sqrtf(fmaf(g.y, g.y, g.x * g.x));
      if (maskfeat) {
        const int wy = y % (2 * CELL), wx = x % (2 * CELL);
        weight *= window[wy < CELL ? wy : 2 * CELL - 1 - wy] * window[wx < CELL ? wx : 2 * CELL - 1 - wx];
      }
      if (g.x < 0.f || (g.x == 0.f && g.y < 0.f)) {
        g.x = -g.x;
        g.y = -g.y;
      }
      int bin = 0;
#pragma unroll
      for (int k = 0; k < BINS - 1; k++) bin += fmaf(COS[k], g.x, -(SIN[k] * g.y)) >= 0.f;
      weights[warp][pixel] = weight;
      bins[warp][pixel] = bin;
    }
    __syncwarp();
    float h = 0.f;
#pragma unroll 16
    for (int pixel = 0; pixel < PIXELS; pixel++)
      if (bins[warp][pixel] == lane) h += weights[warp][pixel];
    if (!maskfeat) h *= 1.f / PIXELS;
    float value;
    if (maskfeat) {
      float squares = 0.f;
#pragma unroll
      for (int k = 0; k < BINS; k++) {
        const float other = __shfl_sync(0xffffffffu, h, k);
        squares = fmaf(other, other, squares);
      }
      value = h / fmaxf(sqrtf(squares), eps);
    } else {
      float sum = 0.f, squares = 0.f;
#pragma unroll
      for (int k = 0; k < BINS; k++) sum += __shfl_sync(0xffffffffu, h, k);
      const float apart = h - sum / BINS;
#pragma unroll
      for (int k = 0; k < BINS; k++) {
        const float other = __shfl_sync(0xffffffffu, apart, k);
        squares = fmaf(other, other, squares);
      }
      value = apart / sqrtf(squares / BINS + eps);
    }
    if (lane >= BINS) continue;
    const size_t at = ((((size_t)image * channels + c) * down + i) * across + j) * BINS + lane;
    if (histograms) histograms[at] = h;
    if (normalised) normalised[at] = value;
    mine[maskfeat ? ((c * BINS + lane) * 2 + dh) * 2 + dw : ((dh * 2 + dw) * BINS + lane) * channels + c] = value;
  }
}

}  // namespace

#define EXPORT(T, NAME, CELL, PLANAR)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(128, 8) NAME(float* target, float* histograms, float* normalised, const T* images, int batch,    \
                                                         int channels, int height, int width, int maskfeat, float eps) {                     \
    hog<CELL>(target, histograms, normalised, images, batch, channels, height, width, PLANAR, maskfeat != 0, eps);                           \
  }                                                                                                                                          \
  KERNEL(NAME)
EXPORT(float, hog_f32, 8, true)
EXPORT(unsigned char, hog_u8, 8, false)
EXPORT(float, hog_cell4_f32, 4, true)
EXPORT(unsigned char, hog_cell4_u8, 4, false)
