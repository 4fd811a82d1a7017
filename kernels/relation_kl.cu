// relation_kl.cu - how far a student's token relations are from a teacher's, and the gradient, without an N x N map.   Definition: src/ops/relation_kl.rs
//
//   S = softmax_j(scale_s x_i . y_j), T likewise from the teacher; x, y two of q, k, v, or twice the same
//   divergence = mean over (b, head, i) of sum_j T_ij (ln T_ij - ln S_ij)
//   G = (S - T) / (B H N),   dx = scale_s G y,   dy = scale_s G^T x,   of one part with itself dx = scale_s (G + G^T) x
//
//   student, dstudent [B, N, 3, H, ds]; teacher [B, N, 3, H, dt], of one type; partial [blocks, relations] f32: each block's share of a divergence
//
// One launch (v2) or two to three (v1) a relation. A part that several relations touch is written by the first and added to by those after it, which come
// later on the stream: one writer at any time. The divergence is taken relative to both maxima, sum e^(zt-mt) ((zt-mt) - (zs-ms)): rows of v v^T are
// often nearly one-hot, and what is left of them does not survive being a difference of numbers of size 10.
//
//   version  idea                                                                      S<-B: B=256 H=12 N=197, 32 <- 64, bf16, one relation
//   v1       f32 arithmetic, tiles of 32 x 32 in shared memory, any width and length   not run on a GPU
//   v2       bf16 tensor cores, a head's parts resident in shared memory, three        not run on a GPU   <- chosen where it fits
//            sweeps (two for a part with itself)
//
// Limit of v2: exponentials, 12 a score (6 + 6), then shared memory; bytes would allow 108 us at that shape. Limit of v1: shared-memory reads.
#include "tile.cuh"

namespace {

constexpr float MASKED = -1e30f;  // finite, so that the difference of two masked scores is 0 and not nan

template <bool BASE2> __device__ __forceinline__ float power(float x) { return BASE2 ? fast_exp2(x) : expf(x); }

// One row's sums over the columns that a lane has seen, relative to its own maxima.
struct Row {
  float mt, lt, ms, ls, cross;  // teacher: maximum, sum; student: likewise; sum of e^(zt - mt) ((zt - mt) - (zs - ms))
};
constexpr Row NOTHING = {MASKED, 0.f, MASKED, 0.f, 0.f};
// The same sums relative to larger maxima.
template <bool BASE2> __device__ __forceinline__ void rebase(Row& a, float mt, float ms) {
  float f = power<BASE2>(a.mt - mt);
  a.cross = f * (a.cross + a.lt * ((a.mt - mt) - (a.ms - ms)));
  a.lt *= f;
  a.ls *= power<BASE2>(a.ms - ms);
  a.mt = mt;
  a.ms = ms;
}
template <bool BASE2> __device__ __forceinline__ void merge(Row& a, Row b) {
  float mt = fmaxf(a.mt, b.mt), ms = fmaxf(a.ms, b.ms);
  rebase<BASE2>(a, mt, ms);
  rebase<BASE2>(b, mt, ms);
  a.lt += b.lt;
  a.ls += b.ls;
  a.cross += b.cross;
}
__device__ __forceinline__ Row from_lane(const Row& a, int x) {
  return {__shfl_xor_sync(~0u, a.mt, x), __shfl_xor_sync(~0u, a.lt, x), __shfl_xor_sync(~0u, a.ms, x), __shfl_xor_sync(~0u, a.ls, x),
          __shfl_xor_sync(~0u, a.cross, x)};
}

// ---- v1: f32 arithmetic ----

constexpr int STRIP = 32;  // rows of a block and keys of a tile; a warp has four of the rows
using Tile = float[STRIP][STRIP + 1];

// Rows r0.. and columns k0.. of [n, d], zeros beyond. All 256 threads.
template <class T> __device__ __forceinline__ void load_tile(Tile& s, const T* __restrict__ g, size_t stride, int r0, int n, int k0, int d) {
  for (int i = threadIdx.x; i < STRIP * STRIP; i += 256) {
    const int r = i / STRIP, k = i % STRIP;
    s[r][k] = r0 + r < n && k0 + k < d ? to_f32(g[(r0 + r) * stride + k0 + k]) : 0.f;
  }
}

// z[i] = scale * row r0 + 4 warp + i of x times row c0 + lane of y.
template <class T>
__device__ __forceinline__ void plain_scores(float (&z)[4], Tile& a, Tile& b, const T* __restrict__ x, const T* __restrict__ y, size_t stride,
                                             int r0, int c0, int n, int d, float scale) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < 4; i++) z[i] = 0.f;
  for (int k0 = 0; k0 < d; k0 += STRIP) {
    __syncthreads();  // the tiles before have been read
    load_tile(a, x, stride, r0, n, k0, d);
    load_tile(b, y, stride, c0, n, k0, d);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < STRIP; k++) {
      const float v = b[lane][k];
#pragma unroll
      for (int i = 0; i < 4; i++) z[i] += a[4 * warp + i][k] * v;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) z[i] *= scale;
}

