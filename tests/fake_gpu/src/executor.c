// SPDX-License-Identifier: Apache-2.0
// Streams as queues, and who runs what is in them.
//
// There is no thread here that stands for the GPU. What is queued runs in the threads that call:
// at once (FAKECUDA_ORDER=now), or as late as it can (late:SEED), when something waits, in an
// order drawn from all that streams, events and graphs allow.
//
// CUDA C++ Programming Guide, "Streams" and "Events": items of one stream run in order; an item
// waits for the points that it was given when it was queued, and for nothing else.
//
// Host functions may be Python's and do real work. So: only one thread runs items at a time,
// without the lock while a host function runs. Meanwhile launches and queries go on, and whoever
// must wait sleeps, without Python's interpreter lock: the function needs it.
#include "fake.h"

#include <unistd.h>

enum { MOST_QUEUED = 1 << 16 };  // then a launch runs some: memory is finite

static unsigned long next_number = 1;
static long num_queued;
static bool in_host_function;            // of any thread
static __thread const Item *running;     // the host function that this thread is in
static __thread bool no_host_functions;  // they are not run in this thread now

// ------------------------------------------------------------------ chance

typedef enum {
  UNIFORM, NEEDED_ONLY, NEEDED_LAST, ONE_STARVES, ONE_GOES_ON, NEWEST, OLDEST, NUM_STRATEGIES,
} Strategy;

static struct {
  bool seeded;
  uint64_t state;
  Strategy strategy;
  uint64_t choices_left;  // until the next strategy
  Stream *victim, *last;
} order;

static void seed_order(uint64_t seed) {
  memset(&order, 0, sizeof order);
  order.seeded = true;
  order.state = seed;
  order.strategy = NUM_STRATEGIES;
}

static uint64_t chance(uint64_t below) {  // splitmix64
  if (!order.seeded) seed_order(options()->seed);
  uint64_t z = order.state += 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return (z ^ z >> 31) % below;
}

// From now on draw as late:SEED does from the beginning.
API void fakecuda_seed(unsigned long seed) {
  LOCK;
  seed_order(seed);
}

// ------------------------------------------------------------------ queues

// Those already reached, too: races.py asks what was ordered, whatever came about.
void add_point(Points *points, Point point) {
  if (!point.stream || !point.position) return;
  points->points = realloc(points->points, (size_t)(points->count + 1) * sizeof *points->points);
  points->points[points->count++] = point;
}

bool reached(Point point) {
  return !point.stream || point.stream->done >= point.position;
}

static Point end_of(Stream *stream) {
  return (Point){stream, stream->queued};
}

// CUDA Runtime API, "Stream synchronization behavior": the legacy default stream waits for all
// blocking streams, and they for it.
static void add_legacy_points(Points *after, Stream *stream) {
  if (stream == &legacy_stream) {
    for (int i = 0; i < num_streams; i++)
      if (is_blocking(streams[i])) add_point(after, end_of(streams[i]));
  } else if (is_blocking(stream)) {
    add_point(after, end_of(&legacy_stream));
  }
}

static void prepare_graph(Item *item) {
  const Exec *exec = item->work.exec;
  size_t room = (size_t)exec->num_nodes + 1;
  item->nodes_left = exec->num_nodes;
  item->missing = calloc(room, sizeof *item->missing);
  item->ready = calloc(room, sizeof *item->ready);
  for (int i = 0; i < exec->num_nodes; i++) {
    item->missing[i] = exec->nodes[i]->num_after;
    if (!item->missing[i]) item->ready[item->num_ready++] = i;
  }
}

static void trace_queue(const Item *item) {
  if (!tracing()) return;
  const Work *work = &item->work;
  const Stream *stream = item->stream;
  char what[1024] = "";
  switch (work->kind) {
    case KERNEL:
      snprintf(what, sizeof what, "grid=%u,%u,%u name=%s", work->grid[0], work->grid[1],
               work->grid[2], work->kernel->name);
      break;
    case COPY:
    case SET:
      snprintf(what, sizeof what, "to=%p from=%p bytes=%zu", work->to, work->from, work->bytes);
      break;
    case RECORD:
    case WAIT:
      snprintf(what, sizeof what, "event=%p record=%lu", (void *)work->event, work->record);
      break;
    case GRAPH:
      describe_graph(work->exec, what, sizeof what);
      break;
    case HOST_FUNCTION:
    case EMPTY:
      break;
  }
  char after[1024] = "";
  int used = 0;
  for (int i = 0; i < item->num_after && used + 40 < (int)sizeof after; i++)
    used += snprintf(after + used, sizeof after - (size_t)used, "%s%d:%lu", i ? "," : "",
                     item->after[i].stream->id, item->after[i].position);
  trace("queue n=%lu stream=%d position=%lu green=%llu after=%s kind=%c %s", item->number,
        stream->id, item->position, green_id(stream), after, work->kind, what);
}

