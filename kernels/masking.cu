// masking.cu - orders of a few hundred numbers an image: random masks from noise, blocks, disjoint views, the most attended patches.   Definition: src/masking/
//
//   random_mask   shuffle [B, L] = the patches in the order of noise [B, L]; restore [B, L] = its inverse; kept [B, K] = the first K of shuffle;
//                 hidden [B, L] = restore >= K
//   disjoint_order, disjoint_masks: the same four for M views of each image, later ones made of the first by permutations; see src/masking/disjoint.rs
//   block_keys    keys [B, L]: a number a patch, 1 and more under the blocks that the numbers behind the first L of noise [B, L + 4 TRIES] draw; see
//                 src/masking/blockwise.rs
//   most_attended saliency [B, N] = mean over heads of rows [B, H, e + N] without their first e columns; kept [B, K] = the K largest
//
//   version  idea                                                                                                             B=256 L=196
//   v1       every number counts how many come before it: L^2 comparisons out of shared memory, one barrier                   not run on a GPU
//   v2       bitonic sort in shared memory: L log^2 L comparisons, log^2 L / 2 barriers; far ahead for thousands of patches   not run on a GPU
//
// A number and its index are one 64-bit key, so no two keys are equal, ties go to the smaller index, and every version gives the same order. What is no
// number comes last.
//
// Limit: latency. 16 L + 4 K bytes an image are nothing; the barriers of the sort are a few microseconds, as long as a launch.
#include "common.cuh"

namespace {

typedef unsigned long long Key;

// Unsigned integers in the order of the floats, in rising or falling order; adding 0 makes -0 the equal of +0.
__device__ __forceinline__ uint32_t ordered(float x, bool falling) {
  if (x != x) return 0xffffffffu;
  uint32_t u = __float_as_uint(x + 0.f);
  u = u & 0x80000000u ? ~u : u | 0x80000000u;
  return falling ? ~u : u;
}
__device__ __forceinline__ Key key(uint32_t order, int index) { return (Key)order << 32 | (uint32_t)index; }

// Sorts `padded` keys, a power of two. A thread owns pairs that are `step` apart; the bit `run` says in which direction a pair is put in order. A barrier
// stands before each step and after the last.
__device__ __forceinline__ void sort(Key* keys, int padded) {
  for (int run = 2; run <= padded; run *= 2)
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int p = threadIdx.x; p < padded / 2; p += blockDim.x) {
        int low = 2 * p - (p & (step - 1)), high = low + step;
        Key a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  __syncthreads();
}

struct Mask {
  unsigned *shuffle, *restore, *kept;
  float* hidden;
  // Patch i has this place in the order of its image.
  __device__ __forceinline__ void put(int image, int i, int place, int l, int keep) {
    const size_t at = (size_t)image * l;
    shuffle[at + place] = (unsigned)i;
    restore[at + i] = (unsigned)place;
    hidden[at + i] = place < keep ? 0.f : 1.f;
    if (place < keep) kept[(size_t)image * keep + place] = (unsigned)i;
  }
};

// e^x for |x| < 0.61: nine terms of its series.
__device__ __forceinline__ float exponential(float x) {
  float sum = 1.f;
  for (int n = 8; n > 0; n--) sum = fmaf(x / (float)n, sum, 1.f);
  return sum;
}
// One of the places 0 to last.
__device__ __forceinline__ int place_of(float u, int last) { return min((int)(u * (float)(last + 1)), last); }

}  // namespace

