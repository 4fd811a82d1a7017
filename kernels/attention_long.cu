// attention_long.cu - the tensor-core attention for sequences that do not fit into shared memory: 64-row tiles through two buffers.
// Definition: src/ops/attention/mod.rs; formulae, versions and layout: attention.cu, attention.cuh
//
// A block owns 64 rows of one head and walks over the other side, so q, k, v of a head are read N / 64 times, from the second-level cache. Limit: the
// operand traffic in shared memory, 256 bytes an mma. The backward is three launches: delta, dq by queries, dk and dv by keys.
#include "attention.cuh"

namespace {

constexpr int TILE = 64;

// Block: 64 queries of one head, four warps of 16. Warp 0 of block 0 leaves the scores of query 0 in class_rows and makes probabilities of them.
// Shared: two buffers of 64 rows of k and v | per warp 16 rows (queries, then output). A barrier before and after the use of each buffer.
template <int D>
__device__ __forceinline__ void attention_fwd_long(bf16* __restrict__ y, float* __restrict__ lse, float* __restrict__ class_rows,
                                                   const bf16* __restrict__ qkv, const unsigned* __restrict__ ids, int n, int keys, int heads, int d,
                                                   float scale, unsigned* fault) {
  SHARED(bf16, sm);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, h = blockIdx.y, b = blockIdx.z, q0 = blockIdx.x * TILE + warp * 16;
  const size_t row = (size_t)3 * heads * d, y_row = (size_t)heads * d, bh = (size_t)b * heads + h;
  const bf16* x = qkv + b * (n * row) + (size_t)h * d;
  bf16* stage = sm + 4 * TILE * D + warp * 16 * D;
  const Tokens tokens = tokens_of(ids, b, keys, n, fault);
  const float sc = scale * LOG2E;
  auto load_tile = [&](int k0) {
    for (int kv = 0; kv < 2; kv++)
      load_rows_at<D>(sm + (k0 / TILE % 2 * 2 + kv) * TILE * D, x + (size_t)(kv + 1) * heads * d, TILE, keys - k0, row, d, threadIdx.x, blockDim.x,
                      [&](int r) { return tokens(k0 + r); });
  };
  if (q0 < n) load_rows<D>(stage, x + q0 * row, 16, n - q0, row, d, lane, 32);
  load_tile(0);
  cp_async_commit();
  float* row0 = class_rows && q0 == 0 ? class_rows + bh * keys : nullptr;
  uint32_t q[1][D / 16][4];
  Softmax<D, 1> w;
  softmax_init(w);
  for (int k0 = 0; k0 < keys; k0 += TILE) {
    if (k0 + TILE < keys) load_tile(k0 + TILE);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (q0 < n) {
      if (k0 == 0) load_strip<D, 1>(q, stage, 0);
      const bf16* k = sm + k0 / TILE % 2 * 2 * TILE * D;
      softmax_block<D, 1, TILE>(w, q, k, k + TILE * D, min(TILE, keys - k0), sc, row0 ? row0 + k0 : nullptr);
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  if (q0 >= n) return;
  const float lse2 =
      softmax_finish<D, 1>(w, y + (b * (size_t)n + q0) * y_row + (size_t)h * d, y_row, lse ? lse + bh * n + q0 : nullptr, n - q0, d, sc, stage);
  if (row0) finish_class_row(row0, keys, sc, lse2);
}

// Block: 64 rows of one head, four warps of 16. DQ: rows are queries, tiles are k and v; else rows are keys, tiles are q and g.
// Shared: two buffers of two 64-row tiles | statistics of the tile's rows [2][2][64] f32 | per warp 32 rows, then the way out. A barrier before and
// after the use of each buffer.
template <int D, bool DQ>
__device__ __forceinline__ void attention_bwd_long(bf16* __restrict__ dqkv, const bf16* __restrict__ dy, const bf16* __restrict__ qkv,
                                                   const unsigned* __restrict__ ids, const float* __restrict__ lse, const float* __restrict__ delta,
                                                   int n, int keys, int heads, int d, float scale, unsigned* fault) {
  SHARED(bf16, sm);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, h = blockIdx.y, b = blockIdx.z, r0 = blockIdx.x * TILE + warp * 16;
  const int own_rows = DQ ? n : keys, other_rows = DQ ? keys : n;
  const size_t row = (size_t)3 * heads * d, y_row = (size_t)heads * d, head = (size_t)heads * d;
  const size_t at = b * (n * row) + (size_t)h * d, at_y = b * (n * y_row) + (size_t)h * d, bh = (size_t)b * heads + h;
  float* stats = reinterpret_cast<float*>(sm + 4 * TILE * D);
  bf16* own = reinterpret_cast<bf16*>(stats + 4 * TILE) + warp * 32 * D;
  const Tokens tokens = tokens_of(ids, b, keys, n, fault);
  const float sc = scale * LOG2E;
  auto queries = [&](bf16* q, bf16* g, int from, int rows, int first, int step) {
    load_rows<D>(q, qkv + at + from * row, rows, n - from, row, d, first, step);
    load_rows<D>(g, dy + at_y + from * y_row, rows, n - from, y_row, d, first, step);
  };
  auto keys_of = [&](bf16* k, bf16* v, int from, int rows, int first, int step) {
    auto token = [&](int r) { return tokens(from + r); };
    load_rows_at<D>(k, qkv + at + head, rows, keys - from, row, d, first, step, token);
    load_rows_at<D>(v, qkv + at + 2 * head, rows, keys - from, row, d, first, step, token);
  };
  auto load_tile = [&](int t0) {
    const int buffer = t0 / TILE % 2;
    bf16* to = sm + buffer * 2 * TILE * D;
    if constexpr (DQ) {
      keys_of(to, to + TILE * D, t0, TILE, threadIdx.x, blockDim.x);
    } else {
      queries(to, to + TILE * D, t0, TILE, threadIdx.x, blockDim.x);
      if (threadIdx.x < TILE) {
        const int r = t0 + threadIdx.x;
        stats[buffer * 2 * TILE + threadIdx.x] = r < n ? lse[bh * n + r] * LOG2E : INFINITY;
        stats[buffer * 2 * TILE + TILE + threadIdx.x] = r < n ? delta[bh * n + r] : 0.f;
      }
    }
  };
  if (r0 < own_rows) {
    if constexpr (DQ) queries(own, own + 16 * D, r0, 16, lane, 32);
    else keys_of(own, own + 16 * D, r0, 16, lane, 32);
  }
  load_tile(0);
  cp_async_commit();
  uint32_t f0[1][D / 16][4], f1[1][D / 16][4];
  float y0[1][D / 8][4], y1[1][DQ ? 1 : D / 8][4], l[1][2], e[1][2];
  zero(y0);
  zero(y1);
  if constexpr (DQ) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = r0 + (lane >> 2) + 8 * i;
      l[0][i] = r < n ? lse[bh * n + r] * LOG2E : INFINITY;
      e[0][i] = r < n ? delta[bh * n + r] : 0.f;
    }
  }
#pragma unroll 1
  for (int t0 = 0; t0 < other_rows; t0 += TILE) {
    if (t0 + TILE < other_rows) load_tile(t0 + TILE);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (r0 < own_rows) {
      if (t0 == 0) {
        load_strip<D, 1>(f0, own, 0);
        load_strip<D, 1>(f1, own + 16 * D, 0);
      }
      const bf16 *x0 = sm + t0 / TILE % 2 * 2 * TILE * D, *x1 = x0 + TILE * D;
      const float* st = stats + t0 / TILE % 2 * 2 * TILE;
      const int rows = min(TILE, (other_rows - t0 + 15) & ~15);
      if constexpr (DQ) dq_rows<D, 1>(y0, f0, f1, l, e, x0, x1, rows, keys - t0, sc);
      else dkv_rows<D, 1>(y0, y1, f0, f1, x0, x1, st, st + TILE, rows, sc);
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  if (r0 >= own_rows) return;
  if constexpr (DQ) {
    store_strip<D>(dqkv + at + r0 * row, row, n - r0, d, y0[0], scale, scale, own);
  } else {
    auto token = [&](int r) { return tokens(r0 + r); };
    store_strip_at<D>(dqkv + at + head, row, keys - r0, d, y0[0], scale, scale, own, token);
    store_strip_at<D>(dqkv + at + 2 * head, row, keys - r0, d, y1[0], 1.f, 1.f, own, token);
  }
}

}  // namespace

// BLOCKS: blocks of 128 threads an SM, as many as the registers allow without a spill.
#define BACKWARD(SIDE, DQ, D, BLOCKS)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) attention_bwd_long_##SIDE##_bf16_d##D(                                          \
      bf16* dqkv, const bf16* dy, const bf16* qkv, const unsigned* ids, const float* lse, const float* delta, int n, int keys, int heads,   \
      int d, float scale, unsigned* fault) {                                                                                                \
    attention_bwd_long<D, DQ>(dqkv, dy, qkv, ids, lse, delta, n, keys, heads, d, scale, fault);                                             \
  }                                                                                                                                         \
  KERNEL(attention_bwd_long_##SIDE##_bf16_d##D)
#define LONG(D, BLOCKS)                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) attention_fwd_long_bf16_d##D(                                                   \
      bf16* y, float* lse, float* class_rows, const bf16* qkv, const unsigned* ids, int n, int keys, int heads, int d, float scale,         \
      unsigned* fault) {                                                                                                                    \
    attention_fwd_long<D>(y, lse, class_rows, qkv, ids, n, keys, heads, d, scale, fault);                                                   \
  }                                                                                                                                         \
  KERNEL(attention_fwd_long_bf16_d##D)                                                                                                      \
  BACKWARD(dq, true, D, BLOCKS)                                                                                                             \
  BACKWARD(dkv, false, D, BLOCKS)
LONG(16, 3)
LONG(32, 3)
LONG(48, 3)
LONG(64, 3)
LONG(80, 2)
LONG(128, 2)
