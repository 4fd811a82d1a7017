// regions.cu - numbers of the tokens of regions, a convolution's weight in the order of a region's tokens.   Definition: src/ops/regions/mod.rs
//
//   tokens_of     tokens [B, K side side] = the number of each token on the fine grid; kept [B, K], or null for all regions in raster order
//   arrange_taps  [O, C, taps] in raster order to [O, taps, C] in the order of tokens, or back
//
// Limit: latency; a weight is a few MB, of which an access reads or writes numbers that are `taps` apart, once a step.
#include "regions.cuh"

// A thread a token.
extern "C" __global__ void __launch_bounds__(256) tokens_of_u32(unsigned* __restrict__ tokens, const int* __restrict__ kept, int n, int present, int down,
                                                                int across, int side, int cell, unsigned* fault) {
  const int at = blockIdx.x * 256 + threadIdx.x;
  if (at >= n) return;
  const int each = side * side, p = at % each;
  const int region = Grid{down, across, present, kept, nullptr, nullptr}.region(at / each, fault);
  const int row = region / across * side + row_of(p, side, cell), column = region % across * side + column_of(p, side, cell);
  tokens[at] = (unsigned)(row * across * side + column);
}
KERNEL(tokens_of_u32)

namespace {

// A thread a number of y.
template <class S, class T>
__device__ __forceinline__ void arrange_taps(T* __restrict__ y, const S* __restrict__ x, int channels, int side, int cell, bool back, long long n) {
  const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
  if (at >= n) return;
  const int taps = side * side, size = taps * channels, inside = (int)(at % size);
  int from;
  if (back) {
    const int tap = inside % taps;
    from = token_of(tap / side, tap % side, side, cell) * channels + inside / taps;
  } else {
    const int p = inside / channels;
    from = inside % channels * taps + row_of(p, side, cell) * side + column_of(p, side, cell);
  }
  y[at] = from_f32<T>(to_f32(x[at - inside + from]));
}

}  // namespace

#define EXPORT(S, T, NAME)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) arrange_taps_##NAME(T* y, const S* x, int channels, int side, int cell, int back,        \
                                                                        long long n) {                                                       \
    arrange_taps(y, x, channels, side, cell, back != 0, n);                                                                                  \
  }                                                                                                                                          \
  KERNEL(arrange_taps_##NAME)
EXPORT(float, float, f32_f32)
EXPORT(bf16, bf16, bf16_bf16)
EXPORT(bf16, float, bf16_f32)