static void run_all_ready(void);
static bool run_one(Points goals);

unsigned long enqueue(Stream *stream, Work work, Points after) {
  add_legacy_points(&after, stream);
  Item *item = calloc(1, sizeof *item);
  if (work.kind == GRAPH) {
    // Graph launches of one executable graph do not overlap (Runtime API, cudaGraphLaunch).
    add_point(&after, work.exec->last_launch);
    work.exec->last_launch = (Point){stream, stream->queued + 1};
    work.exec->references++;
  }
  item->work = work;
  item->stream = stream;
  item->position = ++stream->queued;
  item->number = next_number++;
  item->after = after.points;
  item->num_after = after.count;
  if (work.kind == GRAPH) prepare_graph(item);
  trace_queue(item);
  if (stream->tail) stream->tail->next = item;
  else stream->head = item;
  stream->tail = item;
  num_queued++;
  unsigned long number = item->number;
  if (!options()->late) {
    // torch's allocator records and queries events while it holds its lock. A host function of
    // Python would wait there for the interpreter, and its holder for that lock.
    no_host_functions = work.kind == RECORD;
    run_all_ready();
    no_host_functions = false;
  } else
    while (num_queued > MOST_QUEUED && !in_host_function && run_one((Points){0})) {}
  return number;
}

static bool is_ready(const Item *item) {
  for (int i = 0; i < item->num_after; i++)
    if (!reached(item->after[i])) return false;
  return true;
}

void free_work(Work *work) {
  free(work->arguments);
  free(work->staged);
  free(work->expected);
  free(work->python);
  if (work->event) drop_event(work->event);
  if (work->exec) drop_exec(work->exec);
}

// ------------------------------------------------------------------ running

// How long streams are busy, for FAKECUDA_KERNEL_US.
static void occupy(Stream *stream, double seconds) {
  double now = now_s();
  stream->busy_until = (stream->busy_until > now ? stream->busy_until : now) +
                       seconds * slowness(stream);
}

unsigned long running_item(void) {
  return running ? running->number : 0;
}

int running_node(void) {
  return running && running->work.kind == GRAPH ? running->node : -1;
}

static void call_host_function(const Item *item, cudaHostFn_t function, void *data) {
  counters.host_functions++;
  const Item *outer = running;
  running = item;
  in_host_function = true;
  pthread_mutex_unlock(&fake_lock);
  function(data);
  pthread_mutex_lock(&fake_lock);
  in_host_function = false;
  running = outer;
}

static void run_work(Work *work, Item *item) {
  Stream *stream = item->stream;
  switch (work->kind) {
    case KERNEL:
      if (work->fault) device_fault = work->fault;
      occupy(stream, options()->kernel_s);
      run_kernel(work);
      break;
    case COPY:
    case SET:
      run_copy(work, item);
      break;
    case HOST_FUNCTION:
      call_host_function(item, work->function, work->data);
      break;
    case RECORD:
      if (work->event->record == work->record) {
        double now = now_s();
        work->event->at = stream->busy_until > now ? stream->busy_until : now;
      }
      break;
    case WAIT:
      if (work->event->record == work->record && work->event->at > stream->busy_until)
        stream->busy_until = work->event->at;
      break;
    case GRAPH:
    case EMPTY:
      break;
  }
}

static void trace_run(const Item *item, const Work *work, int node) {
  if (!tracing() || work->kind == RECORD || work->kind == WAIT) return;
  char accesses[4096] = "";
  describe_accesses(work, accesses, sizeof accesses);
  if (node >= 0) trace("run n=%lu node=%d kind=%c%s", item->number, node, work->kind, accesses);
  else trace("run n=%lu kind=%c%s", item->number, work->kind, accesses);
}

static void finish(Item *item) {
  Stream *stream = item->stream;
  stream->head = item->next;
  if (!stream->head) stream->tail = NULL;
  stream->done++;
  num_queued--;
  free_work(&item->work);
  free(item->after);
  free(item->missing);
  free(item->ready);
  free(item);
}

