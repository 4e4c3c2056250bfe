// SPDX-License-Identifier: Apache-2.0
// Green contexts: Driver API, "Green Contexts".
//
// SMs have numbers here, which the real driver keeps to itself, so that two groups can be seen to
// overlap. A CUcontext made from a green context is the green context itself.
#include "fake.h"

// Since CUDA 13.1; torch 2.13's headers are of 13.0.
enum { WORK_QUEUES = 1000, DEVICE_QUEUES = 8 };
typedef struct {
  CUdevice device;
  unsigned limit;
  int scope;
} Queues;

static Queues *queues_of(CUdevResource *resource) {
  return (Queues *)&resource->sm;
}

static int *first_of(CUdevResource *resource) {
  return (int *)resource->_internal_padding;
}

unsigned long long green_id(const Stream *stream) {
  return stream && stream->green ? stream->green->id : 0;
}

int first_sm(const Stream *stream) {
  return stream && stream->green ? *first_of(&stream->green->sms) : 0;
}

int count_sms(const Stream *stream) {
  return stream && stream->green ? (int)stream->green->sms.sm.smCount : options()->num_sms;
}

// ------------------------------------------------------------------ resources

static void describe_sms(CUdevResource *out, int first, int count) {
  memset(out, 0, sizeof *out);
  out->type = count ? CU_DEV_RESOURCE_TYPE_SM : CU_DEV_RESOURCE_TYPE_INVALID;
  *first_of(out) = first;
  out->sm.smCount = (unsigned)count;
  if (options()->driver < 13000) return;
  out->sm.minSmPartitionSize = (unsigned)options()->min_sms;
  out->sm.smCoscheduledAlignment = (unsigned)options()->align_sms;
}

API CUresult cuDeviceGetDevResource(CUdevice device UNUSED, CUdevResource *out,
                                    CUdevResourceType type) {
  memset(out, 0, sizeof *out);
  if (type == CU_DEV_RESOURCE_TYPE_SM) {
    describe_sms(out, 0, options()->num_sms);
    return CUDA_SUCCESS;
  }
  if ((int)type != WORK_QUEUES || !options()->work_queues)
    return CUDA_ERROR_INVALID_RESOURCE_TYPE;
  out->type = type;
  queues_of(out)->limit = DEVICE_QUEUES;
  return CUDA_SUCCESS;
}

// Groups of `at_least` SMs, rounded up to what the architecture allows; the remainder has all
// others. Only the whole device is split here, which the real driver does not ask for.
API CUresult cuDevSmResourceSplitByCount(CUdevResource *out, unsigned *count,
                                         const CUdevResource *in, CUdevResource *remainder,
                                         unsigned flags, unsigned at_least) {
  int all = options()->num_sms, align = options()->align_sms;
  if (in->type != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
  if (at_least > in->sm.smCount || flags) return CUDA_ERROR_INVALID_VALUE;
  if ((int)in->sm.smCount != all) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
  int size = (int)at_least < options()->min_sms ? options()->min_sms : (int)at_least;
  size = (size + align - 1) / align * align;
  unsigned most = (unsigned)(all / size);
  if (!most) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
  if (!out) {
    *count = most;
    return CUDA_SUCCESS;
  }
  if (*count > most) *count = most;
  for (unsigned i = 0; i < *count; i++) describe_sms(&out[i], (int)i * size, size);
  int used = (int)*count * size;
  if (remainder) describe_sms(remainder, used, all - used);
  return CUDA_SUCCESS;
}

API CUresult cuDevResourceGenerateDesc(CUdevResourceDesc *out, CUdevResource *resources,
                                       unsigned count) {
  Green *green = calloc(1, sizeof *green);
  for (unsigned i = 0; i < count; i++) {
    if (resources[i].type == CU_DEV_RESOURCE_TYPE_SM) {
      green->sms = resources[i];
    } else if ((int)resources[i].type == WORK_QUEUES && options()->work_queues) {
      green->has_queues = true;
      green->queue_limit = (int)queues_of(&resources[i])->limit;
      green->queue_scope = queues_of(&resources[i])->scope;
    } else {
      free(green);
      return CUDA_ERROR_INVALID_RESOURCE_TYPE;
    }
  }
  *out = (CUdevResourceDesc)green;
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------ contexts

API CUresult cuGreenCtxCreate(CUgreenCtx *out, CUdevResourceDesc description,
                              CUdevice device UNUSED, unsigned flags) {
  LOCK;
  static unsigned long long next_id = 1;
  if (flags != CU_GREEN_CTX_DEFAULT_STREAM) return CUDA_ERROR_INVALID_VALUE;
  Green *green = malloc(sizeof *green);
  *green = *(Green *)description;
  green->alive = true;
  green->id = next_id++;
  primary_active = true;
  counters.green_contexts++;
  trace("green id=%llu first_sm=%d sms=%u queues=%d limit=%d scope=%d", green->id,
        *first_of(&green->sms), green->sms.sm.smCount, green->has_queues, green->queue_limit,
        green->queue_scope);
  *out = (CUgreenCtx)green;
  return CUDA_SUCCESS;
}

// Its streams stay, for cuStreamDestroy; any other call with them is CUDA_ERROR_STREAM_DETACHED,
// and their captures are invalid.
API CUresult cuGreenCtxDestroy(CUgreenCtx context) {
  LOCK;
  Green *green = (Green *)context;
  if (!green->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  green->alive = false;
  counters.green_contexts--;
  for (int i = 0; i < num_streams; i++) {
    if (streams[i]->green != green) continue;
    streams[i]->detached = true;
    if (streams[i]->capture) streams[i]->capture->invalid = true;
  }
  trace("destroy green=%llu", green->id);
  return CUDA_SUCCESS;
}

API CUresult cuCtxFromGreenCtx(CUcontext *out, CUgreenCtx context) {
  *out = (CUcontext)context;
  return CUDA_SUCCESS;
}

API CUresult cuGreenCtxGetDevResource(CUgreenCtx context, CUdevResource *out,
                                      CUdevResourceType type) {
  if (type != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
  *out = ((Green *)context)->sms;
  return CUDA_SUCCESS;
}

API CUresult cuGreenCtxStreamCreate(CUstream *out, CUgreenCtx context, unsigned flags,
                                    int priority) {
  LOCK;
  Green *green = (Green *)context;
  if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  if (!green->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  return (CUresult)make_stream(out, flags, priority, green);
}

API CUresult cuStreamGetGreenCtx(CUstream stream, CUgreenCtx *context) {
  *context = (CUgreenCtx)stream_of(stream)->green;
  return CUDA_SUCCESS;
}
