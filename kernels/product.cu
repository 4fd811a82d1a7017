// product.cu - the matrix product straight from its definition: c (+)= a b + bias.   Definition: src/device/product.rs
//
// The products of a real GPU are cuBLASLt's. This kernel does what that library does not take: factors of two types, a bf16 result of f32 factors, rows
// that overlap, and k = 0, where only the bias is left. It is not made for speed: an element reads its row of a and its column of b by itself.
#include "common.cuh"

// One thread an element of c. A factor's element [i][j] lies at i row + j column, so a turned factor is one with the two swapped. The sum is taken in f32,
// from k = 0 on.
template <class A, class B, class C>
__device__ __forceinline__ void element(C* __restrict__ c, const A* __restrict__ a, const B* __restrict__ b, const A* __restrict__ bias, int m, int n, int k,
                                        int batch, long long a_row, long long a_column, long long a_step, long long b_row, long long b_column,
                                        long long b_step, long long c_row, long long c_step, int add) {
  const long long at = (long long)blockIdx.x * 256 + threadIdx.x, image = at / ((long long)m * n);
  if (image >= batch) return;
  const long long rest = at - image * m * n, i = rest / n, j = rest - i * n;
  C* out = c + image * c_step + i * c_row + j;
  const A* left = a + image * a_step + i * a_row;
  const B* right = b + image * b_step + j * b_column;
  float sum = add ? to_f32(*out) : 0.f;
  for (int l = 0; l < k; l++) sum = fmaf(to_f32(left[l * a_column]), to_f32(right[l * b_row]), sum);
  if (bias) sum += to_f32(bias[j]);
  *out = from_f32<C>(sum);
}

#define EXPORT(A, B, C, NAME)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) product_##NAME(                                                                          \
      C* __restrict__ c, const A* __restrict__ a, const B* __restrict__ b, const A* __restrict__ bias, int m, int n, int k, int batch,       \
      long long a_row, long long a_column, long long a_step, long long b_row, long long b_column, long long b_step, long long c_row,         \
      long long c_step, int add) {                                                                                                           \
    element(c, a, b, bias, m, n, k, batch, a_row, a_column, a_step, b_row, b_column, b_step, c_row, c_step, add);                            \
  }                                                                                                                                          \
  KERNEL(product_##NAME)
EXPORT(float, float, float, f32_f32_f32)
EXPORT(float, float, bf16, f32_f32_bf16)
EXPORT(float, bf16, float, f32_bf16_f32)
EXPORT(float, bf16, bf16, f32_bf16_bf16)
EXPORT(bf16, float, float, bf16_f32_f32)
EXPORT(bf16, float, bf16, bf16_f32_bf16)
EXPORT(bf16, bf16, float, bf16_bf16_f32)
EXPORT(bf16, bf16, bf16, bf16_bf16_bf16)
