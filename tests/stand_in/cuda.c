// A stand-in for libcuda, libcublasLt, libnvrtc and libnccl (nccl.c), to test the code that calls them on a machine without a GPU. Device memory is the
// host's, kernels are the emulated ones, and everything put on a stream is done as late as CUDA allows: when somebody waits for it, be it on another stream.
//
// Stand-ins for environments: MASQUE_STAND_IN is a list of words
//   no-init, no-device, old-driver, old-device     what the driver says when it is asked
//   no-bias, no-blas                               what cuBLASLt has no algorithm for
//   nccl-...                                       see nccl.c
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, NO_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600, FAILED = 719, UNJOINED = 904, ISOLATION = 905, CAPTURED = 907, UNKNOWN = 999 };
enum { MEMORY_BYTES = 1 << 30, SHARED_OPTIN = 227 << 10, DEVICES = 2 };

static int word(const char* w) {
  const char* all = getenv("MASQUE_STAND_IN");
  return all && strstr(all, w);
}

// ---- kernels: told by the test, which holds their emulated form
typedef const char* (*Entry)(void* const*);
typedef struct { uint32_t grid[3], block[3], shared; int32_t early; uint64_t seed; } RawLaunch;
typedef int (*RunBlock)(Entry, void* const*, const RawLaunch*, uint64_t, char*, size_t);
typedef struct { const char* name; Entry entry; int dynamic; } Function;
static Function functions[4096];
static int function_count;
static RunBlock run_block;
void stand_in_kernels(RunBlock run) { run_block = run; }
void stand_in_kernel(const char* name, Entry entry) { functions[function_count++] = (Function){strdup(name), entry, 48 << 10}; }

// ---- memory
typedef struct { char* start; size_t bytes; } Range;
static Range ranges[1 << 16];
static int range_count;
static size_t taken;
static int inside(const void* at, size_t bytes) {
  for (int i = 0; i < range_count; i++)
    if ((char*)at >= ranges[i].start && (char*)at + bytes <= ranges[i].start + ranges[i].bytes) return 1;
  return 0;
}

// ---- a queue of work for each stream; a recording takes what would go there
typedef struct Work {
  struct Work* next;
  int kind;  // 0 kernel, 1 copy, 2 fill, 3 call, 4 event, 5 wait for an event, 6 exchange
  Function* function;
  RawLaunch launch;
  uint64_t cells[32];
  int count;
  void *to, *from;
  size_t bytes;
  int byte;
  void (*call)(void*);
  char data[256];
} Work;
typedef struct { Work *first, *last; } List;
// What one stream records, and others that wait for its events. They have to be waited for before it ends.
typedef struct { List graph; } Recording;
typedef struct Stream { List queue; Recording* recording; int origin, device, unjoined; } Stream;
// How often it was put on a stream, which the last time, and how often that was reached.
typedef struct { double at; size_t put, reached; Stream* stream; Recording* recording; } Event;
static Stream* streams[1024];
static int stream_count;
static int broken;
static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static __thread void* current;
static char contexts[DEVICES];
static int device(void) { return (int)((char*)current - contexts); }

