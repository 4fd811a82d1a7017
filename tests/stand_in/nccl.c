// A stand-in for libnccl, as a part of cuda.c: groups of ranks that are threads of one process, each on a device of its own. A collective is done when all
// ranks have come to it, each on its stream, and checked to be the same for all.
//
// Words of MASQUE_STAND_IN:
//   nccl-old       a version that is too old
//   nccl-fails     every collective is refused
//   nccl-lost      a failure that shows only when it is asked for, and no collective is ever done
//   nccl-hangs     no collective is ever done

enum { MOST_RANKS = DEVICES, MOST_GROUPS = 64 };
typedef struct { char bytes[128]; } Id;
typedef struct Comm Comm;
typedef struct { Comm* comm; char* from; char* to; size_t count; int what, type, root, come; size_t number; } Exchange;  // what: 0 all-reduce, 1 reduce, 2 broadcast, 3 reduce-scatter, 4 all-gather
typedef struct { Id id; int world, joined; Comm* comms[MOST_RANKS]; Exchange* here[MOST_RANKS]; int count; size_t done; } Group;
struct Comm { Group* group; int rank, device, graphs, aborted; };
static Group groups[MOST_GROUPS];
static int group_count, ids, ended_well, ended_badly;
static __thread int depth, held;
static __thread struct { Stream* stream; Exchange exchange; } later[64];

// For tests: how communicators have ended.
int stand_in_ended_well(void) { return ended_well; }
int stand_in_ended_badly(void) { return ended_badly; }

int ncclGetVersion(int* v) { *v = word("nccl-old") ? 2804 : 22809; return 0; }
const char* ncclGetErrorString(int e) { return e == 5 ? "invalid usage" : e == 6 ? "remote process exited" : "an error of the stand-in"; }
const char* ncclGetLastError(Comm* c) { (void)c; return word("nccl-fails") ? "the stand-in refuses everything" : ""; }
int ncclGetUniqueId(Id* id) { memset(id, 0, sizeof *id); snprintf(id->bytes, sizeof id->bytes, "group %d", __sync_add_and_fetch(&ids, 1)); return 0; }
int ncclCommInitRank(Comm** comm, int world, Id id, int rank) {
  if (!current) return 1;
  if (world > MOST_RANKS || rank >= world) return 4;
  pthread_mutex_lock(&mutex);
  Group* group = groups;
  while (group < groups + group_count && memcmp(&group->id, &id, sizeof id)) group++;
  if (group == groups + group_count) { group_count++; group->id = id; group->world = world; }
  int wrong = group->world != world || group->comms[rank] ? 4 : 0;
  for (int i = 0; i < world && !wrong; i++)
    if (group->comms[i] && group->comms[i]->device == device()) wrong = 5;
  if (!wrong) {
    *comm = calloc(1, sizeof **comm);
    **comm = (Comm){.group = group, .rank = rank, .device = device()};
    group->comms[rank] = *comm;
    group->joined++;
  }
  pthread_mutex_unlock(&mutex);
  while (!wrong && *(volatile int*)&group->joined < world) usleep(200);
  return wrong;
}
int ncclCommDestroy(Comm* c) {
  while (*(volatile int*)&c->graphs) usleep(200);
  __sync_add_and_fetch(&ended_well, 1);
  return current ? 0 : 1;
}
int ncclCommAbort(Comm* c) {
  c->aborted = 1;
  while (*(volatile int*)&c->graphs) usleep(200);
  __sync_add_and_fetch(&ended_badly, 1);
  return 0;
}
int ncclCommGetAsyncError(Comm* c, int* e) { (void)c; *e = word("nccl-lost") ? 6 : 0; return 0; }

