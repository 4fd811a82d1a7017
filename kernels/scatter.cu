// scatter.cu - tokens back in their places, mask tokens in the others, positions added on the way.   Definition: src/ops/scatter.rs
//
//   y[b, e + l] = (r < K ? x[b, e + r] : mask) + table[e + l],  r = restore[b, l];   y[b, i] = x[b, i] + table[i] for the first e tokens
//   dx[b, e + r] = dy[b, e + l] where r < K,   dmask = sum of dy where r >= K
//
//   x, dx [B, e + K, C], y, dy [B, e + L, C] f32 or bf16; mask [C], table [e + L, C] or null f32; restore [B, L], a permutation in each row
//
// Limit: bandwidth. Forward: x and y once, the table out of L2. Backward: dy once, since the rows that go to dx and those that are summed are disjoint;
// dx once; 256 shares of dmask. B=256, K=49, L=196, C=512 bf16: 65 MB or 15 us either way.
#include "tokens.cuh"

namespace {

// Where the token at `place` of an image comes from: a row of x if it is less than e + K.
__device__ __forceinline__ int source_of(int image, int place, int extra, int length, const int* __restrict__ restore, unsigned* fault) {
  if (place < extra) return place;
  int r = restore[(size_t)image * length + place - extra];
  return extra + (in_range(r, length, fault) ? r : 0);
}

// A warp a row of y.
template <class T>
__device__ __forceinline__ void unshuffle_fwd(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ mask, const float* __restrict__ table,
                                              const int* __restrict__ restore, int rows, int tokens, int extra, int length, int columns,
                                              unsigned* fault) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (r >= rows) return;
  const int image = r / (extra + length), place = r % (extra + length);
  const int source = source_of(image, place, extra, length, restore, fault);
  const T* from = x + ((size_t)image * tokens + source) * columns;
  for (int c = lane * 8; c < columns; c += 256) {
    float v[8], p[8] = {};
    if (source < tokens) load_row(v, from, c, columns);
    else load_row(v, mask, c, columns);
    if (table) load_row(p, table + (size_t)place * columns, c, columns);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += p[j];
    store_row(y + (size_t)r * columns, v, c, columns);
  }
}

// Block: 8 warps, 256 columns from 256 blockIdx.x on, and every gridDim.y-th group of 8 rows of dy. A lane owns 8 columns, a warp a row at a time: it is
// moved to dx or added to the block's share of dmask, partial [gridDim.y, C]. Either may be null.
template <class T>
__device__ __forceinline__ void unshuffle_bwd(T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const int* __restrict__ restore,
                                              int rows, int tokens, int extra, int length, int columns, unsigned* fault) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 256 + lane * 8;
  float sum[8] = {};
  if (c < columns) {
    for (int r = blockIdx.y * 8 + warp; r < rows; r += gridDim.y * 8) {
      const int image = r / (extra + length), source = source_of(image, r % (extra + length), extra, length, restore, fault);
      const bool kept = source < tokens;
      if (kept ? !dx : !partial) continue;
      float v[8];
      load_row(v, dy + (size_t)r * columns, c, columns);
      if (kept) {
        store_row(dx + ((size_t)image * tokens + source) * columns, v, c, columns);
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += v[j];
      }
    }
  }
  if (!partial) return;  // the same for all threads
  const float all = sum_of_warps(sum);
  const int mine = blockIdx.x * 256 + threadIdx.x;
  if (mine < columns) partial[(size_t)blockIdx.y * columns + mine] = all;
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                      \
  extern "C" __global__ void __launch_bounds__(256) unshuffle_fwd_##NAME(T* y, const T* x, const float* mask, const float* table,           \
                                                                         const int* restore, int rows, int tokens, int extra, int length,   \
                                                                         int columns, unsigned* fault) {                                     \
    unshuffle_fwd(y, x, mask, table, restore, rows, tokens, extra, length, columns, fault);                                                  \
  }                                                                                                                                          \
  KERNEL(unshuffle_fwd_##NAME)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(256) unshuffle_bwd_##NAME(T* dx, float* partial, const T* dy, const int* restore, int rows,  \
                                                                         int tokens, int extra, int length, int columns, unsigned* fault) { \
    unshuffle_bwd(dx, partial, dy, restore, rows, tokens, extra, length, columns, fault);                                                    \
  }                                                                                                                                          \
  KERNEL(unshuffle_bwd_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