// Block: an image, a thread a patch (in turns). Shared: L keys, all written before the barrier.
extern "C" __global__ void __launch_bounds__(1024) random_mask_v1_f32(unsigned* __restrict__ shuffle, unsigned* __restrict__ restore,
                                                                      unsigned* __restrict__ kept, float* __restrict__ hidden,
                                                                      const float* __restrict__ noise, int l, int keep) {
  SHARED(Key, keys);
  const float* row = noise + (size_t)blockIdx.x * l;
  for (int i = threadIdx.x; i < l; i += blockDim.x) keys[i] = key(ordered(row[i], false), i);
  __syncthreads();
  for (int i = threadIdx.x; i < l; i += blockDim.x) {
    const Key mine = keys[i];
    int place = 0;
    for (int j = 0; j < l; j++) place += keys[j] < mine;  // all lanes read one address: a broadcast
    Mask{shuffle, restore, kept, hidden}.put(blockIdx.x, i, place, l, keep);
  }
}
KERNEL(random_mask_v1_f32)

// Block: an image. Shared: `padded` keys, L rounded up to a power of two; the padding comes last.
extern "C" __global__ void __launch_bounds__(1024) random_mask_v2_f32(unsigned* __restrict__ shuffle, unsigned* __restrict__ restore,
                                                                      unsigned* __restrict__ kept, float* __restrict__ hidden,
                                                                      const float* __restrict__ noise, int l, int keep, int padded) {
  SHARED(Key, keys);
  const float* row = noise + (size_t)blockIdx.x * l;
  for (int i = threadIdx.x; i < padded; i += blockDim.x) keys[i] = i < l ? key(ordered(row[i], false), i) : ~0ull;
  sort(keys, padded);
  for (int r = threadIdx.x; r < l; r += blockDim.x) Mask{shuffle, restore, kept, hidden}.put(blockIdx.x, (int)(uint32_t)keys[r], r, l, keep);
}
KERNEL(random_mask_v2_f32)

// A thread takes place i of a view's order, and of what the next view starts from. states [M, U]: before each view the units, as places of the first view's
// order, that no view has hidden, `seen` of them, then the others; the first view writes its own order there. p [seen], q [U - seen] permute both parts.
extern "C" __global__ void __launch_bounds__(256) disjoint_order_u32(unsigned* __restrict__ orders, unsigned* states, const int* __restrict__ p,
                                                                     const int* __restrict__ q, int view, int units, int keep, int seen, int fresh,
                                                                     unsigned* fault) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= units) return;
  unsigned* order = orders + (size_t)view * units;
  unsigned* next = states + (size_t)view * units;
  if (view == 0) {
    order[i] = next[i] = (unsigned)i;
    return;
  }
  const unsigned* state = next - units;
  const int hidden = units - seen, left = seen - fresh, again = hidden - (keep - left);
  auto of = [&](const int* by, int n, int first, int j) { return state[first + (in_range(by[j], n, fault) ? by[j] : 0)]; };
  auto P = [&](int j) { return of(p, seen, 0, j); };
  auto Q = [&](int j) { return of(q, hidden, seen, j); };
  order[i] = i < left ? P(fresh + i) : i < keep ? Q(again + i - left) : i < keep + fresh ? P(i - keep) : Q(i - keep - fresh);
  next[i] = i < left ? P(fresh + i) : i < left + hidden ? Q(i - left) : P(i - left - hidden);
}
KERNEL(disjoint_order_u32)

// A thread takes a place of the order of an image's view: rows of all images' first views, then of all second ones. first [B, U]: the units of each image in
// the order of their noise. Places are those of all kept units' first patches, of their second ones and so on, then those of the hidden units.
extern "C" __global__ void __launch_bounds__(256) disjoint_masks_u32(unsigned* __restrict__ shuffle, unsigned* __restrict__ restore,
                                                                     unsigned* __restrict__ kept, float* __restrict__ hidden,
                                                                     const int* __restrict__ first, const int* __restrict__ orders, int images, int units,
                                                                     int keep, int side, int across, int n, unsigned* fault) {
  const int at = blockIdx.x * 256 + threadIdx.x, each = side * side, patches = units * each;
  if (at >= n) return;
  const int row = at / patches, place = at % patches, hide = units - keep, behind = place - keep * each;
  const int member = behind < 0 ? place % keep : keep + behind % hide, corner = behind < 0 ? place / keep : behind / hide;
  const int ordered = orders[(size_t)(row / images) * units + member];
  const int unit = first[(size_t)(row % images) * units + (in_range(ordered, units, fault) ? ordered : 0)];
  int patch = (unit / across * side + corner / side) * (across * side) + unit % across * side + corner % side;
  if (!in_range(patch, patches, fault)) patch = 0;
  Mask{shuffle, restore, kept, hidden}.put(row, patch, place, patches, keep * each);
}
KERNEL(disjoint_masks_u32)

