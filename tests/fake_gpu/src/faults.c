// SPDX-License-Identifier: Apache-2.0
// Failures on demand: memory that runs out, launches that fail, a device that is gone; and streams
// that do not get on.
//
// Armed through ctypes in this process, or for any process by a file, FAKECUDA_FAULTS, that is
// read whenever it changes. It has lines of
//   malloc SKIP TIMES             cudaMalloc fails TIMES times after SKIP calls
//   memory BYTES                  the device has no more than this
//   launch GROUP ERROR SKIP TIMES launches fail
//   fault GROUP ERROR SKIP        a launch succeeds, and what it launched breaks the device
//   hold GROUP                    nothing runs on its streams
//   release                       it does again
//   slow GROUP FACTOR             with kernel_us, its kernels take FACTOR times as long
// GROUP: -1 any stream, 0 one without a green context, else the SMs of its green context.
#include "fake.h"

#include <sys/stat.h>

cudaError_t device_fault;

typedef struct {
  bool armed;
  int group;
  cudaError_t error;
  long skip, times;
} Fault;
static Fault malloc_calls, launches, faults;
static size_t memory_limit = SIZE_MAX;
enum { NO_GROUP = -2 };
static int held_group = NO_GROUP;
static int slow_group = NO_GROUP;
static double slow_factor = 1;

// Whether this call is one that fails. Counts it.
static bool strikes(Fault *fault) {
  if (!fault->armed) return false;
  if (fault->skip > 0) {
    fault->skip--;
    return false;
  }
  if (--fault->times <= 0) fault->armed = false;
  return true;
}

void read_fault_file(void) {
  static struct timespec changed;
  struct stat found;
  if (!options()->faults || stat(options()->faults, &found)) return;
  if (found.st_mtim.tv_sec == changed.tv_sec && found.st_mtim.tv_nsec == changed.tv_nsec) return;
  changed = found.st_mtim;
  FILE *file = fopen(options()->faults, "r");
  if (!file) return;
  char line[256];
  while (fgets(line, sizeof line, file)) {
    long skip = 0, times = 1;
    int group, error;
    size_t bytes;
    double factor;
    if (sscanf(line, "malloc %ld %ld", &skip, &times) == 2)
      malloc_calls = (Fault){true, -1, cudaErrorMemoryAllocation, skip, times};
    else if (sscanf(line, "memory %zu", &bytes) == 1)
      memory_limit = bytes;
    else if (sscanf(line, "launch %d %d %ld %ld", &group, &error, &skip, &times) == 4)
      launches = (Fault){true, group, error, skip, times};
    else if (sscanf(line, "fault %d %d %ld", &group, &error, &skip) == 3)
      faults = (Fault){true, group, error, skip, 1};
    else if (sscanf(line, "hold %d", &group) == 1)
      held_group = group;
    else if (sscanf(line, "slow %d %lf", &group, &factor) == 2)
      slow_group = group, slow_factor = factor;
    else if (!strcmp(line, "release\n"))
      held_group = NO_GROUP;
    else
      fprintf(stderr, "fakecuda: what is this fault? %s", line);
  }
  fclose(file);
}

cudaError_t malloc_fault(size_t used_bytes, size_t bytes) {
  read_fault_file();
  bool full = used_bytes + bytes > memory_limit || used_bytes + bytes > options()->memory_bytes;
  if (!full && !strikes(&malloc_calls)) return cudaSuccess;
  trace("no memory bytes=%zu used=%zu", bytes, used_bytes);
  return cudaErrorMemoryAllocation;
}

static bool is_in_group(const Stream *stream, int group) {
  return group < 0 || (group == 0 ? !stream->green : stream->green && count_sms(stream) == group);
}

bool is_held(const Stream *stream) {
  return held_group != NO_GROUP && is_in_group(stream, held_group);
}

double slowness(const Stream *stream) {
  return slow_group != NO_GROUP && is_in_group(stream, slow_group) ? slow_factor : 1;
}

cudaError_t launch_fault(const Stream *stream, cudaError_t *when_it_runs) {
  read_fault_file();
  *when_it_runs = cudaSuccess;
  if (faults.armed && is_in_group(stream, faults.group) && strikes(&faults)) {
    trace("fault stream=%d error=%d", stream->id, faults.error);
    *when_it_runs = faults.error;
  }
  if (launches.armed && is_in_group(stream, launches.group) && strikes(&launches)) {
    trace("launch fails stream=%d error=%d", stream->id, launches.error);
    return launches.error;
  }
  return cudaSuccess;
}

// cudaMalloc fails `times` times, after `skip` calls more.
API void fakecuda_fail_malloc(long skip, long times) {
  LOCK;
  malloc_calls = (Fault){times > 0, -1, cudaErrorMemoryAllocation, skip, times};
}

// The device has no more than this; 0: as much as FAKECUDA_MEMORY_GB says.
API void fakecuda_limit_memory(size_t bytes) {
  LOCK;
  memory_limit = bytes ? bytes : SIZE_MAX;
}

// Launches of kernels and graphs on streams of `group` return `error`.
API void fakecuda_fail_launch(int group, int error, long skip, long times) {
  LOCK;
  launches = (Fault){times > 0, group, error, skip, times};
}

// A launch succeeds, and from when it runs every call returns `error`, as after an illegal address.
API void fakecuda_break_device(int group, int error, long skip) {
  LOCK;
  faults = (Fault){true, group, error, skip, 1};
}

// Nothing runs on the streams of `group`, until fakecuda_no_faults. Who waits for one sleeps.
API void fakecuda_hold(int group) {
  LOCK;
  held_group = group;
}

// Kernels on the streams of `group` take `factor` times as long as FAKECUDA_KERNEL_US says.
API void fakecuda_slow(int group, double factor) {
  LOCK;
  slow_group = group;
  slow_factor = factor;
}

// No fault is armed any more, and the device is whole.
API void fakecuda_no_faults(void) {
  LOCK;
  held_group = slow_group = NO_GROUP;
  malloc_calls = launches = faults = (Fault){0};
  memory_limit = SIZE_MAX;
  device_fault = cudaSuccess;
}
