// SPDX-License-Identifier: Apache-2.0
// Copies and fills. When each waits for the host: Runtime API, "API synchronization behavior".
//
// A copy from pinned memory reads its source when it runs. The source must not change until then:
// what it was when the copy was queued is kept, and a difference is reported.
#include "fake.h"

#include <unistd.h>

enum { KEPT_BYTES = 1 << 16 };  // of longer sources only a checksum is kept

static uint64_t checksum(const char *from, size_t bytes) {
  uint64_t sum = 14695981039346656037ull, word;
  size_t i = 0;
  for (; i + sizeof word <= bytes; i += sizeof word) {
    memcpy(&word, from + i, sizeof word);
    sum = (sum ^ word) * 1099511628211ull;
    sum ^= sum >> 29;
  }
  for (; i < bytes; i++) sum = (sum ^ (unsigned char)from[i]) * 1099511628211ull;
  return sum;
}

static char *copy_of(const void *from, size_t bytes) {
  char *copy = malloc(bytes ? bytes : 1);
  return memcpy(copy, from, bytes);
}

static void remember_source(Work *work) {
  if (work->bytes <= KEPT_BYTES) work->expected = copy_of(work->from, work->bytes);
  else work->checksum = checksum(work->from, work->bytes);
}

static void check_source(const Work *work, const Item *item) {
  if (!work->expected && !work->checksum) return;
  size_t at = 0;
  if (work->expected) {
    const char *found = work->from;
    while (at < work->bytes && found[at] == work->expected[at]) at++;
    if (at == work->bytes) return;
  } else if (checksum(work->from, work->bytes) == work->checksum) {
    return;
  }
  char where[64] = "somewhere";
  if (work->expected) snprintf(where, sizeof where, "first at byte %zu", at);
  report("pinned", "the source %p of a copy of %zu bytes to %p, item %lu on stream %d, changed "
         "(%s) after the copy was queued and before it ran%s%s",
         work->from, work->bytes, work->to, item->number, item->stream->id, where,
         work->python ? "; queued by\n" : "", work->python ? work->python : "");
}

void run_copy(Work *work, const Item *item) {
  counters.copies++;
  if (work->kind == SET) {
    fill(work->to, work->value, work->bytes);
    return;
  }
  check_source(work, item);
  memmove(work->to, work->staged ? work->staged : work->from, work->bytes);
}

static bool is_device(const void *address) {
  const Block *block = find_block(address);
  return block && block->type == DEVICE;
}

static cudaError_t queue_copy(Work work, cudaStream_t handle, bool synchronous) {
  ENTER;
  if (!work.bytes) return cudaSuccess;
  Stream *stream = stream_of(handle);
  cudaError_t error = check_stream(stream);
  if (error) return fail(error);
  if (synchronous && unsafe_while_capturing()) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) {
    capture_work(stream, work);
    return cudaSuccess;
  }
  bool to_device = is_device(work.to), from_device = work.from && is_device(work.from);
  bool pageable_source = work.from && !find_block(work.from);
  if (synchronous && pageable_source) {
    error = wait_for_stream(stream);
    if (error) return fail(error);
  }
  if (pageable_source) work.staged = copy_of(work.from, work.bytes);
  else if (options()->late && work.from && !from_device) remember_source(&work);
  if (options()->late && options()->backtrace && (work.expected || work.checksum))
    work.python = python_stack();
  bool waits;
  if (work.kind == SET) waits = !to_device;  // fills of host memory are synchronous
  else if (!to_device && !from_device) waits = true;
  else if (!to_device && !find_block(work.to)) waits = true;  // to pageable memory
  else waits = synchronous && to_device != from_device && !pageable_source;
  enqueue(stream, work, (Points){0});
  if (!waits) return cudaSuccess;
  return fail(wait_for_stream(stream));
}

static Work copy(void *to, const void *from, size_t bytes) {
  return (Work){.kind = COPY, .to = to, .from = from, .bytes = bytes};
}

static Work set(void *to, int value, size_t bytes) {
  return (Work){.kind = SET, .to = to, .value = value, .bytes = bytes};
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes,
                           enum cudaMemcpyKind kind UNUSED) {
  return queue_copy(copy(to, from, bytes), NULL, true);
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                enum cudaMemcpyKind kind UNUSED, cudaStream_t stream) {
  return queue_copy(copy(to, from, bytes), stream, false);
}

API cudaError_t cudaMemcpyPeerAsync(void *to, int to_device UNUSED, const void *from,
                                    int from_device UNUSED, size_t bytes, cudaStream_t stream) {
  return queue_copy(copy(to, from, bytes), stream, false);
}

API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                  size_t width, size_t rows, enum cudaMemcpyKind kind UNUSED,
                                  cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t i = 0; i < rows && !error; i++) {
    Work row = copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    error = queue_copy(row, stream, false);
  }
  return error;
}

API cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  return queue_copy(set(to, value, bytes), NULL, true);
}

API cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  return queue_copy(set(to, value, bytes), stream, false);
}
