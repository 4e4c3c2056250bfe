// SPDX-License-Identifier: Apache-2.0
// Streams and events: Runtime API, "Stream Management" and "Event Management".
#include "fake.h"

enum { LEAST_PRIORITY = 0, GREATEST_PRIORITY = -5 };  // of compute capability 9.0

Stream legacy_stream = {.alive = true};
Stream **streams;
int num_streams;

Stream *stream_of(cudaStream_t handle) {  // NULL, cudaStreamLegacy, cudaStreamPerThread
  return (uintptr_t)handle <= 2 ? &legacy_stream : (Stream *)handle;
}

bool is_blocking(const Stream *stream) {
  return !(stream->flags & cudaStreamNonBlocking);
}

// ------------------------------------------------------------------ streams

cudaError_t make_stream(cudaStream_t *out, unsigned flags, int priority, Green *green) {
  Stream *stream = calloc(1, sizeof *stream);
  streams = realloc(streams, (size_t)(num_streams + 1) * sizeof *streams);
  streams[num_streams++] = stream;
  if (priority > LEAST_PRIORITY) priority = LEAST_PRIORITY;
  if (priority < GREATEST_PRIORITY) priority = GREATEST_PRIORITY;
  stream->id = num_streams;
  stream->flags = flags;
  stream->priority = priority;
  stream->green = green;
  stream->alive = true;
  counters.streams++;
  trace("stream id=%d flags=%u priority=%d green=%llu first_sm=%d sms=%d", stream->id, flags,
        priority, green_id(stream), first_sm(stream), count_sms(stream));
  *out = stream;
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  ENTER;
  return fail(make_stream(stream, flags, priority, NULL));
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, LEAST_PRIORITY);
}

API cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, LEAST_PRIORITY);
}

// Returns at once; what is queued still runs. So a Stream is never freed.
API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  LOCK;
  Stream *stream = stream_of(handle);
  if (stream == &legacy_stream || !stream->alive) return fail(cudaErrorInvalidResourceHandle);
  if (stream->capture) stream->capture->invalid = true;
  stream->alive = false;
  counters.streams--;
  trace("destroy stream=%d", stream->id);
  return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  ENTER;
  Stream *stream = stream_of(handle);
  cudaError_t error = check_stream(stream);
  if (error) return fail(error);
  if (stream->capture) {
    stream->capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return fail(wait_for_stream(stream));
}

API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  ENTER;
  Stream *stream = stream_of(handle);
  cudaError_t error = check_stream(stream);
  if (error) return fail(error);
  if (stream->capture) {
    stream->capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  Point end = {stream, stream->queued};
  if (!reached(end)) run_a_little(end);
  if (!reached(end) || stream->busy_until > now_s()) return cudaErrorNotReady;
  trace_sync(end);
  return fail(device_fault);
}

API cudaError_t cudaDeviceSynchronize(void) {
  ENTER;
  if (unsafe_while_capturing()) return fail(cudaErrorStreamCaptureUnsupported);
  return fail(wait_for_device());
}

API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
  *flags = stream_of(stream)->flags;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetDevice(cudaStream_t stream UNUSED, int *device) {
  *device = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) {
  *id = (unsigned long long)stream_of(stream)->id;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = LEAST_PRIORITY;
  *greatest = GREATEST_PRIORITY;
  return cudaSuccess;
}

// ------------------------------------------------------------------ events

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
  ENTER;
  Event *event = calloc(1, sizeof *event);
  event->flags = flags;
  event->references = 1;
  counters.events++;
  *out = event;
  return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

void drop_event(Event *event) {
  if (--event->references) return;
  free(event->frontier);
  free(event);
}

// May be destroyed before it has happened; "resources are released on completion".
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  LOCK;
  if (!event || event->destroyed) return fail(cudaErrorInvalidResourceHandle);
  event->destroyed = true;
  counters.events--;
  drop_event(event);
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
  ENTER;
  Stream *stream = stream_of(handle);
  cudaError_t error = check_stream(stream);
  if (error) return fail(error);
  if (stream->capture) {
    if (!(flags & cudaEventRecordExternal)) record_in_capture(stream, event);
    return cudaSuccess;
  }
  event->capture = NULL;
  event->record++;
  event->references++;
  event->point = (Point){stream, stream->queued + 1};
  Work work = {.kind = RECORD, .event = event, .record = event->record};
  enqueue(stream, work, (Points){0});
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

// Waits for the event's last record before this call: recording it again changes nothing.
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  ENTER;
  Stream *stream = stream_of(handle);
  cudaError_t error = check_stream(stream);
  if (error) return fail(error);
  if (event->capture || stream->capture) return fail(wait_in_capture(stream, event, flags));
  if (!event->point.stream) return cudaSuccess;
  Points after = {0};
  add_point(&after, event->point);
  event->references++;
  enqueue(stream, (Work){.kind = WAIT, .event = event, .record = event->record}, after);
  return cudaSuccess;
}

static cudaError_t check_event(Event *event) {
  if (event->capture) {
    event->capture->invalid = true;
    return cudaErrorCapturedEvent;
  }
  return unsafe_while_capturing() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER;
  cudaError_t error = check_event(event);
  if (error) return fail(error);
  if (!reached(event->point)) run_a_little(event->point);
  if (!reached(event->point) || event->at > now_s()) return cudaErrorNotReady;
  trace_sync(event->point);
  return fail(device_fault);
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER;
  cudaError_t error = check_event(event);
  if (error) return fail(error);
  unsigned long record = event->record;
  Point point = event->point;
  if (!point.stream) return cudaSuccess;
  error = wait_for_points((Points){&point, 1});
  if (event->record == record) sleep_until(event->at);
  trace_sync(point);
  return fail(error);
}

API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
  LOCK;
  if (!begin->point.stream || !end->point.stream) return fail(cudaErrorInvalidResourceHandle);
  if ((begin->flags | end->flags) & cudaEventDisableTiming)
    return fail(cudaErrorInvalidResourceHandle);
  if (!reached(begin->point) || !reached(end->point)) return cudaErrorNotReady;
  if (begin->at > now_s() || end->at > now_s()) return cudaErrorNotReady;
  *ms = (float)(1e3 * (end->at - begin->at));
  return cudaSuccess;
}

// ------------------------------------------------------------------ for tests

// Which SMs a stream's kernels run on: the first, how many, and its green context (0: none).
API void fakecuda_stream_group(cudaStream_t handle, int *first, int *count, long *green) {
  LOCK;
  const Stream *stream = stream_of(handle);
  *first = first_sm(stream);
  *count = count_sms(stream);
  *green = (long)green_id(stream);
}