static int bound(void) { return broken ? broken : current ? OK : NO_CONTEXT; }
#define NEEDS_CONTEXT do { int state = bound(); if (state) return state; } while (0)
// A failure of work that is under way: from now on every call answers with it.
void stand_in_break(void) { broken = 700; }

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}
static void push(List* list, const Work* work) {
  Work* copy = malloc(sizeof *copy);
  *copy = *work;
  copy->next = NULL;
  if (list->last) list->last->next = copy; else list->first = copy;
  list->last = copy;
}
static int add(Stream* stream, const Work* work) {
  NEEDS_CONTEXT;
  pthread_mutex_lock(&mutex);
  if (stream->recording) stream->unjoined = !stream->origin;
  push(stream->recording ? &stream->recording->graph : &stream->queue, work);
  pthread_mutex_unlock(&mutex);
  return OK;
}
static int exchanged(Work* work);
static int step(Stream* stream);
// Whether it is done; what waits for others is not.
static int perform(Work* work) {
  switch (work->kind) {
    case 0: {
      void* args[32];
      for (int i = 0; i < work->count; i++) args[i] = &work->cells[i];
      uint64_t blocks = (uint64_t)work->launch.grid[0] * work->launch.grid[1] * work->launch.grid[2];
      for (uint64_t i = 0; i < blocks && !broken; i++) {
        char message[512];
        if (run_block(work->function->entry, args, &work->launch, i, message, sizeof message)) {
          fprintf(stderr, "%s: %s\n", work->function->name, message);
          broken = FAILED;
        }
      }
      break;
    }
    case 1: memmove(work->to, work->from, work->bytes); break;
    case 2: memset(work->to, work->byte, work->bytes); break;
    case 3: work->call(work->data); break;
    case 4: ((Event*)work->to)->at = now(); ((Event*)work->to)->reached++; break;
    case 5: return ((Event*)work->to)->reached >= work->bytes;
    case 6: return exchanged(work);
  }
  return 1;
}
// Does the next piece of work of a stream, or one that it waits for; 0 if others have to come first, or there is nothing.
static int step(Stream* stream) {
  Work* work = stream->queue.first;
  if (!work || broken) return 0;
  if (!perform(work)) return work->kind == 5 && ((Event*)work->to)->stream != stream && step(((Event*)work->to)->stream);
  stream->queue.first = work->next;
  if (!work->next) stream->queue.last = NULL;
  free(work);
  return 1;
}
// Does what is on a stream: all of it, or until an event.
static int drain(Stream* stream, Event* until) {
  for (;;) {
    pthread_mutex_lock(&mutex);
    int over = broken || (until ? until->reached >= until->put : !stream->queue.first);
    int went_on = over || step(stream);
    pthread_mutex_unlock(&mutex);
    if (over) return broken;
    if (!went_on) usleep(200);
  }
}
// Does what is on all streams of this thread's device.
static int drain_all(void) {
  for (int i = 0; i < stream_count; i++)
    if (streams[i]->device == device()) drain(streams[i], NULL);
  return broken;
}