// Block: 8 warps, 32 rows of one head; a lane sees every 32nd column of its warp's four rows, then the lanes merge. stats [B H, N, 4]: a row's maximum and
// the inverse of its sum, of the student, then of the teacher. share = 1 / (B H N).
template <class T>
__device__ __forceinline__ void stats_v1(float* __restrict__ stats, float* __restrict__ partial, const T* __restrict__ student,
                                         const T* __restrict__ teacher, int n, int heads, int ds, int dt, int px, int py, int relation,
                                         int relations, float scale_s, float scale_t, float share) {
  __shared__ Tile a, b;
  __shared__ float scratch[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, strips = (n + STRIP - 1) / STRIP;
  const int head = blockIdx.x / strips, r0 = blockIdx.x % strips * STRIP;
  const size_t row_s = (size_t)3 * heads * ds, row_t = (size_t)3 * heads * dt;
  const T* s = student + head / heads * (n * row_s) + (size_t)(head % heads) * ds;
  const T* t = teacher + head / heads * (n * row_t) + (size_t)(head % heads) * dt;
  Row w[4] = {NOTHING, NOTHING, NOTHING, NOTHING};
  for (int c0 = 0; c0 < n; c0 += STRIP) {
    float zs[4], zt[4];
    plain_scores(zs, a, b, s + (size_t)px * heads * ds, s + (size_t)py * heads * ds, row_s, r0, c0, n, ds, scale_s);
    plain_scores(zt, a, b, t + (size_t)px * heads * dt, t + (size_t)py * heads * dt, row_t, r0, c0, n, dt, scale_t);
    if (c0 + lane < n) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (zt[i] > w[i].mt || zs[i] > w[i].ms) rebase<false>(w[i], fmaxf(zt[i], w[i].mt), fmaxf(zs[i], w[i].ms));
        const float a_t = zt[i] - w[i].mt, a_s = zs[i] - w[i].ms, e = expf(a_t);
        w[i].lt += e;
        w[i].cross += e * (a_t - a_s);
        w[i].ls += expf(a_s);
      }
    }
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    for (int o = 16; o > 0; o >>= 1) merge<false>(w[i], from_lane(w[i], o));
    const int r = r0 + 4 * warp + i;
    if (lane == 0 && r < n) {
      sum += w[i].cross / w[i].lt - logf(w[i].lt) + logf(w[i].ls);
      reinterpret_cast<float4*>(stats)[(size_t)head * n + r] = make_float4(w[i].ms, 1.f / w[i].ls, w[i].mt, 1.f / w[i].lt);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[(size_t)blockIdx.x * relations + relation] = share * sum;
}

// S - T from a pair of scores and a row's statistics.
__device__ __forceinline__ float difference(float zs, float zt, float4 row) {
  return expf(zs - row.x) * row.y - expf(zt - row.z) * row.w;
}

// The gradient of part px against part py. Block: 8 warps, 32 rows of one head, 128 columns from 128 blockIdx.y on. by_rows: px has the rows of the scores,
// by_columns: their columns; both for a part with itself. The scores have the bits that stats_v1 saw. add: to what is there. factor = scale_s / (B H N).
template <class T>
__device__ __forceinline__ void bwd_v1(T* __restrict__ dstudent, const T* __restrict__ student, const T* __restrict__ teacher,
                                       const float* __restrict__ stats, int n, int heads, int ds, int dt, int px, int py, int by_rows,
                                       int by_columns, int add, float scale_s, float scale_t, float factor) {
  __shared__ Tile a, b, gradient;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, strips = (n + STRIP - 1) / STRIP;
  const int head = blockIdx.x / strips, r0 = blockIdx.x % strips * STRIP, first = blockIdx.y * 128;
  const size_t row_s = (size_t)3 * heads * ds, row_t = (size_t)3 * heads * dt;
  const size_t at = head / heads * (n * row_s) + (size_t)(head % heads) * ds;
  const T *x = student + at + (size_t)px * heads * ds, *y = student + at + (size_t)py * heads * ds;
  const T* t = teacher + head / heads * (n * row_t) + (size_t)(head % heads) * dt;
  const float4* rows = reinterpret_cast<const float4*>(stats) + (size_t)head * n;
  float sum[4][4] = {};  // column 32 q + lane of row i
  float4 own[4];
#pragma unroll
  for (int i = 0; i < 4; i++) own[i] = r0 + 4 * warp + i < n ? rows[r0 + 4 * warp + i] : make_float4(0.f, 0.f, 0.f, 0.f);
  for (int c0 = 0; c0 < n; c0 += STRIP) {
    float zs[4], zt[4];
    plain_scores(zs, a, b, x, y, row_s, r0, c0, n, ds, scale_s);
    plain_scores(zt, a, b, t + (size_t)px * heads * dt, t + (size_t)py * heads * dt, row_t, r0, c0, n, dt, scale_t);
    const bool there = c0 + lane < n;
    const float4 other = there ? rows[c0 + lane] : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float g = 0.f;
      if (there && r0 + 4 * warp + i < n) {
        if (by_rows) g += difference(zs[i], zt[i], own[i]);
        if (by_columns) g += difference(zs[i], zt[i], other);
      }
      gradient[4 * warp + i][lane] = g;
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int k0 = first + 32 * q;
      if (k0 >= ds) break;
      __syncthreads();
      load_tile(b, y, row_s, c0, n, k0, ds);
      __syncthreads();
#pragma unroll 8
      for (int j = 0; j < STRIP; j++) {
        const float v = b[j][lane];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[q][i] += gradient[4 * warp + i][j] * v;
      }
    }
  }
  T* dx = dstudent + at + (size_t)px * heads * ds;
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = r0 + 4 * warp + i, k = first + 32 * q + lane;
      if (r >= n || k >= ds) continue;
      T* to = dx + r * row_s + k;
      *to = from_f32<T>(factor * sum[q][i] + (add ? to_f32(*to) : 0.f));
    }
}

