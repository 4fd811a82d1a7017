// augment.cu - a batch of bytes becomes normalised, erased and mixed images in one pass.   Definition: src/data/augment.rs
//
//   x[b, c] = (bytes[b, .., c] / 255 - mean[c]) / std[c]          bytes u8 [B, H, W, C], levels [2, C] mean and std, out [B, C, H, W] f32 or bf16
//   erasing   box r (top, left, height, width) of image b is filled with 0, with fill[b, r, c], or with fill[b, c, y, x]; the last box wins
//   mixing    with partner B-1-b: own x + other x', or the partner's numbers inside one box
//
// f32 results are the CPU's bit for bit: products that are added are rounded first, as there.
//
// Limit: bandwidth; one byte read and one number written. A thread makes both images of a pair, so that each byte is read and normalised once.
#include "common.cuh"

namespace {

// Channels first..first+count of `all` that a block works on, at most G of them; G of G where `PACKED`.
template <int G, bool PACKED> struct Channels {
  int all_, first_, count_;
  __device__ __forceinline__ int all() const { return PACKED ? G : all_; }
  __device__ __forceinline__ int first() const { return PACKED ? 0 : first_; }
  __device__ __forceinline__ int count() const { return PACKED ? G : count_; }
};

struct Erase {
  const int* boxes;  // null if nothing is erased
  const float* fill;  // null for 0
  int each;  // boxes of an image
  bool by_pixel;
};

// Normalised pixels p..p+count of image b, its boxes filled.
template <int G, bool PACKED>
__device__ __forceinline__ void load_pixels(float (&v)[4][G], const unsigned char* bytes, const Erase& erase, int b, int p, int count, int size,
                                            int width, const Channels<G, PACKED>& channels, const float (&mean)[G], const float (&std)[G]) {
  const int all = channels.all(), first = channels.first();
  const unsigned char* from = bytes + ((size_t)b * size + p) * all + first;
  unsigned char raw[4 * G];
  if (PACKED && size % 4 == 0) {
    uint32_t words[G];
#pragma unroll
    for (int i = 0; i < G; i++) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
#pragma unroll
    for (int i = 0; i < 4 * G; i++) raw[i] = (unsigned char)(words[i / 4] >> (8 * (i % 4)));
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
      for (int c = 0; c < G; c++) raw[e * G + c] = e < count && c < channels.count() ? from[e * all + c] : 0;
  }
#pragma unroll
  for (int e = 0; e < 4; e++)
#pragma unroll
    for (int c = 0; c < G; c++) v[e][c] = ((float)raw[G * e + c] / 255.f - mean[c]) / std[c];
  if (!erase.boxes) return;
  for (int r = 0; r < erase.each; r++) {
    const int* box = erase.boxes + 4 * ((size_t)b * erase.each + r);
    const int top = box[0], left = box[1], tall = box[2], wide = box[3];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int y = (p + e) / width, x = (p + e) - y * width;
      if (e >= count || y < top || y - top >= tall || x < left || x - left >= wide) continue;
#pragma unroll
      for (int c = 0; c < G; c++) {
        if (c >= channels.count()) continue;
        v[e][c] = !erase.fill      ? 0.f
                  : erase.by_pixel ? erase.fill[((size_t)b * all + first + c) * size + p + e]
                                   : erase.fill[((size_t)b * erase.each + r) * all + first + c];
      }
    }
  }
}

__device__ __forceinline__ void store4(float* p, const float (&v)[4]) { *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]); }
__device__ __forceinline__ void store4(bf16* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

template <class T, int G, bool PACKED>
__device__ __forceinline__ void store_pixels(T* out, const float (&v)[4][G], int b, int p, int count, int size,
                                             const Channels<G, PACKED>& channels) {
#pragma unroll
  for (int c = 0; c < G; c++) {
    if (c >= channels.count()) continue;
    T* to = out + ((size_t)b * channels.all() + channels.first() + c) * size + p;
    const float plane[4] = {v[0][c], v[1][c], v[2][c], v[3][c]};
    if (size % 4 == 0) store4(to, plane);
    else
      for (int e = 0; e < count; e++) to[e] = from_f32<T>(plane[e]);
  }
}

// A thread owns four pixels of images blockIdx.y and B - 1 - blockIdx.y: all channels where PACKED, else up to G of them from G blockIdx.z on.
template <class T, int G, bool PACKED>
__device__ __forceinline__ void augment(T* __restrict__ out, const unsigned char* __restrict__ bytes, const float* __restrict__ levels,
                                        const Erase& erase, int batch, int all, int height, int width, bool mixup, int y0, int y1, int x0,
                                        int x1, float own, float other) {
  const int size = height * width, p = (blockIdx.x * 256 + threadIdx.x) * 4, count = min(4, size - p);
  if (count <= 0) return;
  const int from = G * (int)blockIdx.z;
  const Channels<G, PACKED> channels{all, from, min(G, all - from)};
  float mean[G], std[G];
#pragma unroll
  for (int c = 0; c < G; c++) {
    const bool there = c < channels.count();
    mean[c] = there ? levels[channels.first() + c] : 0.f;
    std[c] = there ? levels[channels.all() + channels.first() + c] : 1.f;
  }
  const int i = blockIdx.y, j = batch - 1 - i;
  float a[4][G], b[4][G];
  load_pixels(a, bytes, erase, i, p, count, size, width, channels, mean, std);
  load_pixels(b, bytes, erase, j, p, count, size, width, channels, mean, std);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int y = (p + e) / width, x = (p + e) - y * width;
    const bool swap = y >= y0 && y < y1 && x >= x0 && x < x1;
#pragma unroll
    for (int c = 0; c < G; c++) {
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
  store_pixels(out, a, i, p, count, size, channels);
  if (i != j) store_pixels(out, b, j, p, count, size, channels);
}

}  // namespace

// `augment`: 3 channels. `augment_any`: any number of channels, in fours.
#define EXPORT(T, NAME, G, PACKED)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 2) NAME(T* out, const unsigned char* bytes, const float* levels, const int* boxes,       \
                                                            const float* fill, int batch, int channels, int height, int width, int each,     \
                                                            int by_pixel, int mixup, int y0, int y1, int x0, int x1, float own,              \
                                                            float other) {                                                                   \
    const Erase erase{boxes, fill, each, by_pixel != 0};                                                                                     \
    augment<T, G, PACKED>(out, bytes, levels, erase, batch, channels, height, width, mixup != 0, y0, y1, x0, x1, own, other);                \
  }                                                                                                                                          \
  KERNEL(NAME)
EXPORT(float, augment_f32, 3, true)
EXPORT(bf16, augment_bf16, 3, true)
EXPORT(float, augment_any_f32, 4, false)
EXPORT(bf16, augment_any_bf16, 4, false)
