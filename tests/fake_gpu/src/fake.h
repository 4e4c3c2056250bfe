// SPDX-License-Identifier: Apache-2.0
// What the files of the fake GPU share. README.md says what it is.
//
// One mutex guards all state. It is a leaf: nothing is waited for while it is held, neither
// Python's interpreter lock nor a host function. "Locked" in a comment: the caller holds it.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))

typedef struct Green Green;
typedef struct Item Item;
typedef struct Exec Exec;
typedef struct Kernel Kernel;
typedef struct Capture Capture;
typedef struct CUstream_st Stream;
typedef struct CUevent_st Event;
typedef struct CUgraph_st Graph;
typedef struct CUgraphNode_st Node;

// ------------------------------------------------------------------ options.c
typedef struct {
  int num_sms;
  int min_sms, align_sms;  // of a group
  int driver;              // 13010 is CUDA 13.1
  bool work_queues;
  size_t memory_bytes;
  double kernel_s;
  bool strict, late, backtrace, summary;
  uint64_t seed;
  const char *trace, *reports, *faults;
} Options;
const Options *options(void);
void run_late(bool late);  // changes what FAKECUDA_ORDER said; locked

// ------------------------------------------------------------------ errors.c
// Also the lock, the trace and the reports.
extern pthread_mutex_t fake_lock;
void fake_unlock(int *unused);
#define LOCK                                                                 \
  __attribute__((cleanup(fake_unlock))) int locked_ = pthread_mutex_lock(&fake_lock); \
  (void)locked_
CUresult leaving_last_error(cudaError_t last, cudaError_t error);
cudaError_t peek_last_error(void);
cudaError_t fail(cudaError_t error);  // remembers it for cudaGetLastError
bool tracing(void);
void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));
void report(const char *kind, const char *format, ...) __attribute__((format(printf, 2, 3)));
void impossible(const char *what) __attribute__((noreturn));
int fakecuda_unknown(const char *name);  // the generated stubs call it
double now_s(void);

// Live objects and totals, by name: fakecuda_count() in errors.c reads them.
typedef struct {
  long streams, events, green_contexts, graphs, graph_execs;
  long kernels, graph_launches, captures, copies, host_functions, reports;
} Counters;
extern Counters counters;

// ------------------------------------------------------------------ faults.c
extern cudaError_t device_fault;  // sticky: every later call returns it
// Before anything that uses the device. Returns from the calling function.
#define ENTER                              \
  LOCK;                                    \
  need_context();                          \
  if (device_fault) return fail(device_fault)
cudaError_t malloc_fault(size_t used_bytes, size_t bytes);                   // locked
cudaError_t launch_fault(const Stream *stream, cudaError_t *when_it_runs);  // locked
bool is_held(const Stream *stream);                                         // locked
double slowness(const Stream *stream);  // how many times as long its kernels take
void read_fault_file(void);                                                 // locked

// ------------------------------------------------------------------ device.c
#define PRIMARY ((CUcontext)fake_primary)
extern char fake_primary[64];
extern bool primary_active;
CUcontext current_context(void);
void need_context(void);  // the runtime makes the primary context current where none is

// ------------------------------------------------------------------ memory.c
typedef enum { HOST = cudaMemoryTypeHost, DEVICE = cudaMemoryTypeDevice } MemoryType;
typedef struct {
  char *address;
  size_t bytes;
  MemoryType type;  // HOST: pinned
} Block;
const Block *find_block(const void *address);  // locked; NULL where it is not ours
cudaError_t map_device_memory(void **address, size_t bytes);  // locked
void fill(void *address, int value, size_t bytes);           // locked
size_t device_bytes_used(void);

// ------------------------------------------------------------------ executor.c
typedef enum {
  KERNEL = 'K',
  COPY = 'C',
  SET = 'S',
  HOST_FUNCTION = 'H',
  GRAPH = 'G',
  RECORD = 'R',
  WAIT = 'W',
  EMPTY = 'E',
} Kind;

typedef struct {  // what a stream's item or a graph's node does
  Kind kind;
  Kernel *kernel;
  unsigned grid[3];
  void **arguments;     // a copy, one allocation; NULL where sizes are unknown
  cudaError_t fault;    // sticky, once this runs
  void *to;             // COPY, SET
  const void *from;     // COPY
  size_t bytes;
  int value;            // SET
  char *staged;         // a pageable source, as it was when it was queued
  char *expected;       // a pinned one: it must not change until the copy has run
  uint64_t checksum;    // the same, for long ones
  char *python;         // the Python stack that queued it, if asked for
  cudaHostFn_t function;
  void *data;
  Event *event;         // RECORD, WAIT
  unsigned long record;
  Exec *exec;           // GRAPH
} Work;

typedef struct {  // reached once `position` items of the stream have run
  Stream *stream;
  unsigned long position;
} Point;

struct Item {
  Item *next;
  Work work;
  Stream *stream;
  unsigned long position;  // in its stream, from 1
  unsigned long number;    // over all streams, in the order of the host's calls, from 1
  Point *after;
  int num_after;
  bool started;            // GRAPH
  int nodes_left;
  int *missing;            // how many nodes each node still waits for
  int *ready, num_ready;
  int node;                // that is running
};

