// defects.cu - a correct kernel and copies of it with mistakes put in on purpose: what the emulated device and the sanitizers have to report.
//
//   defects NAME [late|early] [SEED]     prints "right", "wrong", or the message with which the launch ended
#include "common.cuh"
#include <string>
#include <vector>

constexpr int THREADS = 64, ROUNDS = 3;

// out[i] = sum over rounds of in[round][THREADS - 1 - i], copied asynchronously through one of two buffers.
template <bool AFTER_WAIT, bool WAIT, bool LOOP_END> __device__ void reversed(float* out, const float* in) {
  SHARED(float, buffer);
  float sum = 0.f;
  for (int r = 0; r < ROUNDS; r++) {
    if (threadIdx.x < THREADS / 4) cp_async16(buffer + 4 * threadIdx.x, in + r * THREADS + 4 * threadIdx.x);
    cp_async_commit();
    if (WAIT) cp_async_wait<0>();
    if (AFTER_WAIT) __syncthreads();
    sum += buffer[THREADS - 1 - threadIdx.x];
    if (LOOP_END) __syncthreads();
  }
  cp_async_wait<0>();
  out[threadIdx.x] = sum;
}
extern "C" __global__ void correct(float* out, const float* in) { reversed<true, true, true>(out, in); }
KERNEL(correct)
extern "C" __global__ void no_barrier_after_wait(float* out, const float* in) { reversed<false, true, true>(out, in); }
KERNEL(no_barrier_after_wait)
extern "C" __global__ void no_wait(float* out, const float* in) { reversed<true, false, true>(out, in); }
KERNEL(no_wait)
extern "C" __global__ void no_barrier_at_loop_end(float* out, const float* in) { reversed<true, true, false>(out, in); }
KERNEL(no_barrier_at_loop_end)
extern "C" __global__ void never_waited(float* out, const float* in) {
  SHARED(float, buffer);
  cp_async16(buffer, in);
  cp_async_commit();
  out[threadIdx.x] = 0.f;
}
KERNEL(never_waited)
extern "C" __global__ void half_a_warp_at_the_barrier(float* out, const float* in) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  else out[threadIdx.x] = warp_sum(in[threadIdx.x]);
}
KERNEL(half_a_warp_at_the_barrier)
extern "C" __global__ void lane_outside_its_mask(float* out, const float* in) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, in[threadIdx.x], 0); }
KERNEL(lane_outside_its_mask)
extern "C" __global__ void lane_ended(float* out, const float* in) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = warp_sum(in[threadIdx.x]);
}
KERNEL(lane_ended)
extern "C" __global__ void different_collectives(float* out, const float* in) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
  else __syncwarp();
}
KERNEL(different_collectives)
extern "C" __global__ void index_out_of_range(float* out, const float* in) {
  unsigned fault = 0;
  int i = threadIdx.x == 7 ? 99 : (int)threadIdx.x;
  out[threadIdx.x] = in_range(i, THREADS, &fault) ? in[i] : 0.f;
}
KERNEL(index_out_of_range)
extern "C" __global__ void misaligned_copy(float* out, const float* in) {
  SHARED(float, buffer);
  cp_async16(buffer, in + 1);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = buffer[0];
}
KERNEL(misaligned_copy)

extern "C" struct masque_emulated_launch { uint32_t grid[3], block[3], shared; int32_t early; uint64_t seed; };
using Entry = const char* (*)(void* const* args);
extern "C" int masque_emulated_block(Entry entry, void* const* args, const masque_emulated_launch* launch, uint64_t index, char* message, size_t room);

int main(int count, char** words) {
  const struct { const char* name; Entry entry; } kernels[] = {
      {"correct", masque_emulated_correct},
      {"too_little_shared_memory", masque_emulated_correct},
      {"no_barrier_after_wait", masque_emulated_no_barrier_after_wait},
      {"no_wait", masque_emulated_no_wait},
      {"no_barrier_at_loop_end", masque_emulated_no_barrier_at_loop_end},
      {"never_waited", masque_emulated_never_waited},
      {"half_a_warp_at_the_barrier", masque_emulated_half_a_warp_at_the_barrier},
      {"lane_outside_its_mask", masque_emulated_lane_outside_its_mask},
      {"lane_ended", masque_emulated_lane_ended},
      {"different_collectives", masque_emulated_different_collectives},
      {"index_out_of_range", masque_emulated_index_out_of_range},
      {"misaligned_copy", masque_emulated_misaligned_copy},
  };
  const std::string wanted = count > 1 ? words[1] : "";
  const uint64_t seed = count > 3 ? strtoull(words[3], nullptr, 10) : 0;
  const int early = seed ? 2 : count > 2 && !strcmp(words[2], "early");
  for (const auto& kernel : kernels) {
    if (wanted != kernel.name) continue;
    alignas(16) static float in[ROUNDS * THREADS], out[THREADS];
    for (int i = 0; i < ROUNDS * THREADS; i++) in[i] = (float)(i * 7 % 31);
    float *o = out;
    const float* x = in;
    void* args[] = {&o, &x};
    const unsigned shared = 4 * THREADS - (wanted == "too_little_shared_memory" ? 16 : 0);
    masque_emulated_launch launch{{1, 1, 1}, {THREADS, 1, 1}, shared, early, seed};
    char message[512] = {};
    if (masque_emulated_block(kernel.entry, args, &launch, 0, message, sizeof message)) return printf("%s\n", message), 0;
    bool right = true;
    for (int i = 0; i < THREADS; i++) {
      float sum = 0.f;
      for (int r = 0; r < ROUNDS; r++) sum += in[r * THREADS + THREADS - 1 - i];
      right = right && out[i] == sum;
    }
    return printf("%s\n", right ? "right" : "wrong"), 0;
  }
  return printf("there is no kernel %s\n", wanted.c_str()), 2;
}