// ---- the driver
int cuGetErrorName(int e, const char** s) { *s = e == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : e == FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : e == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_STAND_IN"; return OK; }
int cuGetErrorString(int e, const char** s) { static __thread char text[32]; sprintf(text, "error number %d", e); *s = text; return OK; }
int cuInit(unsigned flags) { (void)flags; return word("no-init") ? UNKNOWN : word("no-device") ? NO_DEVICE : OK; }
int cuDriverGetVersion(int* v) { *v = word("old-driver") ? 12040 : 13000; return OK; }
int cuDeviceGetCount(int* n) { *n = DEVICES; return OK; }
int cuDeviceGet(int* d, int i) { *d = i; return i >= 0 && i < DEVICES ? OK : INVALID_DEVICE; }
int cuDeviceGetName(char* s, int n, int d) { snprintf(s, n, "stand-in %d", d); return OK; }
int cuDeviceTotalMem_v2(size_t* n, int d) { (void)d; *n = MEMORY_BYTES; return OK; }
int cuDeviceGetAttribute(int* v, int what, int d) {
  (void)d;
  switch (what) {
    case 75: *v = word("old-device") ? 7 : 9; break;
    case 76: *v = 0; break;
    case 97: *v = SHARED_OPTIN; break;
    case 16: *v = 132; break;
    case 38: *v = 1 << 20; break;
    case 115: *v = 1; break;
    default: return INVALID;
  }
  return OK;
}
int cuDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:%02X:00.0", d + 26); return OK; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = &contexts[d]; return OK; }
int cuDevicePrimaryCtxRelease_v2(int d) { (void)d; return OK; }
int cuCtxGetCurrent(void** c) { *c = current; return OK; }
int cuCtxSetCurrent(void* c) { current = c; return OK; }
int cuStreamCreate(Stream** s, unsigned flags) {
  (void)flags;
  NEEDS_CONTEXT;
  *s = calloc(1, sizeof **s);
  (*s)->device = device();
  pthread_mutex_lock(&mutex);
  streams[stream_count++] = *s;
  pthread_mutex_unlock(&mutex);
  return OK;
}
// Neither streams nor events are freed: what still has to be done may name them.
int cuStreamDestroy_v2(Stream* s) { (void)s; return OK; }
int cuStreamSynchronize(Stream* s) { NEEDS_CONTEXT; return s->recording ? INVALID : drain(s, NULL); }
int cuStreamIsCapturing(Stream* s, int* status) { *status = s->recording != NULL; return bound(); }
int cuStreamBeginCapture_v2(Stream* s, int mode) {
  NEEDS_CONTEXT;
  if (mode != 2 || s->recording) return INVALID;
  s->recording = calloc(1, sizeof *s->recording);
  s->origin = 1;
  return OK;
}
int cuStreamEndCapture(Stream* s, List** graph) {
  NEEDS_CONTEXT;
  Recording* recording = s->recording;
  if (!recording || !s->origin) return INVALID;
  int unjoined = 0;
  for (int i = 0; i < stream_count; i++)
    if (streams[i]->recording == recording) {
      unjoined |= streams[i]->unjoined;
      streams[i]->recording = NULL;
      streams[i]->origin = streams[i]->unjoined = 0;
    }
  *graph = NULL;
  if (unjoined) return UNJOINED;
  *graph = malloc(sizeof **graph);
  **graph = recording->graph;
  return OK;
}
int cuStreamWaitEvent(Stream* s, Event* e, unsigned flags) {
  NEEDS_CONTEXT;
  if (flags) return INVALID;
  if (!e->recording) return s->recording ? ISOLATION : add(s, &(Work){.kind = 5, .to = e, .bytes = e->put});
  if (s->recording && s->recording != e->recording) return INVALID;
  if (!s->recording) {
    s->recording = e->recording;
    s->unjoined = 1;
  } else if (s->origin) {
    e->stream->unjoined = 0;
  }
  return OK;
}
static void holds(List* graph, int more);
int cuGraphInstantiateWithFlags(List** exec, List* graph, unsigned long long flags) {
  (void)flags;
  *exec = calloc(1, sizeof **exec);
  for (Work* work = graph->first; work; work = work->next) push(*exec, work);
  holds(*exec, 1);
  return OK;
}
static int forget(List* list) {
  for (Work* work = list->first; work;) {
    Work* next = work->next;
    free(work);
    work = next;
  }
  free(list);
  return OK;
}
int cuGraphDestroy(List* graph) { return forget(graph); }
int cuGraphExecDestroy(List* exec) { holds(exec, -1); return forget(exec); }
int cuGraphUpload(List* exec, Stream* s) { (void)exec; (void)s; return bound(); }
int cuGraphLaunch(List* exec, Stream* s) {
  for (Work* work = exec->first; work; work = work->next) {
    int state = add(s, work);
    if (state) return state;
  }
  return OK;
}
int cuEventCreate(Event** e, unsigned flags) { (void)flags; NEEDS_CONTEXT; *e = calloc(1, sizeof **e); return OK; }
int cuEventDestroy_v2(Event* e) { (void)e; return OK; }
int cuEventRecord(Event* e, Stream* s) {
  NEEDS_CONTEXT;
  e->stream = s;
  e->recording = s->recording;
  if (s->recording) return OK;
  e->put++;
  return add(s, &(Work){.kind = 4, .to = e});
}
int cuEventSynchronize(Event* e) { NEEDS_CONTEXT; return e->recording ? CAPTURED : e->put ? drain(e->stream, e) : OK; }
// Every look lets a little be done.
int cuEventQuery(Event* e) {
  NEEDS_CONTEXT;
  if (e->recording) return CAPTURED;
  pthread_mutex_lock(&mutex);
  if (e->reached < e->put) step(e->stream);
  int state = broken ? broken : e->reached < e->put ? NOT_READY : OK;
  pthread_mutex_unlock(&mutex);
  return state;
}
int cuEventElapsedTime_v2(float* ms, Event* a, Event* b) { *ms = (float)(b->at - a->at); return OK; }
int cuMemAlloc_v2(uint64_t* p, size_t bytes) {
  NEEDS_CONTEXT;
  pthread_mutex_lock(&mutex);
  int refused = bytes == 0 ? INVALID : taken + bytes > MEMORY_BYTES || range_count == 1 << 16 ? OUT_OF_MEMORY : OK;
  if (!refused) {
    char* start = aligned_alloc(256, (bytes + 255) / 256 * 256);
    ranges[range_count++] = (Range){start, bytes};
    taken += bytes;
    *p = (uint64_t)start;
  }
  pthread_mutex_unlock(&mutex);
  return refused;
}
int cuMemFree_v2(uint64_t p) {
  NEEDS_CONTEXT;
  drain_all();
  pthread_mutex_lock(&mutex);
  int state = INVALID;
  for (int i = 0; i < range_count && state; i++)
    if (ranges[i].start == (char*)p) {
      taken -= ranges[i].bytes;
      free(ranges[i].start);
      ranges[i] = ranges[--range_count];
      state = OK;
    }
  pthread_mutex_unlock(&mutex);
  return state;
}
int stand_in_held(void) { return range_count; }
int cuMemHostAlloc(void** p, size_t bytes, unsigned flags) { NEEDS_CONTEXT; if (flags != 1) return INVALID; *p = aligned_alloc(256, bytes); return OK; }
int cuMemFreeHost(void* p) { drain_all(); free(p); return OK; }
int cuMemsetD8Async(uint64_t p, unsigned char byte, size_t n, Stream* s) { return inside((void*)p, n) ? add(s, &(Work){.kind = 2, .to = (void*)p, .byte = byte, .bytes = n}) : INVALID; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, Stream* s) { return inside((void*)to, n) && !s->recording ? add(s, &(Work){.kind = 1, .to = (void*)to, .from = (void*)from, .bytes = n}) : INVALID; }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, Stream* s) { return inside((void*)from, n) && !s->recording ? add(s, &(Work){.kind = 1, .to = to, .from = (void*)from, .bytes = n}) : INVALID; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, Stream* s) { return inside((void*)from, n) && inside((void*)to, n) ? add(s, &(Work){.kind = 1, .to = (void*)to, .from = (void*)from, .bytes = n}) : INVALID; }
int cuModuleLoadData(void** m, const void* image) { NEEDS_CONTEXT; *m = malloc(1); return image ? OK : INVALID; }
int cuModuleUnload(void* m) { free(m); return OK; }
int cuModuleGetFunction(Function** f, void* m, const char* name) {
  (void)m;
  for (int i = 0; i < function_count; i++)
    if (!strcmp(functions[i].name, name)) { *f = &functions[i]; return OK; }
  return NOT_FOUND;
}
int cuFuncLoad(Function* f) { (void)f; return bound(); }
static size_t size_of(Function* f, size_t i) {
  const char* letters = f->entry(NULL);
  return i >= strlen(letters) ? 0 : letters[i] == 'p' || letters[i] == 'l' ? 8 : 4;
}
int cuFuncGetParamInfo(Function* f, size_t i, size_t* offset, size_t* size) { *offset = 0; *size = size_of(f, i); return *size ? OK : INVALID; }
int cuFuncGetAttribute(int* v, int what, Function* f) {
  (void)f;
  *v = what == 0 ? 256 : what == 4 ? 32 : what == 6 ? 90 : 0;
  return OK;
}
int cuFuncSetAttribute(Function* f, int what, int v) { if (what != 8 || v > SHARED_OPTIN) return INVALID; f->dynamic = v; return OK; }
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, Function* f, int block, size_t shared, unsigned flags) { (void)f; (void)block; (void)shared; (void)flags; *n = 8; return OK; }
int cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream* s, void** args, void** extra) {
  if (extra || !run_block || (int)shared > f->dynamic) return INVALID;
  Work work = {.kind = 0, .function = f, .launch = {{gx, gy, gz}, {bx, by, bz}, shared, 0, 0}};
  for (size_t size; (size = size_of(f, work.count)); work.count++) memcpy(&work.cells[work.count], args[work.count], size);
  return add(s, &work);
}

