// attention.cuh - what the forms of attention share: the tokens that serve as keys, the softmax of strips of queries, the two sweeps of the backward.
//
// Layout: qkv, dqkv [B, N, 3, H, d]; y, dy [B, N, H, d]; lse, delta [B, H, N] f32; class_rows [B, H, K] f32; ids [B, K] or null, then K = N.
#pragma once
#include "tile.cuh"

// The token that a key is: the key's own number, or what the list of its image says.
struct Tokens {
  const unsigned* ids;
  int n;
  unsigned* fault;
  __device__ __forceinline__ int operator()(int key) const {
    if (!ids) return key;
    const int id = (int)ids[key];
    return in_range(id, n, fault) ? id : 0;
  }
};
__device__ __forceinline__ Tokens tokens_of(const unsigned* ids, int image, int keys, int n, unsigned* fault) {
  return {ids ? ids + (size_t)image * keys : ids, n, fault};
}

// ---- forward -----------------------------------------------------------------------------------------------------------------------------------

template <int D, int M> struct Softmax {        // running state of M strips of 16 queries; [..][0]: row lane/4, [..][1]: row lane/4 + 8
  float y[M][D / 8][4], most[M][2], sum[M][2];  // `sum` is this lane's share; the quad is added up at the end
};

template <int D, int M> __device__ __forceinline__ void softmax_init(Softmax<D, M>& w) {
  zero(w.y);
#pragma unroll
  for (int m = 0; m < M; m++) {
    w.most[m][0] = w.most[m][1] = -INFINITY;
    w.sum[m][0] = w.sum[m][1] = 0.f;
  }
}

// Up to BLOCK keys (a multiple of 16), `valid` >= 1 of them real. `sc` = scale * log2(e). row0, if given, receives the raw scores of the
// first row.
template <int D, int M, int BLOCK>
__device__ __forceinline__ void softmax_block(Softmax<D, M>& w, const uint32_t (&q)[M][D / 16][4], const bf16* k, const bf16* v, int valid,
                                              float sc, float* row0) {
  constexpr int G = BLOCK / 16;
  const int lane = threadIdx.x & 31;
  float s[G][M][2][4];
#pragma unroll
  for (int g = 0; g < G; g++) {
    if (16 * g < valid) strip_dot<D, M>(s[g], q, k, 16 * g);  // the same for all lanes
    if (16 * g + 16 > valid) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (16 * g + 8 * t + (lane & 3) * 2 + (i & 1) >= valid) s[g][m][t][i] = -INFINITY;
    }
    if (row0 && lane < 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = 16 * g + 8 * (i / 2) + 2 * lane + i % 2;
        if (key < valid) row0[key] = s[g][0][i / 2][i % 2];
      }
    }
  }
  float shift[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = w.most[m][h];
#pragma unroll
      for (int g = 0; g < G; g++)
#pragma unroll
        for (int t = 0; t < 2; t++) most = fmaxf(most, fmaxf(s[g][m][t][2 * h], s[g][m][t][2 * h + 1]));
      most = quad_max(most);  // finite: key 0 of a block is real
      float fix = fast_exp2((w.most[m][h] - most) * sc);
      w.most[m][h] = most;
      w.sum[m][h] *= fix;
      shift[m][h] = most * sc;
#pragma unroll
      for (int t = 0; t < D / 8; t++) {
        w.y[m][t][2 * h] *= fix;
        w.y[m][t][2 * h + 1] *= fix;
      }
    }
#pragma unroll
  for (int g = 0; g < G; g++) {
    if (16 * g >= valid) break;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          s[g][m][t][i] = fast_exp2(s[g][m][t][i] * sc - shift[m][i >> 1]);
          w.sum[m][i >> 1] += s[g][m][t][i];
        }
    uint32_t p[M][4];
    pack_tile(p, s[g]);
    strip_add<D, M>(w.y, p, v, 16 * g);
  }
}

