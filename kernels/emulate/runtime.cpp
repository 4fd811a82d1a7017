// runtime.cpp - fibers, barriers, warp collectives and asynchronous copies of the emulated device. Compiled once, never with TSan's instrumentation.
//
// A block runs inside one thread of the system. What one block needs (fibers with their stacks, the state of its warps) belongs to that thread and is kept
// from launch to launch. An error ends the block: the fiber that met it leaves a message and switches away for good.
#include "cuda.h"
#include <cstdarg>
#include <memory>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(MASQUE_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(MASQUE_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__)
extern "C" void masque_emulated_switch(void** save_sp, void* new_sp);
// Saved are the registers that a call preserves. Leaving by a jump and not by `ret` spares the return predictor.
__asm__(R"(
.text
.globl masque_emulated_switch
.type masque_emulated_switch,@function
masque_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size masque_emulated_switch,.-masque_emulated_switch
)");
#endif

namespace emulated {
constexpr size_t STACK = 64 << 10, PAGE = 4096;
enum State : uint8_t { READY, AT_BARRIER, AT_WARP, DONE };
struct Copy { void* to; const void* from; unsigned bytes, valid; };
struct Fiber {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t uc;
#endif
  State state = DONE;
  void* fake = nullptr;  // ASan's
  void* tsan = nullptr;
  unsigned char* stack = nullptr;
  Thread thread;
  std::vector<Copy> copies;     // asynchronous copies that have not landed
  std::vector<size_t> groups;   // where each committed group of them ends
};
// Happens-before edges go by the generation of a barrier: else a late thread would also inherit what early threads did after it, and races between
// them would go unseen. Two alternating variables are enough.
struct Warp { unsigned arrived = 0, mask = 0, exited = 0, generation = 0; void* slot[32]; Collective f = nullptr; char edge[2]; };
struct Bar { unsigned arrived = 0, generation = 0; int votes = 0, counted[2] = {0, 0}; char edge[2]; };

using Entry = const char* (*)(void* const* args);
struct Worker {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Bar bar;
  unsigned threads = 0, live = 0;
  Entry entry;
  void* const* args;
  uint64_t random = 0;
  int early = 0;                 // 0: copies land at the wait, 1: when issued, 2: either, by chance
  char* message = nullptr;
  size_t room = 0;
  bool failed = false;
#if defined(__x86_64__)
  void* main_sp = nullptr;
#else
  ucontext_t main_uc;
#endif
  void* main_tsan = nullptr;
  void* main_fake = nullptr;
  const void* main_low = nullptr;
  size_t main_size = 0;
  char block_edge;
  std::unique_ptr<unsigned char, void (*)(void*)> dynamic{nullptr, free};
  size_t dynamic_bytes = 0;
  uint64_t next() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
  ~Worker() {
    for (auto& x : fibers) {
#if defined(MASQUE_TSAN)
      if (x->tsan) __tsan_destroy_fiber(x->tsan);
#endif
      if (x->stack) munmap(x->stack - PAGE, STACK + PAGE);
    }
  }
};
constinit thread_local Thread* current = nullptr;
constinit thread_local Context context{};
static constinit thread_local Worker* W = nullptr;
// A fiber runs on the thread it was started on, but the compiler may not know: look W up afresh after a switch.
static thread_local std::unique_ptr<Worker> kept;

static void to_main(Fiber& x, bool final) {
  (void)final;
#if defined(MASQUE_ASAN)
  __sanitizer_start_switch_fiber(final ? nullptr : &x.fake, W->main_low, W->main_size);
#endif
#if defined(MASQUE_TSAN)
  __tsan_switch_to_fiber(W->main_tsan, 1 /* no happens-before edge */);
#endif
#if defined(__x86_64__)
  masque_emulated_switch(&x.sp, W->main_sp);
#else
  swapcontext(&x.uc, &W->main_uc);
#endif
#if defined(MASQUE_ASAN)
  __sanitizer_finish_switch_fiber(x.fake, &W->main_low, &W->main_size);
#endif
}
static void to_fiber(Fiber& x) {
  current = &x.thread;
#if defined(MASQUE_ASAN)
  __sanitizer_start_switch_fiber(&W->main_fake, x.stack, STACK);
#endif
#if defined(MASQUE_TSAN)
  __tsan_switch_to_fiber(x.tsan, 1);
#endif
#if defined(__x86_64__)
  masque_emulated_switch(&W->main_sp, x.sp);
#else
  swapcontext(&W->main_uc, &x.uc);
#endif
#if defined(MASQUE_ASAN)
  __sanitizer_finish_switch_fiber(W->main_fake, nullptr, nullptr);
#endif
}
static Fiber& self() { return *W->fibers[current->tid.x + context.bdim.x * (current->tid.y + context.bdim.y * current->tid.z)]; }

static void describe(const char* format, va_list list) {
  int n = vsnprintf(W->message, W->room, format, list);
  if (n < 0 || (size_t)n >= W->room) return;
  const uint3 &b = context.bid;
  if (current) snprintf(W->message + n, W->room - n, ", in block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, current->tid.x, current->tid.y, current->tid.z);
  else snprintf(W->message + n, W->room - n, ", in block (%u, %u, %u)", b.x, b.y, b.z);
}
void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  describe(format, list);
  va_end(list);
  W->failed = true;
  to_main(self(), true);
  __builtin_unreachable();
}
static void failed_block(const char* format, ...) {
  va_list list;
  va_start(list, format);
  describe(format, list);
  va_end(list);
  W->failed = true;
}

static void release_barrier() {
  Bar& bar = W->bar;
  if (!bar.arrived || bar.arrived != W->live) return;
  bar.counted[bar.generation & 1] = bar.votes;
  bar.arrived = 0;
  bar.votes = 0;
  bar.generation++;
  for (unsigned i = 0; i < W->threads; i++)
    if (W->fibers[i]->state == AT_BARRIER) W->fibers[i]->state = READY;
}
static void start() {
#if defined(MASQUE_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &W->main_low, &W->main_size);
#endif
  Worker* w = W;
#if defined(MASQUE_TSAN)
  __tsan_acquire(&w->block_edge);
#endif
  w->entry(w->args);
  Fiber& x = self();
  if (!x.copies.empty()) fail("a thread ended before its asynchronous copies were waited for");
#if defined(MASQUE_TSAN)
  __tsan_release(&w->block_edge);
#endif
  x.state = DONE;
  w->live--;
  Warp& warp = w->warps[x.thread.warp];
  warp.exited |= 1u << x.thread.lane;
  if (warp.arrived) fail("a lane ended while others of its warp wait for it in a warp collective");
  release_barrier();
  to_main(x, true);
  __builtin_unreachable();
}
void barrier(int votes, int* counted) {
  Fiber& x = self();
  Bar& bar = W->bar;
  const unsigned generation = bar.generation & 1;
  x.state = AT_BARRIER;
  bar.arrived++;
  bar.votes += votes;
#if defined(MASQUE_TSAN)
  __tsan_release(&bar.edge[generation]);
#endif
  release_barrier();
  if (x.state == AT_BARRIER) to_main(x, false);
#if defined(MASQUE_TSAN)
  __tsan_acquire(&bar.edge[generation]);
#endif
  if (counted) *counted = bar.counted[generation];
}
void warp_collective(unsigned mask, void* slot, Collective f) {
  Fiber& x = self();
  Warp& s = W->warps[x.thread.warp];
  const unsigned bit = 1u << x.thread.lane, there = std::min(32u, W->threads - x.thread.warp * 32);
  if (!(mask & bit)) fail("a lane calls a warp collective whose mask %#x does not name it", mask);
  mask &= there == 32 ? ~0u : (1u << there) - 1;
  if (mask & s.exited) fail("the mask %#x of a warp collective names a lane that has ended", mask);
  if (s.arrived && (s.mask != mask || s.f != f)) fail("lanes of one warp meet in different warp collectives, or in masks that differ");
  s.mask = mask;
  s.f = f;
  s.arrived |= bit;
  s.slot[x.thread.lane] = slot;
  char* edge = &s.edge[s.generation & 1];
  (void)edge;
#if defined(MASQUE_TSAN)
  __tsan_release(edge);
#endif
  if (s.arrived == mask) {
#if defined(MASQUE_TSAN)
    __tsan_acquire(edge);
#endif
    f(s.slot, mask);
    s.arrived = 0;
    s.generation++;
    for (unsigned l = 0; l < 32; l++)
      if (mask >> l & 1 && l != x.thread.lane) W->fibers[x.thread.warp * 32 + l]->state = READY;
#if defined(MASQUE_TSAN)
    __tsan_release(edge);
#endif
  } else {
    x.state = AT_WARP;
    to_main(x, false);
#if defined(MASQUE_TSAN)
    __tsan_acquire(edge);
#endif
  }
}

// The hardware may copy at any moment between issue and wait. Copies at the wait show a missing wait, copies at the issue a buffer that is overwritten
// while it is still being read; each hides the other's mistake, so tests run both.
static void land(const Copy& c) {
  if (c.valid) memcpy(c.to, c.from, c.valid);
  if (c.valid < c.bytes) memset((char*)c.to + c.valid, 0, c.bytes - c.valid);
}
void cp_async(void* to, const void* from, unsigned bytes, unsigned valid) {
  if (((uintptr_t)to | (valid ? (uintptr_t)from : 0)) & (bytes - 1)) fail("the address of an asynchronous copy is not a multiple of its %u bytes", bytes);
  if (W->early == 2 ? (W->next() & 1) != 0 : W->early == 1) land({to, from, bytes, valid});
  else self().copies.push_back({to, from, bytes, valid});
}
void cp_commit() {
  Fiber& x = self();
  x.groups.push_back(x.copies.size());
}
void cp_wait(unsigned keep) {
  Fiber& x = self();
  if (x.groups.size() <= keep) return;
  size_t g = x.groups.size() - keep, end = x.groups[g - 1];
  for (size_t i = 0; i < end; i++) land(x.copies[i]);
  x.copies.erase(x.copies.begin(), x.copies.begin() + (long)end);
  x.groups.erase(x.groups.begin(), x.groups.begin() + (long)g);
  for (auto& v : x.groups) v -= end;
}

static bool prepare(Fiber& x, unsigned i) {
  if (!x.stack) {
    auto* p = (unsigned char*)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return false;
    mprotect(p, PAGE, PROT_NONE);  // running over a stack is a fault, not a wrong number
    x.stack = p + PAGE;
#if defined(MASQUE_TSAN)
    x.tsan = __tsan_create_fiber(0);
#endif
  }
#if defined(MASQUE_ASAN)
  __asan_unpoison_memory_region(x.stack, STACK);
#endif
  x.state = READY;
  x.fake = nullptr;
  x.copies.clear();
  x.groups.clear();
  x.thread.tid = {i % context.bdim.x, i / context.bdim.x % context.bdim.y, i / (context.bdim.x * context.bdim.y)};
  x.thread.lane = i & 31;
  x.thread.warp = i >> 5;
#if defined(__x86_64__)
  // Staggered, else the tops of all stacks fall into the same few sets of the cache.
  auto** top = (void**)(((uintptr_t)(x.stack + STACK) & ~(uintptr_t)63) - i * 7 % 64 * 64);
  *--top = nullptr;  // keeps the stack pointer at 8 modulo 16 where `start` begins
  *--top = (void*)&start;
  for (int k = 0; k < 6; k++) *--top = nullptr;
  x.sp = top;
#else
  getcontext(&x.uc);
  x.uc.uc_stack.ss_sp = x.stack;
  x.uc.uc_stack.ss_size = STACK;
  x.uc.uc_link = nullptr;
  makecontext(&x.uc, start, 0);
#endif
  return true;
}
static void run_block(Worker& w) {
  w.live = w.threads;
  w.bar = Bar{};
  const unsigned warps = (w.threads + 31) / 32;
  w.warps.assign(warps, Warp{});
  for (unsigned i = 0; i < w.threads; i++)
    if (!prepare(*w.fibers[i], i)) return failed_block("no memory for the stack of a thread");
#if defined(MASQUE_TSAN)
  __tsan_acquire(&w.block_edge);
  __tsan_release(&w.block_edge);
#endif
  unsigned lanes[32], order[32];
  for (unsigned i = 0; i < warps; i++) order[i] = i;
  auto mix = [&](unsigned* a, unsigned n) { for (unsigned i = n; i > 1; i--) std::swap(a[i - 1], a[w.next() % i]); };
  while (w.live) {
    bool moved = false;
    if (w.random) mix(order, warps);
    for (unsigned k = 0; k < warps; k++) {
      const unsigned base = order[k] * 32, n = std::min(32u, w.threads - base);
      for (;;) {
        bool any = false;
        for (unsigned l = 0; l < n; l++) lanes[l] = l;
        if (w.random) mix(lanes, n);
        for (unsigned l = 0; l < n; l++) {
          Fiber& x = *w.fibers[base + lanes[l]];
          if (x.state != READY) continue;
          to_fiber(x);
          current = nullptr;
          if (w.failed) return;
          any = true;
        }
        if (!any) break;
        moved = true;
        if (w.random && (w.next() & 3) == 0) break;  // sometimes another warp overtakes
      }
    }
    if (!moved && w.live) {
      for (unsigned i = 0; i < w.threads && !current; i++)
        if (w.fibers[i]->state == AT_BARRIER || w.fibers[i]->state == AT_WARP) current = &w.fibers[i]->thread;
      const bool bar = current && self().state == AT_BARRIER;
      failed_block("deadlock: a thread waits %s that others never reach", bar ? "at a __syncthreads()" : "in a warp collective");
      current = nullptr;
      return;
    }
  }
}
}  // namespace emulated

