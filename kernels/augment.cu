// augment.cu - a batch of bytes becomes normalised, erased and mixed images in one pass.   Definition: src/data/augment.rs
//
//   x[b, c] = (bytes[b, .., c] / 255 - mean[c]) / std[c]          bytes u8 [B, H, W, 3], out [B, 3, H, W] f32 or bf16
//   erasing   the box (top, left, height, width) of image b is filled with 0, with fill[b, c], or with fill[b, c, y, x]
//   mixing    with partner B-1-b: own x + other x', or the partner's numbers inside one box
//
// f32 results are the CPU's bit for bit: products that are added are rounded first, as there.
//
// Limit: bandwidth; one byte read and one number written. A thread makes both images of a pair, so that each byte is read and normalised once.
#include "common.cuh"

namespace {

struct Levels { float mean[3], std[3]; };

// Normalised pixels p..p+count of image b, its box filled.
__device__ __forceinline__ void load_pixels(float (&v)[4][3], const unsigned char* bytes, const int* boxes, const float* fill, int b, int p,
                                            int count, int size, int width, bool by_pixel, const Levels& levels) {
  const unsigned char* from = bytes + ((size_t)b * size + p) * 3;
  unsigned char raw[12];
  if (size % 4 == 0) {
    uint32_t words[3];
#pragma unroll
    for (int i = 0; i < 3; i++) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
#pragma unroll
    for (int i = 0; i < 12; i++) raw[i] = (unsigned char)(words[i / 4] >> (8 * (i % 4)));
  } else {
#pragma unroll
    for (int i = 0; i < 12; i++) raw[i] = i < 3 * count ? from[i] : 0;
  }
#pragma unroll
  for (int e = 0; e < 4; e++)
#pragma unroll
    for (int c = 0; c < 3; c++) v[e][c] = ((float)raw[3 * e + c] / 255.f - levels.mean[c]) / levels.std[c];
  if (!boxes) return;
  const int top = boxes[4 * b], left = boxes[4 * b + 1], tall = boxes[4 * b + 2], wide = boxes[4 * b + 3];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int y = (p + e) / width, x = (p + e) - y * width;
    if (e >= count || y < top || y - top >= tall || x < left || x - left >= wide) continue;
#pragma unroll
    for (int c = 0; c < 3; c++)
      v[e][c] = !fill ? 0.f : by_pixel ? fill[((size_t)b * 3 + c) * size + p + e] : fill[b * 3 + c];
  }
}

__device__ __forceinline__ void store4(float* p, const float (&v)[4]) { *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]); }
__device__ __forceinline__ void store4(bf16* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

template <class T>
__device__ __forceinline__ void store_pixels(T* out, const float (&v)[4][3], int b, int p, int count, int size) {
#pragma unroll
  for (int c = 0; c < 3; c++) {
    T* to = out + ((size_t)b * 3 + c) * size + p;
    const float plane[4] = {v[0][c], v[1][c], v[2][c], v[3][c]};
    if (size % 4 == 0) store4(to, plane);
    else
      for (int e = 0; e < count; e++) to[e] = from_f32<T>(plane[e]);
  }
}

// A thread owns four pixels, all channels, of images blockIdx.y and B - 1 - blockIdx.y.
template <class T>
__device__ __forceinline__ void augment(T* __restrict__ out, const unsigned char* __restrict__ bytes, const int* __restrict__ boxes,
                                        const float* __restrict__ fill, int batch, int height, int width, bool by_pixel, bool mixup, int y0,
                                        int y1, int x0, int x1, const Levels& levels, float own, float other) {
  const int size = height * width, p = (blockIdx.x * 256 + threadIdx.x) * 4, count = min(4, size - p);
  if (count <= 0) return;
  const int i = blockIdx.y, j = batch - 1 - i;
  float a[4][3], b[4][3];
  load_pixels(a, bytes, boxes, fill, i, p, count, size, width, by_pixel, levels);
  load_pixels(b, bytes, boxes, fill, j, p, count, size, width, by_pixel, levels);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int y = (p + e) / width, x = (p + e) - y * width;
    const bool swap = y >= y0 && y < y1 && x >= x0 && x < x1;
#pragma unroll
    for (int c = 0; c < 3; c++) {
      const float mine = a[e][c], partner = b[e][c];
      if (mixup) {
        a[e][c] = __fadd_rn(__fmul_rn(own, mine), __fmul_rn(other, partner));
        b[e][c] = __fadd_rn(__fmul_rn(own, partner), __fmul_rn(other, mine));
      } else if (swap) {
        a[e][c] = partner;
        b[e][c] = mine;
      }
    }
  }
  store_pixels(out, a, i, p, count, size);
  if (i != j) store_pixels(out, b, j, p, count, size);
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256, 2) augment_##NAME(                                                                       \
      T* out, const unsigned char* bytes, const int* boxes, const float* fill, int batch, int height, int width, int by_pixel, int mixup,    \
      int y0, int y1, int x0, int x1, float mean0, float mean1, float mean2, float std0, float std1, float std2, float own, float other) {   \
    const Levels levels{{mean0, mean1, mean2}, {std0, std1, std2}};                                                                          \
    augment(out, bytes, boxes, fill, batch, height, width, by_pixel != 0, mixup != 0, y0, y1, x0, x1, levels, own, other);                   \
  }                                                                                                                                          \
  KERNEL(augment_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
