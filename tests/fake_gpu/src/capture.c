// SPDX-License-Identifier: Apache-2.0
// Stream capture: CUDA C++ Programming Guide, "Creating a Graph Using Stream Capture" (cross-stream
// dependencies, prohibited and unhandled operations, invalidation), and Runtime API,
// cudaStreamBeginCapture, cudaThreadExchangeStreamCaptureMode.
#include "fake.h"

// Since CUDA 13.1 in the headers: CUDA_ERROR_STREAM_DETACHED.
#define STREAM_DETACHED ((cudaError_t)917)

static unsigned long long next_capture = 1;
static Capture *unsafe_calls_of;  // the last capture not in relaxed mode: what "unsafe" calls ask
static __thread int this_thread_mode = cudaStreamCaptureModeGlobal;

bool contains(Node *const *nodes, int count, const Node *node) {
  for (int i = 0; i < count; i++)
    if (nodes[i] == node) return true;
  return false;
}

void add_to(Node ***nodes, int *count, Node *node) {
  if (contains(*nodes, *count, node)) return;
  *nodes = realloc(*nodes, (size_t)(*count + 1) * sizeof **nodes);
  (*nodes)[(*count)++] = node;
}

static void clear_frontier(Stream *stream) {
  free(stream->frontier);
  stream->frontier = NULL;
  stream->num_frontier = 0;
}

bool unsafe_while_capturing(void) {
  Capture *capture = unsafe_calls_of;
  if (!capture || this_thread_mode == cudaStreamCaptureModeRelaxed) return false;
  bool ours = pthread_equal(capture->thread, pthread_self());
  if (capture->mode == cudaStreamCaptureModeThreadLocal && !ours) return false;
  capture->invalid = true;
  return true;
}

cudaError_t check_stream(Stream *stream) {
  if (!stream->alive) return cudaErrorInvalidResourceHandle;
  if (stream->detached) return STREAM_DETACHED;
  Capture *capture = unsafe_calls_of;
  // The legacy stream would wait for the capturing one, if that is a blocking stream.
  if (stream == &legacy_stream && capture && is_blocking(capture->origin) &&
      this_thread_mode != cudaStreamCaptureModeRelaxed) {
    capture->invalid = true;
    return cudaErrorStreamCaptureImplicit;
  }
  return stream->capture && stream->capture->invalid ? cudaErrorStreamCaptureInvalidated
                                                     : cudaSuccess;
}

Node *capture_work(Stream *stream, Work work) {
  Node *node =
      add_node(stream->capture->graph, work, stream->frontier, stream->num_frontier);
  node->stream = stream;
  clear_frontier(stream);
  add_to(&stream->frontier, &stream->num_frontier, node);
  trace("capture id=%llu node=%d stream=%d green=%llu kind=%c name=%s", stream->capture->id,
        node->index, stream->id, green_id(stream), work.kind,
        work.kernel ? work.kernel->name : "");
  return node;
}

// ------------------------------------------------------------------ begin and end

static cudaError_t begin_capture(Stream *stream, Graph *graph, const cudaGraphNode_t *after,
                                 size_t num_after, int mode) {
  cudaError_t error = check_stream(stream);
  if (error) return error;
  if (stream == &legacy_stream) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture) return cudaErrorIllegalState;
  Capture *capture = calloc(1, sizeof *capture);
  capture->id = next_capture++;
  capture->graph = graph ? graph : new_graph();
  capture->into_given = graph != NULL;
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = pthread_self();
  stream->capture = capture;
  clear_frontier(stream);
  for (size_t i = 0; i < num_after; i++)
    add_to(&stream->frontier, &stream->num_frontier, after[i]);
  if (mode != cudaStreamCaptureModeRelaxed) unsafe_calls_of = capture;
  counters.captures++;
  trace("capture begin id=%llu stream=%d mode=%d", capture->id, stream->id, mode);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  ENTER;
  return fail(begin_capture(stream_of(stream), NULL, NULL, 0, mode));
}

API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                              const cudaGraphNode_t *after,
                                              const cudaGraphEdgeData *edges UNUSED,
                                              size_t num_after, enum cudaStreamCaptureMode mode) {
  ENTER;
  return fail(begin_capture(stream_of(stream), graph, after, num_after, mode));
}

// Whether a node is among `from` or what they depend on.
static bool reaches(Node *const *from, int count, const Graph *graph, const Node *wanted) {
  bool *seen = calloc((size_t)graph->num_nodes + 1, sizeof *seen), found = false;
  Node **todo = NULL;
  int left = 0;
  for (int i = 0; i < count; i++) add_to(&todo, &left, from[i]);
  while (left && !found) {
    Node *node = todo[--left];
    found = node == wanted;
    if (seen[node->index]) continue;
    seen[node->index] = true;
    for (int i = 0; i < node->num_after; i++)
      if (!seen[node->after[i]->index]) add_to(&todo, &left, node->after[i]);
  }
  free(seen);
  free(todo);
  return found;
}