// ---- v2: tensor cores; scores are held in base 2 ----

template <int DS, int DT> struct Pair {                                    // a strip's two left operands
  uint32_t s[1][DS / 16][4], t[1][DT / 16][4];
  __device__ __forceinline__ void load(const bf16* xs, const bf16* xt, int r0) {
    load_strip<DS>(s, xs, r0);
    load_strip<DT>(t, xt, r0);
  }
};

// Scores of a strip against rows c0..c0+15, scaled; columns from n on are masked.
template <int DS, int DT>
__device__ __forceinline__ void scores(float (&zs)[1][2][4], float (&zt)[1][2][4], const Pair<DS, DT>& a, const bf16* xs, const bf16* xt, int c0,
                                       int n, float scs, float sct) {
  int lane = threadIdx.x & 31;
  strip_dot<DS>(zs, a.s, xs, c0);
  strip_dot<DT>(zt, a.t, xt, c0);
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      zs[0][t][i] *= scs;
      zt[0][t][i] *= sct;
    }
  if (c0 + 16 > n) {
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (c0 + 8 * t + (lane & 3) * 2 + (i & 1) >= n) zs[0][t][i] = zt[0][t][i] = MASKED;
  }
}

// Both rows of a lane: no shuffle inside the sweep, 32 columns between corrections of the maxima, four lanes merge at the end.
template <int DS, int DT>
__device__ __forceinline__ void row_sums(Row (&w)[2], const Pair<DS, DT>& a, const bf16* ys, const bf16* yt, int np, int n, float scs, float sct) {
#pragma unroll 1
  for (int c0 = 0; c0 < np; c0 += 32) {
    float zs[2][1][2][4], zt[2][1][2][4];
    const bool both = c0 + 16 < np;
    scores<DS, DT>(zs[0], zt[0], a, ys, yt, c0, n, scs, sct);
    if (both) scores<DS, DT>(zs[1], zt[1], a, ys, yt, c0 + 16, n, scs, sct);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float mt = w[h].mt, ms = w[h].ms;
#pragma unroll
      for (int g = 0; g < 2; g++)
        if (g == 0 || both)
#pragma unroll
          for (int t = 0; t < 2; t++) {
            mt = fmaxf(mt, fmaxf(zt[g][0][t][2 * h], zt[g][0][t][2 * h + 1]));
            ms = fmaxf(ms, fmaxf(zs[g][0][t][2 * h], zs[g][0][t][2 * h + 1]));
          }
      rebase<true>(w[h], mt, ms);
#pragma unroll
      for (int g = 0; g < 2; g++)
        if (g == 0 || both)
#pragma unroll
          for (int t = 0; t < 2; t++)
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; i++) {
              float dt = zt[g][0][t][i] - mt, ds = zs[g][0][t][i] - ms, e = fast_exp2(dt);
              w[h].lt += e;
              w[h].cross += e * (dt - ds);
              w[h].ls += fast_exp2(ds);
            }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    merge<true>(w[h], from_lane(w[h], 1));
    merge<true>(w[h], from_lane(w[h], 2));
  }
}

