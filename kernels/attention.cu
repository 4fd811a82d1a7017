// attention.cu - softmax(q k^T * scale) v and its gradients for short sequences.   Definition: src/ops/attention/mod.rs
//
//   S = scale q k^T,  P = softmax(S),  y = P v          lse = log sum exp(S) by rows, all that is saved; layout in attention.cuh
//   dP = dy v^T,  dS = P (dP - delta),  delta = rows(dy y),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dy
//
//   version  file             idea                                                                      B=256 H=12 N=197 D=64 bf16
//   v1       attention_v1     f32 arithmetic, four lanes a row, tiles of 32 rows in shared memory        not run on a GPU
//   v2       attention        tensor cores; all rows of a head in shared memory; a warp owns 16 rows     not run on a GPU   <- chosen
//   v3       attention        32 rows a warp: half the shared-memory traffic, which bounds v2            not run on a GPU
//   long     attention_long   64-row tiles through two buffers, for sequences that do not fit            not run on a GPU
//
// f32 always runs v1: it means f32. Rows are padded to 16 (v3: the strips to 32), never to a tile. The backward runs twice over the scores, once by
// query strips for dq and once by key strips for dk and dv: 14 N^2 D operations where 10 would do, but every sum stays in one warp's registers. No
// atomics, no exchange between warps, results repeat bit for bit.
//
// Floor, forward: 4 N D numbers a head and 4 N^2 D operations; backward 8 N D and 10 N^2 D. At N = 50 bytes limit both. At N = 197 D = 64 the forward of
// v2 is limited by bytes and by operand traffic in shared memory (256 bytes an mma, 128 in v3) alike, the backward by that traffic.
#include "attention.cuh"

