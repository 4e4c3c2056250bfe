// SPDX-License-Identifier: Apache-2.0
// Errors, the trace, reports and counters.
#include "fake.h"

#include <stdarg.h>
#include <time.h>
#include <unistd.h>

pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;
Counters counters;

void fake_unlock(int *unused UNUSED) {
  pthread_mutex_unlock(&fake_lock);
}

double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ------------------------------------------------------------------ errors
// Runtime API, "Error Handling": the last error is one thread's, and cudaGetLastError resets it,
// but for one that the device cannot get over.

static __thread cudaError_t last_error;

cudaError_t fail(cudaError_t error) {
  if (error) last_error = error;
  return error;
}

// The last error is that of runtime calls (cudaGetLastError): a driver call that fails leaves it.
CUresult leaving_last_error(cudaError_t last, cudaError_t error) {
  last_error = last;
  return (CUresult)error;
}

cudaError_t peek_last_error(void) {
  return last_error;
}

API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error ? error : device_fault;
}

API cudaError_t cudaPeekAtLastError(void) {
  return last_error ? last_error : device_fault;
}

#define KNOWN(name, text) {name, #name, text}
// Names of those that a caller here may print or compare; cuda-python has names of its own.
static const struct {
  cudaError_t error;
  const char *name, *text;
} known[] = {
  KNOWN(cudaSuccess, "no error"),
  KNOWN(cudaErrorInvalidValue, "invalid argument"),
  KNOWN(cudaErrorMemoryAllocation, "out of memory"),
  KNOWN(cudaErrorInvalidDevice, "invalid device ordinal"),
  KNOWN(cudaErrorInvalidResourceHandle, "invalid resource handle"),
  KNOWN(cudaErrorNotReady, "device not ready"),
  KNOWN(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
  KNOWN(cudaErrorLaunchFailure, "unspecified launch failure"),
  KNOWN(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
  KNOWN(cudaErrorNotPermitted, "operation not permitted"),
  KNOWN(cudaErrorNotSupported, "operation not supported"),
  KNOWN(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
  KNOWN(cudaErrorStreamCaptureInvalidated,
        "operation failed due to a previous error during capture"),
  KNOWN(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
  KNOWN(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
  KNOWN(cudaErrorStreamCaptureImplicit,
        "operation would make the legacy stream depend on a capturing blocking stream"),
  KNOWN(cudaErrorCapturedEvent,
        "operation not permitted on an event last recorded in a capturing stream"),
};

API const char *cudaGetErrorName(cudaError_t error) {
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i].error == error) return known[i].name;
  return "cudaErrorOfTheFakeGpu";
}

API const char *cudaGetErrorString(cudaError_t error) {
  static __thread char text[64];
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i].error == error) return known[i].text;
  snprintf(text, sizeof text, "error %d of the fake GPU (see cudaError_t)", error);
  return text;
}

void impossible(const char *what) {
  fprintf(stderr, "fakecuda: %s: a bug of the fake GPU\n", what);
  abort();
}

API int fakecuda_unknown(const char *name) {
  fprintf(stderr, "fakecuda: %s is not implemented\n", name);
  trace("unknown name=%s", name);
  if (options()->strict) abort();
  return cudaErrorNotSupported;
}

// ------------------------------------------------------------------ trace and reports
// One file a process, NAME.PID: vLLM's engine core is a child of the server's process.

static FILE *open_for_process(const char *name, FILE **file, pid_t *owner) {
  if (!name || *owner == getpid()) return *file;
  char path[4096];
  snprintf(path, sizeof path, "%s.%d", name, getpid());
  *owner = getpid();
  *file = fopen(path, "w");
  if (*file) setvbuf(*file, NULL, _IOLBF, 1 << 16);
  return *file;
}

static FILE *chosen_trace;  // fakecuda_trace's

static FILE *trace_file(void) {
  if (chosen_trace) return chosen_trace;
  static FILE *file;
  static pid_t owner;
  return open_for_process(options()->trace, &file, &owner);
}

static FILE *report_file(void) {
  static FILE *file;
  static pid_t owner;
  return open_for_process(options()->reports, &file, &owner);
}

bool tracing(void) {
  return chosen_trace || options()->trace;
}

// From now on the trace goes to `path`, or to where FAKECUDA_TRACE says. Nothing may be queued.
API void fakecuda_trace(const char *path) {
  LOCK;
  if (chosen_trace) fclose(chosen_trace);
  chosen_trace = path ? fopen(path, "w") : NULL;
}

void trace(const char *format, ...) {
  FILE *file = trace_file();
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  flockfile(file);
  vfprintf(file, format, arguments);
  putc_unlocked('\n', file);
  funlockfile(file);
  va_end(arguments);
}

// A line of a test's own.
API void fakecuda_mark(const char *name) {
  trace("mark name=%s", name);
}

static char **reports;

void report(const char *kind, const char *format, ...) {
  char *text = NULL;
  va_list arguments;
  va_start(arguments, format);
  if (vasprintf(&text, format, arguments) < 0) abort();
  va_end(arguments);
  char *line = NULL;
  if (asprintf(&line, "%s: %s", kind, text) < 0) abort();
  free(text);
  reports = realloc(reports, (size_t)(counters.reports + 1) * sizeof *reports);
  reports[counters.reports++] = line;
  trace("report %s", line);
  FILE *file = report_file();
  fprintf(file ? file : stderr, file ? "%s\n" : "fakecuda: %s\n", line);
}

// A sentence for each thing found, or NULL beyond the last. It stays where it is.
API const char *fakecuda_report(long index) {
  LOCK;
  return index >= 0 && index < counters.reports ? reports[index] : NULL;
}

// ------------------------------------------------------------------ counters

// Live: streams, events, green_contexts, graphs, graph_execs, device_bytes. So far: kernels,
// graph_launches, captures, copies, host_functions, reports. Now: queued. -1: no such name.
API long fakecuda_count(const char *name) {
  LOCK;
  long queued = (long)(legacy_stream.queued - legacy_stream.done);
  for (int i = 0; i < num_streams; i++) queued += (long)(streams[i]->queued - streams[i]->done);
  const struct {
    const char *name;
    long value;
  } all[] = {
    {"streams", counters.streams},
    {"events", counters.events},
    {"green_contexts", counters.green_contexts},
    {"graphs", counters.graphs},
    {"graph_execs", counters.graph_execs},
    {"device_bytes", (long)device_bytes_used()},
    {"kernels", counters.kernels},
    {"graph_launches", counters.graph_launches},
    {"captures", counters.captures},
    {"copies", counters.copies},
    {"host_functions", counters.host_functions},
    {"reports", counters.reports},
    {"queued", queued},
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (!strcmp(all[i].name, name)) return all[i].value;
  return -1;
}

__attribute__((destructor)) static void summary(void) {
  if (!options()->summary) return;
  fprintf(stderr,
          "fakecuda: %ld kernels, %ld graph launches, %ld captures, %d streams, %ld live events, "
          "%.2f GB, %ld reports\n",
          counters.kernels, counters.graph_launches, counters.captures, num_streams,
          counters.events, (double)device_bytes_used() / 1e9, counters.reports);
}