// y += G . X for one strip, G in bf16. ROWS: the strip's own statistics normalise; COLS: those of the columns do; both: G + G^T, since the scores of a part
// with itself are symmetric. Statistics of rows past n are +inf, which makes their probabilities 0.
template <int DS, int DT, bool ROWS, bool COLS>
__device__ __forceinline__ void gradient_rows(float (&y)[1][DS / 8][4], const Pair<DS, DT>& a, const bf16* xs, const bf16* xt, const float* lse_s,
                                              const float* lse_t, int r0, int np, int n, float scs, float sct) {
  int lane = threadIdx.x & 31;
  float rs[2], rt[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    rs[h] = lse_s[r0 + (lane >> 2) + 8 * h];
    rt[h] = lse_t[r0 + (lane >> 2) + 8 * h];
  }
#pragma unroll 1
  for (int c0 = 0; c0 < np; c0 += 16) {
    float zs[1][2][4], zt[1][2][4];
    scores<DS, DT>(zs, zt, a, xs, xt, c0, n, scs, sct);
#pragma unroll
    for (int t = 0; t < 2; t++) {
      int c = c0 + 8 * t + (lane & 3) * 2;
      float2 cs = *reinterpret_cast<const float2*>(lse_s + c), ct = *reinterpret_cast<const float2*>(lse_t + c);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float g = 0.f;
        if (ROWS) g += fast_exp2(zs[0][t][i] - rs[i >> 1]) - fast_exp2(zt[0][t][i] - rt[i >> 1]);
        if (COLS) g += fast_exp2(zs[0][t][i] - (i & 1 ? cs.y : cs.x)) - fast_exp2(zt[0][t][i] - (i & 1 ? ct.y : ct.x));
        zs[0][t][i] = g;
      }
    }
    uint32_t p[1][4];
    pack_tile(p, zs);
    strip_add<DS>(y, p, xs, c0);
  }
}

