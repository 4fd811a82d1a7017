// emulate/cuda.h - what a kernel source needs of CUDA, for a C++ compiler: one fiber a CUDA thread, one block at a time on a thread of the system.
//
// build.rs compiles every kernels/*.cu with this header included first. A warp-wide instruction is one primitive, the warp collective: each lane leaves
// a slot and waits, and the last lane to arrive runs a function over all slots. The runtime behind it is runtime.cpp.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#define MASQUE_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// A block never moves between threads of the system, so thread-local statics are block-local storage. Sanitizer builds run on one thread and use
// plain statics, so that red zones can stand around them.
#ifdef MASQUE_ONE_WORKER
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct uint3 { unsigned x, y, z; };
#define EMULATED_VECTOR(T, N, A, ...) struct alignas(A) N { T __VA_ARGS__; };
EMULATED_VECTOR(float, float2, 8, x, y)
EMULATED_VECTOR(float, float4, 16, x, y, z, w)
EMULATED_VECTOR(int, int2, 8, x, y)
EMULATED_VECTOR(int, int4, 16, x, y, z, w)
EMULATED_VECTOR(unsigned, uint2, 8, x, y)
EMULATED_VECTOR(unsigned, uint4, 16, x, y, z, w)
EMULATED_VECTOR(unsigned char, uchar4, 4, x, y, z, w)
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emulated {
struct Thread { uint3 tid; unsigned lane, warp; };
struct Context { uint3 bid; dim3 bdim, gdim; unsigned char* dynamic; };
extern constinit thread_local Thread* current;   // the CUDA thread whose fiber is running
extern constinit thread_local Context context;   // the block being run
void barrier(int votes, int* counted);             // __syncthreads and its counting forms
// Every lane named in mask calls this with its own slot; the last lane to arrive runs `f` once.
using Collective = void (*)(void* const* slot_of_lane, unsigned mask);
void warp_collective(unsigned mask, void* slot, Collective f);
// Ends the launch with this message; it never returns to the kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void cp_async(void* to, const void* from, unsigned bytes, unsigned valid);
void cp_commit();
void cp_wait(unsigned keep);

// A letter for each kind of parameter, compared with what the launch passes: p pointer, i and f four bytes, l eight.
template <class T> constexpr char letter() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_pointer_v<U>) return 'p';
  else if constexpr (std::is_same_v<U, float>) return 'f';
  else if constexpr (std::is_integral_v<U> && sizeof(U) == 4) return 'i';
  else {
    static_assert(std::is_integral_v<U> && sizeof(U) == 8, "a kernel takes pointers, int, float and long long");
    return 'l';
  }
}
template <auto F> struct Call;
template <class... A, void (*F)(A...)> struct Call<F> {
  static constexpr char letters[] = {letter<A>()..., 0};
  template <size_t... I> static void go(void* const* a, std::index_sequence<I...>) { F(*static_cast<std::remove_cv_t<A>*>(a[I])...); }
  static const char* run(void* const* a) {
    if (a) go(a, std::index_sequence_for<A...>{});
    return letters;
  }
};
}  // namespace emulated
#define threadIdx (::emulated::current->tid)
#define blockIdx (::emulated::context.bid)
#define blockDim (::emulated::context.bdim)
#define gridDim (::emulated::context.gdim)

// A C symbol for Rust, with the argument list of cuLaunchKernel; called without arguments it answers the letters of the parameters.
#define KERNEL(name) \
  extern "C" const char* masque_emulated_##name(void* const* a) { return ::emulated::Call<&name>::run(a); }
#define SHARED(type, name) type* name = reinterpret_cast<type*>(::emulated::context.dynamic)

inline void __syncthreads() { emulated::barrier(0, nullptr); }
inline int __syncthreads_count(int p) { int n; emulated::barrier(p != 0, &n); return n; }
inline int __syncthreads_or(int p) { return __syncthreads_count(p) != 0; }
inline void __syncwarp(unsigned m = ~0u) { emulated::warp_collective(m, nullptr, [](void* const*, unsigned) {}); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulated {
template <class T> struct Shuffle { T in, out; int from; };
template <class T> T shuffle(unsigned m, T v, int from) {
  Shuffle<T> s{v, v, from};
  warp_collective(m, &s, [](void* const* p, unsigned mask) {
    for (int l = 0; l < 32; l++)
      if (mask >> l & 1) {
        auto* me = static_cast<Shuffle<T>*>(p[l]);
        if (me->from < 0) continue;
        if (!(mask >> me->from & 1)) fail("a shuffle reads lane %d, which is not in the mask", me->from);
        me->out = static_cast<Shuffle<T>*>(p[me->from])->in;
      }
  });
  return s.out;
}
inline int lane() { return (int)current->lane; }
}  // namespace emulated
template <class T> inline T __shfl_sync(unsigned m, T v, int from, int w = 32) {
  int l = emulated::lane();
  return emulated::shuffle(m, v, (l & ~(w - 1)) | (from & (w - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  int l = emulated::lane(), s = l ^ x;
  return emulated::shuffle(m, v, (s & ~(w - 1)) > (l & ~(w - 1)) ? -1 : s);
}
template <class T> inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = emulated::lane();
  return emulated::shuffle(m, v, (l & (w - 1)) + (int)d >= w ? -1 : l + (int)d);
}
template <class T> inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = emulated::lane();
  return emulated::shuffle(m, v, (l & (w - 1)) < (int)d ? -1 : l - (int)d);
}
inline unsigned __ballot_sync(unsigned m, int pred) {
  struct S { int p; unsigned r; } s{pred, 0};
  emulated::warp_collective(m, &s, [](void* const* p, unsigned mask) {
    unsigned r = 0;
    for (int l = 0; l < 32; l++) if (mask >> l & 1 && static_cast<S*>(p[l])->p) r |= 1u << l;
    for (int l = 0; l < 32; l++) if (mask >> l & 1) static_cast<S*>(p[l])->r = r;
  });
  return s.r;
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }

// Blocks may run on several threads of the system.
template <class T> inline T atomicAdd(T* p, T v) {
  static_assert(std::is_integral_v<T>, "sums of floats in an order of chance are not used here");
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T> inline T atomicMax(T* p, T v) {
  T o = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (o < v && !__atomic_compare_exchange_n(p, &o, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return o;
}

struct __nv_bfloat16 { uint16_t v; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __bfloat162float(__nv_bfloat16 h) { return std::bit_cast<float>((uint32_t)h.v << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {  // to the nearest, ties to even
  uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {(uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __float2bfloat16(f); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16(a), __float2bfloat16(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {__bfloat162float(h.x), __bfloat162float(h.y)}; }

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int_as_float(int i) { return std::bit_cast<float>(i); }
inline int __float_as_int(float f) { return std::bit_cast<int>(f); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline float __uint_as_float(unsigned f) { return std::bit_cast<float>(f); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
