// SPDX-License-Identifier: Apache-2.0
// Graphs and their launches: Runtime API, "Graph Management".
#include "fake.h"

Graph *new_graph(void) {
  Graph *graph = calloc(1, sizeof *graph);
  graph->references = 1;
  counters.graphs++;
  return graph;
}

void drop_graph(Graph *graph) {
  if (--graph->references) return;
  for (int i = 0; i < graph->num_nodes; i++) {
    free_work(&graph->nodes[i]->work);
    free(graph->nodes[i]->after);
    free(graph->nodes[i]);
  }
  free(graph->nodes);
  free(graph);
}

Node *add_node(Graph *graph, Work work, Node *const *after, int num_after) {
  Node *node = calloc(1, sizeof *node);
  node->graph = graph;
  node->work = work;
  node->index = graph->num_nodes;
  for (int i = 0; i < num_after; i++) add_to(&node->after, &node->num_after, after[i]);
  graph->nodes = realloc(graph->nodes, (size_t)(graph->num_nodes + 1) * sizeof *graph->nodes);
  graph->nodes[graph->num_nodes++] = node;
  return node;
}

API cudaError_t cudaGraphCreate(cudaGraph_t *graph, unsigned flags UNUSED) {
  LOCK;
  *graph = new_graph();
  return cudaSuccess;
}

// An executable graph keeps what it was made from.
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  LOCK;
  if (!graph) return fail(cudaErrorInvalidValue);
  counters.graphs--;
  drop_graph(graph);
  return cudaSuccess;
}

static void find_followers(Exec *exec) {
  size_t room = (size_t)exec->num_nodes + 1;
  exec->followers = calloc(room, sizeof *exec->followers);
  exec->num_followers = calloc(room, sizeof *exec->num_followers);
  for (int i = 0; i < exec->num_nodes; i++) {
    for (int k = 0; k < exec->nodes[i]->num_after; k++) {
      int before = exec->nodes[i]->after[k]->index, count = exec->num_followers[before]++;
      size_t bytes = (size_t)(count + 1) * sizeof **exec->followers;
      exec->followers[before] = realloc(exec->followers[before], bytes);
      exec->followers[before][count] = i;
    }
  }
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                              unsigned long long flags UNUSED) {
  ENTER;
  Exec *exec = calloc(1, sizeof *exec);
  exec->graph = graph;
  exec->references = 1;
  exec->num_nodes = graph->num_nodes;
  exec->nodes = malloc((size_t)(graph->num_nodes + 1) * sizeof *exec->nodes);
  if (graph->num_nodes)
    memcpy(exec->nodes, graph->nodes, (size_t)graph->num_nodes * sizeof *exec->nodes);
  find_followers(exec);
  graph->references++;
  counters.graph_execs++;
  *out = (cudaGraphExec_t)exec;
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                     unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}

void drop_exec(Exec *exec) {
  if (--exec->references) return;
  for (int i = 0; i < exec->num_nodes; i++) free(exec->followers[i]);
  free(exec->followers);
  free(exec->num_followers);
  free(exec->nodes);
  drop_graph(exec->graph);
  free(exec);
}

// What is queued of it still runs: "asynchronously destroyed upon completion".
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t handle) {
  LOCK;
  counters.graph_execs--;
  drop_exec((Exec *)handle);
  return cudaSuccess;
}

API cudaError_t cudaGraphUpload(cudaGraphExec_t exec UNUSED, cudaStream_t stream UNUSED) {
  return cudaSuccess;
}

void describe_graph(const Exec *exec, char *out, size_t size) {
  int used = snprintf(out, size, "nodes=%d captured_on=", exec->num_nodes);
  const Stream *last = NULL;
  for (int i = 0; i < exec->num_nodes && used + 16 < (int)size; i++) {
    const Stream *stream = exec->nodes[i]->stream;
    if (!stream || stream == last) continue;
    used += snprintf(out + used, size - (size_t)used, "%s%d", last ? "," : "", stream->id);
    last = stream;
  }
}

// A node's kernel runs on the SMs of the stream that it was captured on, whatever stream the graph
// is launched on: the node has a context of its own (Driver API, CUDA_KERNEL_NODE_PARAMS).
static void check_groups(const Exec *exec, const Stream *stream) {
  for (int i = 0; i < exec->num_nodes; i++) {
    const Node *node = exec->nodes[i];
    if (node->work.kind != KERNEL || !node->stream) continue;
    if (green_id(node->stream) == green_id(stream)) continue;
    report("group", "a graph launched on stream %d (green context %llu, %d SMs) has %s, captured "
           "on stream %d (green context %llu, %d SMs)",
           stream->id, green_id(stream), count_sms(stream), node->work.kernel->name,
           node->stream->id, green_id(node->stream), count_sms(node->stream));
    return;
  }
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream_handle) {
  ENTER;
  Exec *exec = (Exec *)handle;
  Stream *stream = stream_of(stream_handle);
  Work work = {.kind = GRAPH, .exec = exec};
  cudaError_t error = check_stream(stream);
  if (!error) error = launch_fault(stream, &work.fault);
  if (error) return fail(error);
  counters.graph_launches++;
  if (stream->capture) {
    exec->references++;
    capture_work(stream, work);
    return cudaSuccess;
  }
  check_groups(exec, stream);
  enqueue(stream, work, (Points){0});
  return cudaSuccess;
}

// ------------------------------------------------------------------ nodes

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *out, size_t *count) {
  LOCK;
  for (size_t i = 0; out && i < *count && i < (size_t)graph->num_nodes; i++)
    out[i] = graph->nodes[i];
  *count = (size_t)graph->num_nodes;
  return cudaSuccess;
}

API cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, enum cudaGraphNodeType *type) {
  switch (node->work.kind) {
    case KERNEL: *type = cudaGraphNodeTypeKernel; break;
    case COPY: *type = cudaGraphNodeTypeMemcpy; break;
    case SET: *type = cudaGraphNodeTypeMemset; break;
    case HOST_FUNCTION: *type = cudaGraphNodeTypeHost; break;
    case GRAPH: *type = cudaGraphNodeTypeGraph; break;
    default: *type = cudaGraphNodeTypeEmpty;
  }
  return cudaSuccess;
}

API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *out,
                                             cudaGraphEdgeData *edges UNUSED, size_t *count) {
  LOCK;
  for (size_t i = 0; out && i < *count && i < (size_t)node->num_after; i++) out[i] = node->after[i];
  *count = (size_t)node->num_after;
  return cudaSuccess;
}

API cudaError_t cudaGraphAddNode(cudaGraphNode_t *out, cudaGraph_t graph,
                                 const cudaGraphNode_t *after,
                                 const cudaGraphEdgeData *edges UNUSED, size_t num_after,
                                 struct cudaGraphNodeParams *parameters UNUSED) {
  LOCK;
  *out = add_node(graph, (Work){.kind = EMPTY}, after, (int)num_after);
  return cudaSuccess;
}

API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph UNUSED, const char *path UNUSED,
                                       unsigned flags UNUSED) {
  return cudaSuccess;
}

// The SMs that a captured node's kernel runs on, as fakecuda_stream_group.
API void fakecuda_node_group(cudaGraphNode_t node, int *first, int *count, long *green) {
  LOCK;
  *first = first_sm(node->stream);
  *count = count_sms(node->stream);
  *green = (long)green_id(node->stream);
}