// Divides, writes the rows and, if wanted, their log-sum-exp; returns that of the first row in base 2.
template <int D, int M>
__device__ __forceinline__ float softmax_finish(const Softmax<D, M>& w, bf16* y, size_t stride, float* lse, int valid, int d, float sc,
                                                bf16* stage) {
  const int lane = threadIdx.x & 31;
  float first = 0.f;
#pragma unroll
  for (int m = 0; m < M; m++) {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = quad_sum(w.sum[m][h]), lse2 = w.most[m][h] * sc + log2f(sum);
      inverse[h] = 1.f / sum;
      int r = 16 * m + (lane >> 2) + 8 * h;
      if (lse && (lane & 3) == 0 && r < valid) lse[r] = lse2 * LN2;
      if (m == 0 && h == 0) first = lse2;
    }
    store_strip<D>(y + 16 * m * stride, stride, valid - 16 * m, d, w.y[m], inverse[0], inverse[1], stage);
  }
  return __shfl_sync(0xffffffffu, first, 0);
}

// The raw scores of query 0, left in global memory by the warp that owns it, become probabilities; lse2 is that row's log-sum-exp in base 2.
__device__ __forceinline__ void finish_class_row(float* row0, int keys, float sc, float lse2) {
  __syncwarp();  // lanes 0..3 have written what all lanes read
  for (int j = threadIdx.x & 31; j < keys; j += 32) row0[j] = fast_exp2(row0[j] * sc - lse2);
}

// ---- backward ----------------------------------------------------------------------------------------------------------------------------------
// With P = softmax, g = dy, delta_i = g_i . y_i:  dv = P^T g,  dS = P * (g v^T - delta),  dq = scale * dS k,  dk = scale * dS^T q.
// Rows past N hold zeros in q and g and lse = +inf, so their P is exactly 0 as queries; keys past K are masked by hand, because exp(0 - lse) may
// overflow and inf * 0 is not 0.

// dq of 16M queries over `rows` keys (a multiple of 16), `valid` of them real.
template <int D, int M>
__device__ __forceinline__ void dq_rows(float (&dq)[M][D / 8][4], const uint32_t (&q)[M][D / 16][4], const uint32_t (&g)[M][D / 16][4],
                                        const float (&lse2)[M][2], const float (&delta)[M][2], const bf16* k, const bf16* v, int rows, int valid,
                                        float sc) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int k0 = 0; k0 < rows; k0 += 16) {
    float s[M][2][4], dp[M][2][4];
    strip_dot<D, M>(s, q, k, k0);
    strip_dot<D, M>(dp, g, v, k0);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[m][t][i] = fast_exp2(s[m][t][i] * sc - lse2[m][i >> 1]) * (dp[m][t][i] - delta[m][i >> 1]);
    if (k0 + 16 > valid) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (k0 + 8 * t + (lane & 3) * 2 + (i & 1) >= valid) s[m][t][i] = 0.f;
    }
    uint32_t ds[M][4];
    pack_tile(ds, s);
    strip_add<D, M>(dq, ds, k, k0);
  }
}

// dk and dv of 16M keys over `rows` queries; everything is transposed, so the saved statistics belong to columns.
template <int D, int M>
__device__ __forceinline__ void dkv_rows(float (&dk)[M][D / 8][4], float (&dv)[M][D / 8][4], const uint32_t (&k)[M][D / 16][4],
                                         const uint32_t (&v)[M][D / 16][4], const bf16* q, const bf16* g, const float* lse2, const float* delta,
                                         int rows, float sc) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int q0 = 0; q0 < rows; q0 += 16) {
    float p[M][2][4], ds[M][2][4];
    strip_dot<D, M>(p, k, q, q0);
    strip_dot<D, M>(ds, v, g, q0);
#pragma unroll
    for (int t = 0; t < 2; t++) {
      float2 l = *reinterpret_cast<const float2*>(lse2 + q0 + 8 * t + (lane & 3) * 2);
      float2 e = *reinterpret_cast<const float2*>(delta + q0 + 8 * t + (lane & 3) * 2);
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          p[m][t][i] = fast_exp2(p[m][t][i] * sc - (i & 1 ? l.y : l.x));
          ds[m][t][i] = p[m][t][i] * (ds[m][t][i] - (i & 1 ? e.y : e.x));
        }
    }
    uint32_t a[M][4];
    pack_tile(a, p);
    strip_add<D, M>(dv, a, g, q0);
    pack_tile(a, ds);
    strip_add<D, M>(dk, a, q, q0);
  }
}