static int size_of_type(int type) { return type == 8 ? 8 : type == 9 ? 2 : type == 1 ? 1 : type == 7 || type == 3 ? 4 : 0; }
static double number(const char* p, int type, size_t i) {
  return type == 8 ? ((const double*)p)[i] : type == 3 ? ((const uint32_t*)p)[i] : type == 1 ? ((const uint8_t*)p)[i] : load(p, type == 7 ? 0 : 14, i);
}
static void put(char* p, int type, size_t i, double x) {
  if (type == 8) ((double*)p)[i] = x;
  else if (type == 3) ((uint32_t*)p)[i] = (uint32_t)x;
  else if (type == 1) ((uint8_t*)p)[i] = (uint8_t)x;
  else store(p, type == 7 ? 0 : 14, i, (float)x);
}
// Of numbers from `start` on, what each rank gave, into `to`.
static void sum(Group* g, size_t start, size_t count, char* to) {
  int type = g->here[0]->type;
  for (size_t i = 0; i < count; i++) {
    double all = 0;
    for (int r = 0; r < g->world; r++) all += number(g->here[r]->from, type, start + i);
    put(to, type, i, all);
  }
}
static void meet(Group* g) {
  Exchange* first = g->here[0];
  size_t size = size_of_type(first->type), bytes = first->count * size;
  char* all = malloc(bytes * g->world + 1);
  for (int r = 1; r < g->world; r++) {
    Exchange* e = g->here[r];
    if (e->what != first->what || e->count != first->count || e->type != first->type || e->root != first->root) {
      fprintf(stderr, "the ranks exchange different things\n");
      broken = FAILED;
    }
  }
  if (first->what < 2) sum(g, 0, first->count, all);
  if (first->what == 3) sum(g, 0, first->count * g->world, all);
  if (first->what == 2) memcpy(all, g->here[first->root]->from, bytes);
  if (first->what == 4)
    for (int r = 0; r < g->world; r++) memcpy(all + r * bytes, g->here[r]->from, bytes);
  for (int r = 0; r < g->world; r++) {
    size_t got = first->what == 4 ? bytes * g->world : first->what == 1 && r != first->root ? 0 : bytes;
    memcpy(g->here[r]->to, all + (first->what == 3 ? r * bytes : 0), got);
    // What a rank was not promised is spoilt.
    if (first->what == 3)
      for (int other = 0; other < g->world; other++)
        if (other != r) memset(g->here[r]->from + other * bytes, 0xff, bytes);
    if (got == 0) memset(g->here[r]->to, 0xff, bytes);
  }
  free(all);
}
// Whether an exchange is done. The last rank that comes to it does it for all.
static int exchanged(Work* work) {
  Exchange* e = (Exchange*)work->data;
  Comm* comm = e->comm;
  Group* g = comm->group;
  if (comm->aborted) return 1;
  if (word("nccl-hangs") || word("nccl-lost")) return 0;
  if (!e->come) {
    if (g->here[comm->rank]) return 0;
    e->come = 1;
    e->number = g->done;
    g->here[comm->rank] = e;
    if (++g->count == g->world) {
      meet(g);
      memset(g->here, 0, sizeof g->here);
      g->count = 0;
      g->done++;
    }
  }
  return g->done > e->number;
}
static void holds(List* graph, int more) {
  for (Work* work = graph->first; work; work = work->next)
    if (work->kind == 6) __sync_add_and_fetch(&((Exchange*)work->data)->comm->graphs, more);
}
static int hand_over(Stream* stream, Exchange* exchange) {
  Work work = {.kind = 6};
  _Static_assert(sizeof *exchange <= sizeof work.data, "room for an exchange");
  memcpy(work.data, exchange, sizeof *exchange);
  return add(stream, &work) ? 1 : 0;
}
static int exchange(Exchange e, Stream* stream) {
  if (word("nccl-fails")) return 3;
  size_t bytes = e.count * size_of_type(e.type), all = bytes * e.comm->group->world;
  if (!current || e.comm->device != device() || stream->device != device()) return 4;
  if (!bytes || !inside(e.from, e.what == 3 ? all : bytes) || !inside(e.to, e.what == 4 ? all : bytes)) return 4;
  if (!depth) return hand_over(stream, &e);
  if (held == 64) return 3;
  later[held].stream = stream;
  later[held++].exchange = e;
  return 0;
}
int ncclGroupStart(void) { depth++; return 0; }
int ncclGroupEnd(void) {
  if (!depth) return 5;
  if (--depth) return 0;
  int state = 0;
  for (int i = 0; i < held && !state; i++) state = hand_over(later[i].stream, &later[i].exchange);
  held = 0;
  return state;
}
int ncclAllReduce(void* from, void* to, size_t count, int type, int op, Comm* c, Stream* s) { return op ? 4 : exchange((Exchange){c, from, to, count, 0, type, 0, 0, 0}, s); }
int ncclReduce(void* from, void* to, size_t count, int type, int op, int root, Comm* c, Stream* s) { return op ? 4 : exchange((Exchange){c, from, to, count, 1, type, root, 0, 0}, s); }
int ncclBroadcast(void* from, void* to, size_t count, int type, int root, Comm* c, Stream* s) { return exchange((Exchange){c, from, to, count, 2, type, root, 0, 0}, s); }
int ncclReduceScatter(void* from, void* to, size_t count, int type, int op, Comm* c, Stream* s) { return op ? 4 : exchange((Exchange){c, from, to, count, 3, type, 0, 0, 0}, s); }
int ncclAllGather(void* from, void* to, size_t count, int type, Comm* c, Stream* s) { return exchange((Exchange){c, from, to, count, 4, type, 0, 0, 0}, s); }