// y = what an earlier relation left in the rows of `g`, so that this one is added to it, or 0.
template <int D>
__device__ __forceinline__ void start(float (&y)[1][D / 8][4], const bf16* g, size_t stride, int valid, int d, bool add, float factor) {
  zero(y);
  if (!add) return;
  const int lane = threadIdx.x & 31;
  const float inverse = 1.f / factor;
#pragma unroll
  for (int t = 0; t < D / 8; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = (lane >> 2) + 8 * (i >> 1), c = 8 * t + (lane & 3) * 2 + (i & 1);
      if (r < valid && c < d) y[0][t][i] = to_f32(g[r * stride + c]) * inverse;
    }
}

// One block a head of an image. Shared: x, y of the student [np][DS] each and of the teacher [np][DT] each (a part with itself: one of each) | lse_s,
// lse_t, kl [np] f32 | per warp 8 rows for the way out. part: of a part with itself, which; otherwise q with k. dstudent may be null: loss only. share = 1 / (B H N).
template <int DS, int DT, bool SELF>
__device__ __forceinline__ void relation_kl(bf16* __restrict__ dstudent, float* __restrict__ partial, const bf16* __restrict__ student,
                                            const bf16* __restrict__ teacher, int n, int heads, int ds, int dt, int part, int relation,
                                            int relations, int add_x, int add_y, float scale_s, float scale_t, float share) {
  SHARED(bf16, sm);
  const int warps = blockDim.x >> 5, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int np = (n + 15) & ~15, h = blockIdx.x, b = blockIdx.y, first = SELF ? part : 0;
  const size_t row_s = (size_t)3 * heads * ds, row_t = (size_t)3 * heads * dt;
  const size_t at_s = b * (n * row_s) + (size_t)first * heads * ds + (size_t)h * ds, at_t = b * (n * row_t) + (size_t)first * heads * dt + (size_t)h * dt;
  bf16 *xs = sm, *ys = SELF ? xs : xs + np * DS, *xt = ys + np * DS, *yt = SELF ? xt : xt + np * DT;
  float *lse_s = reinterpret_cast<float*>(yt + np * DT), *lse_t = lse_s + np, *kl = lse_t + np;
  bf16* stage = reinterpret_cast<bf16*>(kl + np) + warp * 8 * DS;
  const float scs = scale_s * LOG2E, sct = scale_t * LOG2E, factor = share * scale_s;

  load_rows<DS>(xs, student + at_s, np, n, row_s, ds, threadIdx.x, blockDim.x);
  load_rows<DT>(xt, teacher + at_t, np, n, row_t, dt, threadIdx.x, blockDim.x);
  if (!SELF) {
    load_rows<DS>(ys, student + at_s + heads * ds, np, n, row_s, ds, threadIdx.x, blockDim.x);
    load_rows<DT>(yt, teacher + at_t + heads * dt, np, n, row_t, dt, threadIdx.x, blockDim.x);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  for (int r0 = warp * 16; r0 < np; r0 += warps * 16) {
    Pair<DS, DT> a;
    a.load(xs, xt, r0);
    Row w[2] = {NOTHING, NOTHING};
    row_sums<DS, DT>(w, a, ys, yt, np, n, scs, sct);
    if ((lane & 3) == 0) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int r = r0 + (lane >> 2) + 8 * i;
        float s = log2f(w[i].ls), t = log2f(w[i].lt);
        lse_s[r] = r < n ? w[i].ms + s : INFINITY;
        lse_t[r] = r < n ? w[i].mt + t : INFINITY;
        kl[r] = r < n ? (w[i].cross / w[i].lt - t + s) * LN2 : 0.f;
      }
    }
  }
  __syncthreads();
  if (warp == warps - 1) {  // lanes and tree in a fixed order: the same bits whatever the schedule
    float sum = 0.f;
    for (int r = lane; r < np; r += 32) sum += kl[r];
    sum = warp_sum(sum);
    if (lane == 0) partial[(size_t)(b * gridDim.x + h) * relations + relation] = share * sum;
  }
  if (!dstudent) return;

  bf16* dx = dstudent + at_s;
  for (int r0 = warp * 16; r0 < np; r0 += warps * 16) {
    Pair<DS, DT> a;
    a.load(xs, xt, r0);
    float y[1][DS / 8][4];
    start<DS>(y, dx + r0 * row_s, row_s, n - r0, ds, add_x, factor);
    gradient_rows<DS, DT, true, SELF>(y, a, ys, yt, lse_s, lse_t, r0, np, n, scs, sct);
    store_strip<DS>(dx + r0 * row_s, row_s, n - r0, ds, y[0], factor, factor, stage);
  }
  if constexpr (!SELF) {
    bf16* dy = dx + heads * ds;
    for (int r0 = (warps - 1 - warp) * 16; r0 < np; r0 += warps * 16) {
      Pair<DS, DT> a;
      a.load(ys, yt, r0);
      float y[1][DS / 8][4];
      start<DS>(y, dy + r0 * row_s, row_s, n - r0, ds, add_y, factor);
      gradient_rows<DS, DT, false, true>(y, a, xs, xt, lse_s, lse_t, r0, np, n, scs, sct);
      store_strip<DS>(dy + r0 * row_s, row_s, n - r0, ds, y[0], factor, factor, stage);
    }
  }
}

}  // namespace