namespace {

// Block: `group` heads of one image. Warp: 16M queries of those heads at a time, in turn; it loads its own queries and shares only k, v. A warp that
// owns query 0 leaves its scores in class_rows and turns them into probabilities when it is done.
// Shared: k, v [group][2][kp][D], kp = keys up to a multiple of 16 | per warp 16M rows (queries, then output). One barrier, after the load.
template <int D, int M>
__device__ __forceinline__ void attention_fwd(bf16* __restrict__ y, float* __restrict__ lse, float* __restrict__ class_rows,
                                              const bf16* __restrict__ qkv, const unsigned* __restrict__ ids, int n, int keys, int heads, int d,
                                              int group, float scale, unsigned* fault) {
  SHARED(bf16, sm);
  constexpr int ROWS = 16 * M, BLOCK = 64 / M;
  const int warps = blockDim.x >> 5, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int kp = (keys + 15) & ~15, strips = (n + ROWS - 1) / ROWS, b = blockIdx.y, h0 = blockIdx.x * group, nh = min(group, heads - h0);
  const size_t row = (size_t)3 * heads * d, y_row = (size_t)heads * d;
  const bf16* x = qkv + b * (n * row) + (size_t)h0 * d;
  bf16* stage = sm + (size_t)group * 2 * kp * D + warp * ROWS * D;
  const Tokens tokens = tokens_of(ids, b, keys, n, fault);
  const float sc = scale * LOG2E;

  for (int h = 0; h < nh; h++)
    for (int kv = 0; kv < 2; kv++)
      load_rows_at<D>(sm + (2 * h + kv) * kp * D, x + ((size_t)(kv + 1) * heads + h) * d, kp, keys, row, d, threadIdx.x, blockDim.x, tokens);
  int it = (warp + blockIdx.x + b) % warps;  // the warp with one strip more is another one in each block: warps are tied to scheduler slots
  auto load_queries = [&] {
    int h = it / strips, q0 = it % strips * ROWS;
    load_rows<D>(stage, x + (size_t)h * d + q0 * row, ROWS, n - q0, row, d, lane, 32);
  };
  if (it < nh * strips) load_queries();
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  while (it < nh * strips) {
    const int h = it / strips, q0 = it % strips * ROWS;
    const bf16 *k = sm + 2 * h * kp * D, *v = k + kp * D;
    const size_t bh = (size_t)b * heads + h0 + h;
    uint32_t q[M][D / 16][4];
    load_strip<D, M>(q, stage, 0);
    float* row0 = class_rows && q0 == 0 ? class_rows + bh * keys : nullptr;
    Softmax<D, M> w;
    softmax_init(w);
#pragma unroll 1
    for (int k0 = 0; k0 < keys; k0 += BLOCK)
      softmax_block<D, M, BLOCK>(w, q, k + k0 * D, v + k0 * D, min(BLOCK, keys - k0), sc, row0 ? row0 + k0 : nullptr);
    const float lse2 = softmax_finish<D, M>(w, y + (b * (size_t)n + q0) * y_row + (size_t)(h0 + h) * d, y_row, lse ? lse + bh * n + q0 : nullptr,
                                            n - q0, d, sc, stage);
    if (row0) finish_class_row(row0, keys, sc, lse2);
    it += warps;
    if (it < nh * strips) {
      __syncwarp();  // the output has left `stage`
      load_queries();
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
    }
  }
}

// The product of two packed pairs, in f32.
__device__ __forceinline__ float pair_dot(uint32_t a, uint32_t b) { return low_bf16(a) * low_bf16(b) + high_bf16(a) * high_bf16(b); }

// The four lanes of a quad: y_row . g_row, where g lies in shared memory and y is read from global memory.
template <int D> __device__ __forceinline__ float row_dot(const bf16* y, const bf16* g, int r, int d) {
  float sum = 0.f;
  for (int c = threadIdx.x & 3; 8 * c < d; c += 4) {
    const bf16* x = g + swz<D>(r, c);
    if (d % 8 == 0) {
      uint4 a = *reinterpret_cast<const uint4*>(y + 8 * c), b = *reinterpret_cast<const uint4*>(x);
      sum += (pair_dot(a.x, b.x) + pair_dot(a.y, b.y)) + (pair_dot(a.z, b.z) + pair_dot(a.w, b.w));
    } else {
      for (int e = 0; e < min(8, d - 8 * c); e++) sum += to_f32(y[8 * c + e]) * to_f32(x[e]);
    }
  }
  return quad_sum(sum);
}

// Block: one head. Warp: 16M queries at a time (dq), then 16M keys (dk, dv); nothing is written to what is shared after the load, so the two halves
// need no barrier. With a list of keys the rows of dk and dv that it does not name are not written.
// Shared: q, g [np][D], k, v [kp][D], np and kp = N and K up to a multiple of 16M | lse2, delta [np] f32 | per warp 8 rows for the way out. Two
// barriers: after g for delta, after the rest for the sweeps.
template <int D, int M>
__device__ __forceinline__ void attention_bwd(bf16* __restrict__ dqkv, const bf16* __restrict__ dy, const bf16* __restrict__ qkv,
                                              const unsigned* __restrict__ ids, const bf16* __restrict__ y, const float* __restrict__ lse, int n,
                                              int keys, int heads, int d, float scale, unsigned* fault) {
  SHARED(bf16, sm);
  const int warps = blockDim.x >> 5, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  constexpr int ROWS = 16 * M;
  const int np = (n + ROWS - 1) / ROWS * ROWS, kp = (keys + ROWS - 1) / ROWS * ROWS, h = blockIdx.x, b = blockIdx.y;
  const size_t row = (size_t)3 * heads * d, y_row = (size_t)heads * d, head = (size_t)heads * d;
  const size_t at = b * (n * row) + (size_t)h * d, at_y = b * (n * y_row) + (size_t)h * d, bh = (size_t)b * heads + h;
  bf16 *q = sm, *g = q + np * D, *k = g + np * D, *v = k + kp * D;
  float *lse2 = reinterpret_cast<float*>(v + kp * D), *delta = lse2 + np;
  bf16* stage = reinterpret_cast<bf16*>(delta + np) + warp * 8 * D;
  const Tokens tokens = tokens_of(ids, b, keys, n, fault);
  const float sc = scale * LOG2E;

  load_rows<D>(g, dy + at_y, np, n, y_row, d, threadIdx.x, blockDim.x);
  cp_async_commit();
  load_rows<D>(q, qkv + at, np, n, row, d, threadIdx.x, blockDim.x);
  load_rows_at<D>(k, qkv + at + head, kp, keys, row, d, threadIdx.x, blockDim.x, tokens);
  load_rows_at<D>(v, qkv + at + 2 * head, kp, keys, row, d, threadIdx.x, blockDim.x, tokens);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  for (int r = threadIdx.x >> 2; r < np; r += blockDim.x >> 2) {  // while q, k, v are still on their way; np is a multiple of a warp's 8 rows
    float e = row_dot<D>(y + at_y + (r < n ? r : 0) * y_row, g, r, d);
    if ((lane & 3) == 0) {
      delta[r] = e;
      lse2[r] = r < n ? lse[bh * n + r] * LOG2E : INFINITY;
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  for (int r0 = warp * ROWS; r0 < np; r0 += warps * ROWS) {
    uint32_t qf[M][D / 16][4], gf[M][D / 16][4];
    load_strip<D, M>(qf, q, r0);
    load_strip<D, M>(gf, g, r0);
    float dq[M][D / 8][4], l[M][2], e[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
      l[i / 2][i % 2] = lse2[r0 + (lane >> 2) + 8 * i];
      e[i / 2][i % 2] = delta[r0 + (lane >> 2) + 8 * i];
    }
    zero(dq);
    dq_rows<D, M>(dq, qf, gf, l, e, k, v, (keys + 15) & ~15, keys, sc);
#pragma unroll
    for (int m = 0; m < M; m++) store_strip<D>(dqkv + at + (r0 + 16 * m) * row, row, n - r0 - 16 * m, d, dq[m], scale, scale, stage);
  }
  // From the other end, so that a warp with more queries than others has fewer keys.
  for (int r0 = (warps - 1 - warp) * ROWS; r0 < kp; r0 += warps * ROWS) {
    uint32_t kf[M][D / 16][4], vf[M][D / 16][4];
    load_strip<D, M>(kf, k, r0);
    load_strip<D, M>(vf, v, r0);
    float dk[M][D / 8][4], dv[M][D / 8][4];
    zero(dk);
    zero(dv);
    dkv_rows<D, M>(dk, dv, kf, vf, q, g, lse2, delta, (n + 15) & ~15, sc);
#pragma unroll
    for (int m = 0; m < M; m++) {
      const int first = r0 + 16 * m;
      auto token = [&](int r) { return tokens(first + r); };
      store_strip_at<D>(dqkv + at + head, row, keys - first, d, dk[m], scale, scale, stage, token);
      store_strip_at<D>(dqkv + at + 2 * head, row, keys - first, d, dv[m], 1.f, 1.f, stage, token);
    }
  }
}

}  // namespace

// BOUNDS: largest block and blocks an SM. Registers are handed out per quarter of an SM, so 14 warps an SM get no more of them (128) than 16 do, and
// 12 warps get 168. The largest blocks are also written in src/ops/attention/gpu.rs.
#define FWD(V, M, D, BOUNDS)                                                                                                                \
  extern "C" __global__ void __launch_bounds__ BOUNDS attention_fwd_##V##_bf16_d##D(                                                        \
      bf16* y, float* lse, float* class_rows, const bf16* qkv, const unsigned* ids, int n, int keys, int heads, int d, int group,           \
      float scale, unsigned* fault) {                                                                                                       \
    attention_fwd<D, M>(y, lse, class_rows, qkv, ids, n, keys, heads, d, group, scale, fault);                                              \
  }                                                                                                                                         \
  KERNEL(attention_fwd_##V##_bf16_d##D)
#define BWD(V, M, D, BOUNDS)                                                                                                                \
  extern "C" __global__ void __launch_bounds__ BOUNDS attention_bwd_##V##_bf16_d##D(                                                        \
      bf16* dqkv, const bf16* dy, const bf16* qkv, const unsigned* ids, const bf16* y, const float* lse, int n, int keys, int heads, int d, \
      float scale, unsigned* fault) {                                                                                                       \
    attention_bwd<D, M>(dqkv, dy, qkv, ids, y, lse, n, keys, heads, d, scale, fault);                                                       \
  }                                                                                                                                         \
  KERNEL(attention_bwd_##V##_bf16_d##D)
FWD(v2, 1, 16, (256, 2))
FWD(v2, 1, 32, (256, 2))
FWD(v2, 1, 48, (192, 2))
FWD(v2, 1, 64, (256, 2))
FWD(v2, 1, 80, (128, 2))
FWD(v2, 1, 128, (128, 2))
FWD(v3, 2, 16, (128, 4))
FWD(v3, 2, 32, (128, 3))
FWD(v3, 2, 64, (128, 2))
BWD(v2, 1, 16, (256, 2))
BWD(v2, 1, 32, (256, 2))
BWD(v2, 1, 48, (192, 2))
BWD(v2, 1, 64, (192, 2))
BWD(v2, 1, 80, (256, 1))
BWD(v2, 1, 128, (256, 1))
BWD(v3, 2, 16, (128, 4))
BWD(v3, 2, 32, (128, 3))
