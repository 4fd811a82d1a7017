// gather.cu - tokens by number, and patches straight from images into the rows of their projection.   Definition: src/ops/gather.rs
//
//   gather_fwd      y[b, t] = x[b, ids[b, t]]                                   x, dx [B, N, C], y, dy [B, K, C] f32 or bf16; ids [B, K]
//   gather_bwd      dx[b, n] = dy[b, t] where ids[b, t] = n, else 0             each row of dx looks for itself among the ids: one writer, no clearing
//   gather_patches  rows [M B, K, channels ph pw] of images [B, channels, H, W], M views of each, values in the order channel, y, x (a convolution weight's)
//
//   version  idea                       gather_fwd B=256 N=196 K=49 C=768 bf16    gather_patches P=768 f32 -> bf16
//   v1       a value a lane             not run on a GPU                          not run on a GPU
//   v2       16 bytes (8 pixels) a lane not run on a GPU                          not run on a GPU
//
// Limit: bandwidth. gather_fwd reads and writes the kept rows, 2 B K C numbers; gather_bwd reads B K C and writes B N C; gather_patches reads the kept
// pixels in their type and writes them in the wanted one, 58 MB or 13 us for the column above.
#include "tokens.cuh"

namespace {

// A warp a row of y.
template <bool WIDE, class T>
__device__ __forceinline__ void gather_fwd(T* __restrict__ y, const T* __restrict__ x, const int* __restrict__ ids, int rows, int n, int keep, int columns,
                                           unsigned* fault) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;
  int id = ids[r];
  if (!in_range(id, n, fault)) id = 0;
  copy_row<WIDE>(y + (size_t)r * columns, x + ((size_t)(r / keep) * n + id) * columns, columns);
}

// A warp a row of dx.
template <bool WIDE, class T>
__device__ __forceinline__ void gather_bwd(T* __restrict__ dx, const T* __restrict__ dy, const int* __restrict__ ids, int rows, int n, int keep,
                                           int columns) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5);
  if (r >= rows) return;
  const size_t first = (size_t)(r / n) * keep;
  const int t = place_of(r % n, ids + first, keep);
  const T* none = nullptr;
  copy_row<WIDE>(dx + (size_t)r * columns, t < 0 ? none : dy + (first + t) * columns, columns);
}

// A warp a patch; without ids all patches in raster order.
template <bool WIDE, class S, class T>
__device__ __forceinline__ void gather_patches(T* __restrict__ rows, const S* __restrict__ images, const int* __restrict__ ids, int patches, int keep,
                                               int count, int channels, int height, int width, int ph, int pw, unsigned* fault) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31, values = channels * ph * pw, across = width / pw;
  if (r >= patches) return;
  int id = ids ? ids[r] : r % keep;
  if (!in_range(id, height / ph * across, fault)) id = 0;
  const S* corner = images + ((size_t)(r / keep % count) * channels * height + id / across * ph) * width + id % across * pw;
  T* row = rows + (size_t)r * values;
  auto pixel = [&](int i) { return corner + ((size_t)(i / (ph * pw)) * height + i / pw % ph) * width + i % pw; };
  if (WIDE && pw % 8 == 0) {
    for (int i = lane * 8; i < values; i += 256) {
      float v[8];
      load8(v, pixel(i));
      store8(row + i, v);
    }
  } else {
    for (int i = lane; i < values; i += 32) row[i] = from_f32<T>(to_f32(*pixel(i)));
  }
}

}  // namespace

#define EXPORT(VERSION, WIDE, T, NAME)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) gather_fwd_##VERSION##_##NAME(T* y, const T* x, const int* ids, int rows, int n,         \
                                                                                  int keep, int columns, unsigned* fault) {                  \
    gather_fwd<WIDE>(y, x, ids, rows, n, keep, columns, fault);                                                                              \
  }                                                                                                                                          \
  KERNEL(gather_fwd_##VERSION##_##NAME)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) gather_bwd_##VERSION##_##NAME(T* dx, const T* dy, const int* ids, int rows, int n,       \
                                                                                  int keep, int columns) {                                   \
    gather_bwd<WIDE>(dx, dy, ids, rows, n, keep, columns);                                                                                   \
  }                                                                                                                                          \
  KERNEL(gather_bwd_##VERSION##_##NAME)
EXPORT(v1, false, float, f32)
EXPORT(v1, false, bf16, bf16)
EXPORT(v2, true, float, f32)
EXPORT(v2, true, bf16, bf16)

#define PATCHES(VERSION, WIDE, S, T, NAME)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) gather_patches_##VERSION##_##NAME(T* rows, const S* images, const int* ids,              \
                                                                                      int patches, int keep, int count, int channels,        \
                                                                                      int height, int width, int ph, int pw,                 \
                                                                                      unsigned* fault) {                                     \
    gather_patches<WIDE>(rows, images, ids, patches, keep, count, channels, height, width, ph, pw, fault);                                   \
  }                                                                                                                                          \
  KERNEL(gather_patches_##VERSION##_##NAME)
PATCHES(v1, false, float, float, f32_f32)
PATCHES(v1, false, float, bf16, f32_bf16)
PATCHES(v1, false, bf16, bf16, bf16_bf16)
PATCHES(v2, true, float, float, f32_f32)
PATCHES(v2, true, float, bf16, f32_bf16)
PATCHES(v2, true, bf16, bf16, bf16_bf16)