// One node that all it depends on has run before. Captured nodes are in such an order.
static void run_node(Item *item) {
  Exec *exec = item->work.exec;
  int at = options()->late ? (int)chance((uint64_t)item->num_ready) : 0;
  int index = options()->late ? item->ready[at] : exec->num_nodes - item->nodes_left;
  item->nodes_left--;
  item->ready[at] = item->ready[--item->num_ready];
  for (int i = 0; i < exec->num_followers[index]; i++) {
    int follower = exec->followers[index][i];
    if (!--item->missing[follower]) item->ready[item->num_ready++] = follower;
  }
  Work *work = &exec->nodes[index]->work;
  item->node = index;
  trace_run(item, work, index);
  run_work(work, item);
}

static void run_head(Stream *stream) {
  Item *item = stream->head;
  if (!item->started) {
    item->started = true;
    for (int i = 0; i < item->num_after; i++) {
      double busy = item->after[i].stream->busy_until;
      if (item->work.kind != WAIT && busy > stream->busy_until) stream->busy_until = busy;
    }
    if (item->work.kind == GRAPH && item->work.fault) device_fault = item->work.fault;
    trace_run(item, &item->work, -1);
  }
  if (item->work.kind == GRAPH) {
    if (item->nodes_left) run_node(item);
    if (item->nodes_left) return;
  } else {
    run_work(&item->work, item);
  }
  finish(item);
}

// ------------------------------------------------------------------ whose turn it is

static Stream *stream_at(int index) {  // 0 is the legacy default stream
  return index ? streams[index - 1] : &legacy_stream;
}

static bool calls_host(const Work *work) {
  if (work->kind != GRAPH) return work->kind == HOST_FUNCTION;
  for (int i = 0; i < work->exec->num_nodes; i++)
    if (calls_host(&work->exec->nodes[i]->work)) return true;
  return false;
}

static bool can_run(const Stream *stream) {
  if (!stream->head || is_held(stream) || !is_ready(stream->head)) return false;
  return !no_host_functions || !calls_host(&stream->head->work);
}

// A stream whose head must run before `point` is reached, and can.
static Stream *needed_for(Point point) {
  for (;;) {
    Item *head = point.stream->head;
    if (!head) impossible("a stream waits for what was never queued");
    int i = 0;
    while (i < head->num_after && reached(head->after[i])) i++;
    if (i == head->num_after) return point.stream;
    point = head->after[i];
  }
}

static Stream *needed_for_any(Points goals) {
  for (int i = 0; i < goals.count; i++)
    if (!reached(goals.points[i])) return needed_for(goals.points[i]);
  return NULL;
}

// Some strategies go to extremes, where chance alone would seldom lead: for a few choices, or
// for those of several decode steps.
static void choose_strategy(void) {
  order.strategy = (Strategy)chance(NUM_STRATEGIES);
  order.choices_left = chance(16ull << chance(9));
  order.victim = NULL;
  uint64_t seen = 0;
  for (int i = 0; i <= num_streams; i++)
    if (stream_at(i)->head && !chance(++seen)) order.victim = stream_at(i);
}

static Stream *choose_late(Points goals) {
  if (order.strategy == NUM_STRATEGIES || !order.seeded || !order.choices_left--)
    choose_strategy();
  Strategy strategy = order.strategy;
  Stream *needed = needed_for_any(goals);
  if (needed && !can_run(needed)) needed = NULL;
  if (strategy == NEEDED_ONLY && needed) return needed;
  if (strategy == ONE_GOES_ON && order.last && can_run(order.last)) return order.last;
  Stream *chosen = NULL;
  uint64_t seen = 0;
  for (int i = 0; i <= num_streams; i++) {
    Stream *stream = stream_at(i);
    if (!can_run(stream)) continue;
    if (strategy == NEEDED_LAST && stream == needed) continue;
    if (strategy == ONE_STARVES && stream == order.victim) continue;
    seen++;
    bool better = !chosen;
    if (chosen && strategy == NEWEST) better = stream->head->number > chosen->head->number;
    else if (chosen && strategy == OLDEST) better = stream->head->number < chosen->head->number;
    else if (chosen) better = !chance(seen);
    if (better) chosen = stream;
  }
  if (!chosen && strategy == ONE_STARVES && order.victim && can_run(order.victim))
    chosen = order.victim;
  if (!chosen) chosen = needed;
  return order.last = chosen;
}

