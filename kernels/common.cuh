// common.cuh - what kernels share: number types, vector loads and stores, reductions in a fixed order, and the instructions that need PTX.
//
// Each wrapper around PTX has two bodies, one for nvcc and one for the emulated device.
#pragma once
#ifndef MASQUE_EMULATED
#include <cuda_bf16.h>
#ifdef __CUDACC_RTC__  // compiled when the program runs: there are no C headers
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uint16_t = unsigned short;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <stdint.h>
#endif
#define KERNEL(name)
#define SHARED(type, name)                                               \
  extern __shared__ __align__(128) unsigned char masque_shared_memory[]; \
  type* name = reinterpret_cast<type*>(masque_shared_memory)
#endif

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_f32(unsigned char x) { return (float)x; }
template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return __float2bfloat16(x); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
// A bf16 is the upper half of an f32.
__device__ __forceinline__ float low_bf16(uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_bf16(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

// Eight consecutive numbers, in accesses of 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load8(float (&v)[8], const float* p) {
  float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
  v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
}
__device__ __forceinline__ void load8(float (&v)[8], const bf16* p) {
  uint4 a = *reinterpret_cast<const uint4*>(p);
  v[0] = low_bf16(a.x); v[1] = high_bf16(a.x); v[2] = low_bf16(a.y); v[3] = high_bf16(a.y);
  v[4] = low_bf16(a.z); v[5] = high_bf16(a.z); v[6] = low_bf16(a.w); v[7] = high_bf16(a.w);
}
__device__ __forceinline__ void store8(float* p, const float (&v)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
__device__ __forceinline__ void store8(bf16* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// The same number in all lanes, summed as a tree: the order depends on nothing.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
// Over the threads of a block, the same number in all of them. `scratch`: 32 floats of shared memory that nobody else uses meanwhile. All threads call it.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  v = warp_sum(v);
  __syncthreads();  // `scratch` may still be read from the time before
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  float all = 0.f;
  for (int w = 0; w < warps; w++) all += scratch[w];
  return all;
}
__device__ __forceinline__ float block_max(float v, float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  v = warp_max(v);
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  float all = scratch[0];
  for (int w = 1; w < warps; w++) all = fmaxf(all, scratch[w]);
  return all;
}

// Whether an index lies in 0..n. If not, the emulated device ends the launch with the numbers; a real one notes it in the kernel's cell `fault`, which is
// looked at whenever the program waits for the device, and the kernel goes on with index 0.
__device__ __forceinline__ bool in_range(int index, int n, unsigned* fault) {
  if (index >= 0 && index < n) return true;
#ifdef MASQUE_EMULATED
  (void)fault;
  emulated::fail("index %d is outside 0..%d", index, n);
#else
  atomicMax(fault, 1u);
  return false;
#endif
}

// 2^x by the special function unit, about 2 units in the last place; results below 2^-126 become 0.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef MASQUE_EMULATED
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Asynchronous copy of 16 bytes from global to shared memory; `valid` of them are read, zeros take the place of the rest.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int valid = 16) {
#ifdef MASQUE_EMULATED
  emulated::cp_async(shared, global, 16, (unsigned)valid);
#else
  unsigned s = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(s), "l"(global), "r"(valid) : "memory");
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#ifdef MASQUE_EMULATED
  emulated::cp_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// Waits until at most KEEP committed groups of this thread are on their way.
template <int KEEP> __device__ __forceinline__ void cp_async_wait() {
#ifdef MASQUE_EMULATED
  emulated::cp_wait(KEEP);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(KEEP) : "memory");
#endif
}

#ifdef MASQUE_EMULATED
namespace emulated {
template <bool TRANS> struct LoadMatrix { const unsigned char* row; uint32_t r[4]; };
template <bool TRANS> void load_matrices(void* const* p, unsigned mask) {
  if (mask != ~0u) fail("ldmatrix needs the whole warp");
  for (int l = 0; l < 32; l++) {
    auto* me = static_cast<LoadMatrix<TRANS>*>(p[l]);
    for (int m = 0; m < 4; m++) {
      uint16_t e[2];
      for (int h = 0; h < 2; h++) {
        int row = l / 4, col = 2 * (l % 4) + h;
        if (TRANS) std::swap(row, col);
        memcpy(&e[h], static_cast<LoadMatrix<TRANS>*>(p[8 * m + row])->row + 2 * col, 2);
      }
      me->r[m] = e[0] | (uint32_t)e[1] << 16;
    }
  }
}
struct Mma { uint32_t a[4], b[2]; float c[4]; };
// c[16 x 8] += a[16 x 16] b[16 x 8], fragments as mma.sync.m16n8k16 lays them out.
inline void multiply(void* const* p, unsigned mask) {
  if (mask != ~0u) fail("mma.sync needs the whole warp");
  auto low = [](uint32_t v) { return std::bit_cast<float>(v << 16); };
  auto high = [](uint32_t v) { return std::bit_cast<float>(v & 0xffff0000u); };
  float A[16][16], B[16][8];
  for (int l = 0; l < 32; l++) {
    auto* s = static_cast<Mma*>(p[l]);
    int g = l / 4, t = l % 4;
    for (int h = 0; h < 4; h++) {
      int row = g + 8 * (h & 1), col = 2 * t + 8 * (h >> 1);
      A[row][col] = low(s->a[h]);
      A[row][col + 1] = high(s->a[h]);
    }
    for (int h = 0; h < 2; h++) {
      B[2 * t + 8 * h][g] = low(s->b[h]);
      B[2 * t + 8 * h + 1][g] = high(s->b[h]);
    }
  }
  for (int r = 0; r < 16; r++) {
    float sum[8] = {};
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) sum[n] += A[r][k] * B[k][n];
    for (int n = 0; n < 8; n++) static_cast<Mma*>(p[(r & 7) * 4 + n / 2])->c[(r >> 3) * 2 + (n & 1)] += sum[n];
  }
}
}  // namespace emulated
#endif

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
template <bool TRANS> __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef MASQUE_EMULATED
  if ((uintptr_t)row & 15) emulated::fail("the address of a row for ldmatrix is not a multiple of 16");
  emulated::LoadMatrix<TRANS> s{(const unsigned char*)row, {}};
  emulated::warp_collective(~0u, &s, emulated::load_matrices<TRANS>);
  for (int i = 0; i < 4; i++) r[i] = s.r[i];
#else
  unsigned a = (unsigned)__cvta_generic_to_shared(row);
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
#endif
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MASQUE_EMULATED
  emulated::Mma s{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  emulated::warp_collective(~0u, &s, emulated::multiply);
  for (int i = 0; i < 4; i++) c[i] = s.c[i];
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
