// add.cu - sums: of two tensors, and of tokens with rows of a position table.   Definition: src/ops/add.rs
//
//   add                y = a + b, in f32, rounded once                                           Limit: bandwidth, 3 numbers an element
//   add_positions_fwd  y[b, t] = x[b, t] + table[row of t]                                       Limit: bandwidth, 2 numbers an element; the table is in L2
//   add_positions_bwd  dtable[r] = sum over images of dy[b, t] where the row of t is r           Limit: bandwidth, 1 number an element
//
// x, y, dy [B, T, C] f32 or bf16; table, dtable [R, C] f32. The row of token t is t for the first e tokens and where there are no ids, else e + ids[b, t - e].
#include "tokens.cuh"

namespace {

// A warp a row of y.
template <class T>
__device__ __forceinline__ void add_positions_fwd(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ table, const int* __restrict__ ids,
                                                  int rows, int tokens, int front, int columns, int positions, unsigned* fault) {
  const int r = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (r >= rows) return;
  const float* position = table + (size_t)position_of(r / tokens, r % tokens, tokens, front, ids, positions, fault) * columns;
  for (int c = lane * 8; c < columns; c += 256) {
    float v[8], p[8];
    load_row(v, x + (size_t)r * columns, c, columns);
    load_row(p, position, c, columns);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += p[j];
    store_row(y + (size_t)r * columns, v, c, columns);
  }
}

// Block: row blockIdx.y of the table, 256 columns from 256 blockIdx.x on. A lane owns 8 columns, a warp every eighth image: it looks for the token that used
// the row, of which there is one at most.
template <class T>
__device__ __forceinline__ void add_positions_bwd(float* __restrict__ dtable, const T* __restrict__ dy, const int* __restrict__ ids, int batch, int tokens,
                                                  int front, int columns) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.y, c = blockIdx.x * 256 + lane * 8;
  const int named = tokens - front, mine = blockIdx.x * 256 + threadIdx.x;
  float sum[8] = {};
  for (int b = warp; b < batch; b += 8) {
    int t = row;
    if (ids && row >= front) {
      t = place_of(row - front, ids + (size_t)b * named, named);
      if (t < 0) continue;
      t += front;
    }
    if (c >= columns) continue;
    float v[8];
    load_row(v, dy + ((size_t)b * tokens + t) * columns, c, columns);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += v[j];
  }
  const float all = sum_of_warps(sum);
  if (mine < columns) dtable[(size_t)row * columns + mine] = all;
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) add_##NAME(T* __restrict__ y, const T* __restrict__ a, const T* __restrict__ b, long long n) {  \
    long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8;                                                                            \
    if (i + 8 <= n) {                                                                                                                                \
      float u[8], v[8];                                                                                                                              \
      load8(u, a + i);                                                                                                                               \
      load8(v, b + i);                                                                                                                               \
      for (int j = 0; j < 8; j++) u[j] += v[j];                                                                                                      \
      store8(y + i, u);                                                                                                                              \
    } else {                                                                                                                                         \
      for (; i < n; i++) y[i] = from_f32<T>(to_f32(a[i]) + to_f32(b[i]));                                                                            \
    }                                                                                                                                                \
  }                                                                                                                                                  \
  KERNEL(add_##NAME)                                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256) add_positions_fwd_##NAME(T* y, const T* x, const float* table, const int* ids, int rows,        \
                                                                             int tokens, int front, int columns, int positions,                     \
                                                                             unsigned* fault) {                                                      \
    add_positions_fwd(y, x, table, ids, rows, tokens, front, columns, positions, fault);                                                             \
  }                                                                                                                                                  \
  KERNEL(add_positions_fwd_##NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) add_positions_bwd_##NAME(float* dtable, const T* dy, const int* ids, int batch, int tokens,     \
                                                                             int front, int columns) {                                               \
    add_positions_bwd(dtable, dy, ids, batch, tokens, front, columns);                                                                               \
  }                                                                                                                                                  \
  KERNEL(add_positions_bwd_##NAME)
EXPORT(float, f32)
EXPORT(bf16, bf16)