// How a launch runs. seed 0: threads and blocks in their order; otherwise in an order of chance. early: see cp_async.
extern "C" struct masque_emulated_launch { uint32_t grid[3], block[3], shared; int32_t early; uint64_t seed; };

// Runs block `index` of a launch on the calling thread: 0, or 1 and a message.
extern "C" int masque_emulated_block(emulated::Entry entry, void* const* args, const masque_emulated_launch* launch, uint64_t index, char* message, size_t room) {
  using namespace emulated;
  if (!kept) kept = std::make_unique<Worker>();
  Worker& w = *kept;
  W = &w;
  const uint32_t *g = launch->grid, *b = launch->block;
  w.threads = b[0] * b[1] * b[2];
  w.entry = entry;
  w.args = args;
  w.random = launch->seed ? (launch->seed * 0xD1342543DE82EF95ull + index * 0x9E3779B97F4A7C15ull) | 1 : 0;
  w.early = launch->early;
  w.message = message;
  w.room = room;
  w.failed = false;
  while (w.fibers.size() < w.threads) w.fibers.push_back(std::make_unique<Fiber>());
#if defined(MASQUE_TSAN)
  w.main_tsan = __tsan_get_current_fiber();
#endif
  const size_t padded = (launch->shared + 127) / 128 * 128 + 128;
  if (w.dynamic_bytes < padded) {
    w.dynamic.reset((unsigned char*)aligned_alloc(128, padded));
    w.dynamic_bytes = padded;
  }
  context = {{(unsigned)(index % g[0]), (unsigned)(index / g[0] % g[1]), (unsigned)(index / ((uint64_t)g[0] * g[1]))}, {b[0], b[1], b[2]}, {g[0], g[1], g[2]}, w.dynamic.get()};
  // Filled with what is no number, so that a read of unset memory shows.
  memset(w.dynamic.get(), 0xff, launch->shared);
#if defined(MASQUE_ASAN)
  __asan_poison_memory_region(w.dynamic.get() + launch->shared, w.dynamic_bytes - launch->shared);
#endif
  run_block(w);
#if defined(MASQUE_TSAN)
  __tsan_acquire(&w.block_edge);
#endif
#if defined(MASQUE_ASAN)
  __asan_unpoison_memory_region(w.dynamic.get(), w.dynamic_bytes);
#endif
  W = nullptr;
  current = nullptr;
  return w.failed;
}