#define EXPORT_V1(T, NAME)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 4) relation_kl_stats_v1_##NAME(                                                    \
      float* stats, float* partial, const T* student, const T* teacher, int n, int heads, int ds, int dt, int px, int py, int relation, \
      int relations, float scale_s, float scale_t, float share) {                                                                      \
    stats_v1(stats, partial, student, teacher, n, heads, ds, dt, px, py, relation, relations, scale_s, scale_t, share);                 \
  }                                                                                                                                     \
  KERNEL(relation_kl_stats_v1_##NAME)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 2) relation_kl_bwd_v1_##NAME(                                                      \
      T* dstudent, const T* student, const T* teacher, const float* stats, int n, int heads, int ds, int dt, int px, int py,           \
      int by_rows, int by_columns, int add, float scale_s, float scale_t, float factor) {                                              \
    bwd_v1(dstudent, student, teacher, stats, n, heads, ds, dt, px, py, by_rows, by_columns, add, scale_s, scale_t, factor);            \
  }                                                                                                                                     \
  KERNEL(relation_kl_bwd_v1_##NAME)
EXPORT_V1(float, f32)
EXPORT_V1(bf16, bf16)

#define EXPORT(DS, DT, WARPS)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) relation_kl_cross_v2_s##DS##_t##DT##_bf16(                               \
      bf16* dstudent, float* partial, const bf16* student, const bf16* teacher, int n, int heads, int ds, int dt, int part,              \
      int relation, int relations, int add_x, int add_y, float scale_s, float scale_t, float share) {                                  \
    relation_kl<DS, DT, false>(dstudent, partial, student, teacher, n, heads, ds, dt, part, relation, relations, add_x, add_y,        \
                               scale_s, scale_t, share);                                                                                \
  }                                                                                                                                     \
  KERNEL(relation_kl_cross_v2_s##DS##_t##DT##_bf16)                                                                                     \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) relation_kl_self_v2_s##DS##_t##DT##_bf16(                                \
      bf16* dstudent, float* partial, const bf16* student, const bf16* teacher, int n, int heads, int ds, int dt, int part,              \
      int relation, int relations, int add_x, int add_y, float scale_s, float scale_t, float share) {                                  \
    relation_kl<DS, DT, true>(dstudent, partial, student, teacher, n, heads, ds, dt, part, relation, relations, add_x, add_y,         \
                              scale_s, scale_t, share);                                                                                 \
  }                                                                                                                                     \
  KERNEL(relation_kl_self_v2_s##DS##_t##DT##_bf16)
EXPORT(16, 32, 7)
EXPORT(16, 64, 7)
EXPORT(32, 48, 7)
EXPORT(32, 64, 7)
EXPORT(48, 64, 7)
EXPORT(64, 64, 6)