static Stream *choose_now(void) {
  Stream *chosen = NULL;
  for (int i = 0; i <= num_streams; i++) {
    Stream *stream = stream_at(i);
    if (!can_run(stream)) continue;
    if (!chosen || stream->head->number < chosen->head->number) chosen = stream;
  }
  return chosen;
}

static bool run_one(Points goals) {
  Stream *chosen = options()->late ? choose_late(goals) : choose_now();
  if (chosen) run_head(chosen);
  return chosen != NULL;
}

static void run_all_ready(void) {
  while (num_queued && !in_host_function && run_one((Points){0})) {}
}

// ------------------------------------------------------------------ waiting

// Sleep without any lock. Locked before and after.
static void pause_s(double seconds) {
  pthread_mutex_unlock(&fake_lock);
  void *python = let_go_of_python();
  usleep((useconds_t)(1e6 * seconds));
  take_python(python);
  pthread_mutex_lock(&fake_lock);
}

static bool all_reached(Points goals) {
  for (int i = 0; i < goals.count; i++)
    if (!reached(goals.points[i])) return false;
  return true;
}

// Nothing can run but what faults.c holds.
static void wait_for_release(void) {
  bool held = false;
  for (int i = 0; i <= num_streams; i++) held |= stream_at(i)->head && is_held(stream_at(i));
  if (!held) impossible("nothing can run");
  pause_s(1e-3);
  read_fault_file();
}

cudaError_t wait_for_points(Points goals) {
  cudaError_t error = cudaSuccess;
  while (!error && !all_reached(goals)) {
    // Runtime API, cudaLaunchHostFunc: a host function must not call CUDA.
    if (running) error = cudaErrorNotPermitted;
    else if (in_host_function) pause_s(50e-6);
    else if (!run_one(goals)) wait_for_release();
  }
  return error ? error : device_fault;
}

void sleep_until(double time_s) {
  if (!options()->kernel_s) return;
  for (double left; (left = time_s - now_s()) > 0;) pause_s(left > 1e-3 ? 1e-3 : 50e-6);
}

void trace_sync(Point point) {
  if (point.stream && point.position)
    trace("sync stream=%d position=%lu", point.stream->id, point.position);
}

cudaError_t wait_for_stream(Stream *stream) {
  Points goals = {0};
  Point end = end_of(stream);
  add_point(&goals, end);
  cudaError_t error = wait_for_points(goals);
  free(goals.points);
  sleep_until(stream->busy_until);
  trace_sync(end);
  return error;
}

cudaError_t wait_for_device(void) {
  Points goals = {0};
  for (int i = 0; i <= num_streams; i++) add_point(&goals, end_of(stream_at(i)));
  cudaError_t error = wait_for_points(goals);
  double last = 0;
  for (int i = 0; i <= num_streams; i++)
    if (stream_at(i)->busy_until > last) last = stream_at(i)->busy_until;
  sleep_until(last);
  for (int i = 0; i < goals.count; i++) trace_sync(goals.points[i]);
  free(goals.points);
  return error;
}

// A query that finds nothing done may let some time pass on the device, as far as no host function
// is in the way (see enqueue). Of those that ask again and again each must get its answer in the
// end; where there are host functions, somebody must wait for something or call fakecuda_advance.
static unsigned long in_vain;

void run_a_little(Point goal) {
  if (!options()->late || running) return;
  Points goals = {&goal, 1};
  uint64_t steps = chance(2) ? chance(4) : 0;
  if (++in_vain % 16 == 0) steps = 64;
  bool towards = in_vain % 16 == 0;
  no_host_functions = true;
  while (steps-- && !in_host_function && !reached(goal)) {
    Stream *needed = towards ? needed_for(goal) : NULL;
    if (needed && can_run(needed)) run_head(needed);
    else if (!run_one(goals)) break;
  }
  no_host_functions = false;
}

// Time passes on the device: at most `steps` items or nodes of graphs run.
API void fakecuda_advance(long steps) {
  LOCK;
  while (steps-- > 0 && num_queued && !in_host_function && !running && run_one((Points){0})) {}
}

// From here on what is queued runs late, in an order drawn by `seed`, or at once.
API void fakecuda_order(int late, unsigned long seed) {
  LOCK;
  wait_for_device();
  run_late(late);
  seed_order(seed);
  in_vain = 0;
}