// ---- cuBLASLt: column by column, f32 and bf16, sums in double
enum { NOT_SUPPORTED = 15 };
typedef struct { int compute, trans[2], epilogue, bias_type; uint64_t bias; } Desc;
typedef struct { int type; uint64_t rows, cols; int64_t ld; int count; int64_t step; } Layout;
typedef struct { uint64_t workspace; uint32_t scheme, align[4]; } Wishes;
typedef struct { Desc desc; Layout a, b, c; float alpha, beta; const char *pa, *pb; char* pc; } Product;
typedef struct { uint64_t algo[8]; size_t workspace; int state; float waves; int reserved[4]; } Found;
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtCreate(void** h) { if (!current) return 1; *h = malloc(1); return OK; }
int cublasLtDestroy(void* h) { free(h); return OK; }
int cublasLtMatmulDescCreate(Desc** d, int compute, int scale) { *d = calloc(1, sizeof **d); (*d)->compute = compute; (*d)->epilogue = 1; return scale == 0 ? OK : 7; }
int cublasLtMatmulDescDestroy(Desc* d) { free(d); return OK; }
int cublasLtMatmulDescSetAttribute(Desc* d, int what, const void* v, size_t size) {
  switch (what) {
    case 3: case 4: if (size != 4) return 7; memcpy(&d->trans[what - 3], v, 4); return OK;
    case 7: if (size != 4) return 7; memcpy(&d->epilogue, v, 4); return OK;
    case 8: if (size != 8) return 7; memcpy(&d->bias, v, 8); return OK;
    case 26: if (size != 4) return 7; memcpy(&d->bias_type, v, 4); return OK;
  }
  return 7;
}
int cublasLtMatrixLayoutCreate(Layout** l, int type, uint64_t rows, uint64_t cols, int64_t ld) { *l = malloc(sizeof **l); **l = (Layout){type, rows, cols, ld, 1, 0}; return ld >= (int64_t)rows ? OK : 7; }
int cublasLtMatrixLayoutDestroy(Layout* l) { free(l); return OK; }
int cublasLtMatrixLayoutSetAttribute(Layout* l, int what, const void* v, size_t size) {
  if (what == 5 && size == 4) { memcpy(&l->count, v, 4); return OK; }
  if (what == 6 && size == 8) { memcpy(&l->step, v, 8); return OK; }
  return 7;
}
int cublasLtMatmulPreferenceCreate(Wishes** w) { *w = calloc(1, sizeof **w); return OK; }
int cublasLtMatmulPreferenceDestroy(Wishes* w) { free(w); return OK; }
int cublasLtMatmulPreferenceSetAttribute(Wishes* w, int what, const void* v, size_t size) {
  if (what == 1 && size == 8) { memcpy(&w->workspace, v, 8); return OK; }
  if (what == 3 && size == 4) { memcpy(&w->scheme, v, 4); return OK; }
  if (what >= 5 && what <= 8 && size == 4) { memcpy(&w->align[what - 5], v, 4); return OK; }
  return 7;
}
int cublasLtMatmulAlgoGetHeuristic(void* h, Desc* d, Layout* a, Layout* b, Layout* c, Layout* out, Wishes* w, int asked, Found* found, int* count) {
  (void)h;
  uint64_t m = d->trans[0] ? a->cols : a->rows, k = d->trans[0] ? a->rows : a->cols, n = d->trans[1] ? b->rows : b->cols;
  int fits = k == (d->trans[1] ? b->cols : b->rows) && c->rows == m && c->cols == n && a->count == b->count && a->count == c->count;
  int types = a->type == b->type && (a->type == 14 ? c->type == 14 || c->type == 0 : a->type == 0 && c->type == 0);
  int bias = d->epilogue == 4;
  *count = 0;
  if (!fits || c != out || asked != 1 || w->scheme != 2 || w->workspace != 32 << 20 || (d->compute != 68 && d->compute != 77)) return 7;
  if (!types || word("no-blas") || (bias && (word("no-bias") || d->bias_type != c->type))) return NOT_SUPPORTED;
  // The alignments are part of the algorithm, so that the product can check them.
  *found = (Found){.algo = {w->align[0], w->align[1], w->align[2], w->align[3]}};
  *count = 1;
  return OK;
}
static float load(const char* p, int type, int64_t i) {
  if (type == 0) return ((const float*)p)[i];
  uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static void store(char* p, int type, int64_t i, float x) {
  if (type == 0) { ((float*)p)[i] = x; return; }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  ((uint16_t*)p)[i] = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static void multiply(void* data) {
  Product* p = data;
  const Desc* d = &p->desc;
  uint64_t inner = d->trans[0] ? p->a.rows : p->a.cols;
  for (int image = 0; image < p->c.count; image++)
    for (uint64_t col = 0; col < p->c.cols; col++)
      for (uint64_t row = 0; row < p->c.rows; row++) {
        double sum = 0;
        for (uint64_t l = 0; l < inner; l++) {
          int64_t ia = image * p->a.step + (d->trans[0] ? row * p->a.ld + l : l * p->a.ld + row);
          int64_t ib = image * p->b.step + (d->trans[1] ? l * p->b.ld + col : col * p->b.ld + l);
          sum += (double)load(p->pa, p->a.type, ia) * load(p->pb, p->b.type, ib);
        }
        int64_t at = image * p->c.step + col * p->c.ld + row;
        double all = p->alpha * sum;
        if (p->beta != 0) all += p->beta * load(p->pc, p->c.type, at);
        if (d->epilogue == 4) all += load((const char*)d->bias, d->bias_type, row);
        store(p->pc, p->c.type, at, (float)all);
      }
}
int cublasLtMatmul(void* h, Desc* d, const float* alpha, const char* a, Layout* la, const char* b, Layout* lb, const float* beta, const char* c, Layout* lc, char* out, Layout* lout, const uint64_t* algo, void* workspace, size_t bytes, Stream* s) {
  (void)h;
  if (broken) return 13;
  if (!inside(workspace, bytes) || c != out || lc != lout || !current) return 7;
  if ((uint64_t)a % algo[0] || (uint64_t)b % algo[1] || (uint64_t)c % algo[2]) return 7;
  Work work = {.kind = 3, .call = multiply};
  Product product = {*d, *la, *lb, *lc, *alpha, *beta, a, b, out};
  _Static_assert(sizeof product <= sizeof work.data, "room for a product");
  memcpy(work.data, &product, sizeof product);
  return add(s, &work) ? 13 : OK;
}

// ---- NVRTC: takes everything, gives one byte
int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; return OK; }
int nvrtcGetNumSupportedArchs(int* n) { *n = 2; return OK; }
int nvrtcGetSupportedArchs(int* archs) { archs[0] = 80; archs[1] = 90; return OK; }
int nvrtcCreateProgram(void** p, const char* source, const char* name, int headers, const char* const* texts, const char* const* names) { (void)source; (void)name; (void)headers; (void)texts; (void)names; *p = malloc(1); return OK; }
int nvrtcDestroyProgram(void** p) { free(*p); return OK; }
int nvrtcCompileProgram(void* p, int n, const char* const* options) { (void)p; return n == 3 && !strcmp(options[0], "--gpu-architecture=sm_90a") ? OK : 6; }
int nvrtcGetCUBINSize(void* p, size_t* n) { (void)p; *n = 1; return OK; }
int nvrtcGetCUBIN(void* p, char* code) { (void)p; *code = 1; return OK; }

#include "nccl.c"