// Block: an image; a thread takes the mean over the heads, in their order, of every blockDim-th patch. patch_keys: each head's row is first divided by what
// it gives to patches at all. raster: the chosen ones in the order of their indices, by a second sort. Shared: `padded` keys, N rounded up to a power of two.
extern "C" __global__ void __launch_bounds__(1024) most_attended_f32(unsigned* __restrict__ kept, float* __restrict__ saliency,
                                                                     const float* __restrict__ rows, int n, int heads, int extra, int keep,
                                                                     int padded, int patch_keys, int raster) {
  SHARED(Key, keys);
  const int width = extra + n;
  const float* row = rows + (size_t)blockIdx.x * heads * width;
  for (int i = threadIdx.x; i < padded; i += blockDim.x) {
    float mean = 0.f;
    for (int h = 0; h < heads && i < n; h++) {
      const float* head = row + (size_t)h * width;
      float apart = 0.f;
      for (int j = 0; j < extra; j++) apart += head[j];
      mean += patch_keys ? head[extra + i] / (1.f - apart) : head[extra + i];
    }
    mean /= (float)heads;
    if (i < n) saliency[(size_t)blockIdx.x * n + i] = mean;
    keys[i] = i < n ? key(ordered(mean, true), i) : ~0ull;
  }
  sort(keys, padded);
  if (raster) {
    for (int r = threadIdx.x; r < padded; r += blockDim.x) keys[r] = r < keep ? (Key)(uint32_t)keys[r] : ~0ull;
    sort(keys, padded);
  }
  for (int r = threadIdx.x; r < keep; r += blockDim.x) kept[(size_t)blockIdx.x * keep + r] = (uint32_t)keys[r];
}
KERNEL(most_attended_f32)

// Thread: an image, block after block, as they depend on each other. Patches under a block are those whose key is 1 or more.
extern "C" __global__ void __launch_bounds__(32) block_keys_f32(float* __restrict__ keys, const float* __restrict__ noise, int batch, int rows,
                                                                int columns, int hide, int least, int tries) {
  const float STRETCH = 0.6019864f;
  const int image = blockIdx.x * blockDim.x + threadIdx.x, l = rows * columns;
  if (image >= batch) return;
  float* own = keys + (size_t)image * l;
  const float* numbers = noise + (size_t)image * (l + 4 * tries);
  for (int i = 0; i < l; i++) own[i] = numbers[i];
  numbers += l;
  int left = hide, failures = 0;
  for (int t = 0; t < tries && left > 0 && failures < 10; t++, numbers += 4) {
    failures++;
    const float side = sqrtf(fmaf(numbers[0], (float)left - (float)least, (float)least)), x = fmaf(numbers[1], 2.f * STRETCH, -STRETCH);
    const int height = (int)fmaf(side, exponential(x), 0.5f), width = (int)fmaf(side, exponential(-x), 0.5f);
    if (height >= rows || width >= columns) continue;
    const int top = place_of(numbers[2], rows - height), first = place_of(numbers[3], columns - width);
    int fresh = 0;
    for (int r = top; r < top + height; r++)
      for (int c = first; c < first + width; c++) fresh += own[r * columns + c] < 1.f;
    if (fresh == 0 || fresh > left) continue;
    for (int r = top; r < top + height; r++)
      for (int c = first; c < first + width; c++)
        if (own[r * columns + c] < 1.f) own[r * columns + c] += 1.f;
    left -= fresh;
    failures = 0;
  }
}
KERNEL(block_keys_f32)