static bool is_joined(const Stream *stream, const Stream *origin) {
  for (int i = 0; i < stream->num_frontier; i++)
    if (!reaches(origin->frontier, origin->num_frontier, origin->capture->graph,
                 stream->frontier[i]))
      return false;
  return true;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *out) {
  ENTER;
  Stream *stream = stream_of(handle);
  Capture *capture = stream->capture;
  *out = NULL;
  if (!capture) return fail(cudaErrorIllegalState);
  if (capture->origin != stream) return fail(cudaErrorStreamCaptureUnmatched);
  if (capture->mode == cudaStreamCaptureModeThreadLocal &&
      !pthread_equal(capture->thread, pthread_self()))
    return fail(cudaErrorStreamCaptureWrongThread);
  cudaError_t error = capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  for (int i = 0; i < num_streams && !error; i++)
    if (streams[i]->capture == capture && streams[i] != stream && !is_joined(streams[i], stream))
      error = cudaErrorStreamCaptureUnjoined;
  for (int i = 0; i < num_streams; i++)
    if (streams[i]->capture == capture) streams[i]->capture = NULL;
  if (unsafe_calls_of == capture) unsafe_calls_of = NULL;
  trace("capture end id=%llu nodes=%d error=%d", capture->id, capture->graph->num_nodes, error);
  if (!error) {
    *out = capture->graph;
  } else if (!capture->into_given) {
    counters.graphs--;
    drop_graph(capture->graph);
  }
  capture->graph = NULL;
  return fail(error);
}

// ------------------------------------------------------------------ events within a capture

void record_in_capture(Stream *stream, Event *event) {
  event->capture = stream->capture;
  free(event->frontier);
  event->frontier = NULL;
  event->num_frontier = 0;
  for (int i = 0; i < stream->num_frontier; i++)
    add_to(&event->frontier, &event->num_frontier, stream->frontier[i]);
}

// A stream that waits for an event of a capture joins that capture.
cudaError_t wait_in_capture(Stream *stream, Event *event, unsigned flags) {
  Capture *capture = event->capture;
  if (!capture) {  // recorded outside of it
    if (flags & cudaEventWaitExternal) return cudaSuccess;
    stream->capture->invalid = true;
    return cudaErrorStreamCaptureIsolation;
  }
  if (!capture->graph) return cudaErrorCapturedEvent;  // it has ended
  if (stream->capture && stream->capture != capture) {
    stream->capture->invalid = capture->invalid = true;
    return cudaErrorStreamCaptureMerge;
  }
  if (!stream->capture) {
    if (stream == &legacy_stream) return cudaErrorStreamCaptureImplicit;
    stream->capture = capture;
    clear_frontier(stream);
  }
  for (int i = 0; i < event->num_frontier; i++)
    add_to(&stream->frontier, &stream->num_frontier, event->frontier[i]);
  return cudaSuccess;
}

// ------------------------------------------------------------------ questions

static enum cudaStreamCaptureStatus status_of(const Capture *capture) {
  if (!capture) return cudaStreamCaptureStatusNone;
  return capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  LOCK;
  Stream *stream = stream_of(handle);
  if (check_stream(stream) == cudaErrorStreamCaptureImplicit)
    return fail(cudaErrorStreamCaptureImplicit);
  *status = status_of(stream->capture);
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph,
                                         const cudaGraphNode_t **after,
                                         const cudaGraphEdgeData **edges, size_t *num_after) {
  LOCK;
  Stream *stream = stream_of(handle);
  *status = status_of(stream->capture);
  if (!stream->capture) return cudaSuccess;
  if (id) *id = stream->capture->id;
  if (graph) *graph = stream->capture->graph;
  if (after) *after = stream->frontier;
  if (edges) {
    free(stream->edges);
    stream->edges = calloc((size_t)stream->num_frontier + 1, sizeof *stream->edges);
    *edges = stream->edges;
  }
  if (num_after) *num_after = (size_t)stream->num_frontier;
  return cudaSuccess;
}

API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t handle, cudaGraphNode_t *nodes,
                                                    const cudaGraphEdgeData *edges UNUSED,
                                                    size_t count, unsigned flags) {
  LOCK;
  Stream *stream = stream_of(handle);
  if (!stream->capture) return fail(cudaErrorIllegalState);
  if (flags == cudaStreamSetCaptureDependencies) clear_frontier(stream);
  for (size_t i = 0; i < count; i++) add_to(&stream->frontier, &stream->num_frontier, nodes[i]);
  return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  int old = this_thread_mode;
  this_thread_mode = *mode;
  *mode = old;
  return cudaSuccess;
}