typedef struct {
  Point *points;
  int count;
} Points;
// All of these are locked; those that wait let go meanwhile.
void add_point(Points *points, Point point);
bool reached(Point point);
unsigned long enqueue(Stream *stream, Work work, Points after);  // takes `after`
cudaError_t wait_for_points(Points goals);
cudaError_t wait_for_stream(Stream *stream);
cudaError_t wait_for_device(void);
void sleep_until(double time_s);  // for FAKECUDA_KERNEL_US
void trace_sync(Point point);     // the host knows now that it was reached
void run_a_little(Point goal);    // for a query that finds nothing done
// Of the host function that this thread is in: 0 if in none, -1 if in no graph.
unsigned long running_item(void);
int running_node(void);
void free_work(Work *work);

// ------------------------------------------------------------------ streams.c
struct CUstream_st {
  int id;  // 0: the legacy default stream
  unsigned flags;
  int priority;
  bool alive, detached;
  Green *green;  // NULL: all SMs
  Capture *capture;
  Node **frontier;  // what the next captured node depends on
  int num_frontier;
  cudaGraphEdgeData *edges;
  Item *head, *tail;
  unsigned long queued, done;  // items, ever
  double busy_until;           // seconds of now_s(), with kernel_s
};
struct CUevent_st {
  unsigned flags;
  int references;
  bool destroyed;
  Point point;           // stream NULL: never recorded
  unsigned long record;  // how often it has been recorded
  double at;             // seconds of now_s(), once the record has run
  Capture *capture;      // it was recorded in; then `frontier` is what it stands for
  Node **frontier;
  int num_frontier;
};
extern Stream legacy_stream, **streams;
extern int num_streams;  // ids 1..num_streams, the dead included
Stream *stream_of(cudaStream_t handle);
bool is_blocking(const Stream *stream);
cudaError_t make_stream(cudaStream_t *out, unsigned flags, int priority, Green *green);  // locked
void drop_event(Event *event);                                                           // locked

// ------------------------------------------------------------------ capture.c
struct Capture {  // never freed: events may still point at it
  unsigned long long id;
  Graph *graph;  // NULL once it has ended
  bool into_given;
  Stream *origin;
  int mode;
  pthread_t thread;
  bool invalid;
};
cudaError_t check_stream(Stream *stream);  // locked; whether work may be given to it
bool unsafe_while_capturing(void);         // locked; a call that a capture forbids. Invalidates it
Node *capture_work(Stream *stream, Work work);  // locked; takes what `work` owns
cudaError_t wait_in_capture(Stream *stream, Event *event, unsigned flags);
void record_in_capture(Stream *stream, Event *event);

// ------------------------------------------------------------------ graphs.c
struct CUgraphNode_st {
  Graph *graph;
  Work work;
  int index;
  Stream *stream;  // captured on; NULL if added by hand
  Node **after;
  int num_after;
};
struct CUgraph_st {
  Node **nodes;
  int num_nodes, references;
};
struct Exec {
  Graph *graph;
  Node **nodes;
  int num_nodes, references;
  int **followers, *num_followers;  // indices of the nodes that wait for each
  Point last_launch;
};
Graph *new_graph(void);
void drop_graph(Graph *graph);
void drop_exec(Exec *exec);
void describe_graph(const Exec *exec, char *out, size_t size);
Node *add_node(Graph *graph, Work work, Node *const *after, int num_after);
bool contains(Node *const *nodes, int count, const Node *node);
void add_to(Node ***nodes, int *count, Node *node);

// ------------------------------------------------------------------ kernels.c, vllm_kernels.c
#define MAX_PARAMETERS 64
struct Kernel {
  const char *name;
  const void *host;  // the host function that stands for it
  int num_parameters;  // 0 where unknown
  unsigned short sizes[MAX_PARAMETERS];
  unsigned code;  // a checksum of its cubin, as races.py computes it; 0 where there is none
};
Kernel *kernel_of(const void *function);  // of a host function or a CUfunction
cudaError_t queue_kernel(Kernel *kernel, cudaStream_t stream, const unsigned *grid,
                         void **arguments);
void read_parameter_sizes(Kernel *kernel, const char *cubin);
void know_torch_kernel(Kernel *kernel);                           // its parameters, by its name
void run_kernel(const Work *work);                                // locked
void describe_accesses(const Work *work, char *out, size_t size);  // locked

// ------------------------------------------------------------------ copies.c
void run_copy(Work *work, const Item *item);  // locked

// ------------------------------------------------------------------ python.c
void *let_go_of_python(void);  // its interpreter lock, if this thread holds it
void take_python(void *let_go);
char *python_stack(void);  // of this thread; NULL where there is none

// ------------------------------------------------------------------ green.c
struct Green {
  unsigned long long id;
  CUdevResource sms;
  bool alive, has_queues;
  int queue_limit, queue_scope;
};
unsigned long long green_id(const Stream *stream);  // 0: all SMs
int first_sm(const Stream *stream), count_sms(const Stream *stream);
