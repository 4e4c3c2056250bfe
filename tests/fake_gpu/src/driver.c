// SPDX-License-Identifier: Apache-2.0
// Driver API entry points that are the runtime's under another name (Runtime API, "Interactions
// with the CUDA Driver API": streams, events and memory are the same, and so are error numbers
// where both have one), modules, and how functions are looked up.
#include "fake.h"

#include <dlfcn.h>

// Driver API: CUDA_ERROR_INVALID_CONTEXT where no context is current.
#define NEED_CONTEXT \
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT

// ------------------------------------------------------------------ contexts

API CUresult cuCtxGetDevice(CUdevice *device) {
  NEED_CONTEXT;
  *device = 0;
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetLimit(size_t *value, CUlimit limit UNUSED) {
  *value = 1024;
  return CUDA_SUCCESS;
}

API CUresult cuCtxSetLimit(CUlimit limit UNUSED, size_t value UNUSED) {
  return CUDA_SUCCESS;
}

API CUresult cuCtxSynchronize(void) {
  NEED_CONTEXT;
  return (CUresult)cudaDeviceSynchronize();
}

API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  return (CUresult)cudaDeviceGetStreamPriorityRange(least, greatest);
}

API CUresult cuCtxGetApiVersion(CUcontext context UNUSED, unsigned *version) {
  *version = 3020;
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------ modules

typedef struct {
  const char *code;
} Module;

API CUresult cuModuleLoadData(CUmodule *out, const void *code) {
  NEED_CONTEXT;
  Module *module = calloc(1, sizeof *module);
  module->code = code;
  *out = (CUmodule)module;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule *out, const void *code, unsigned count UNUSED,
                                CUjit_option *jit UNUSED, void **values UNUSED) {
  return cuModuleLoadData(out, code);
}

API CUresult cuModuleLoad(CUmodule *out, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  size_t size = (size_t)ftell(file);
  rewind(file);
  char *code = malloc(size + 1);
  size = fread(code, 1, size, file);
  fclose(file);
  return cuModuleLoadData(out, code);
}

API CUresult cuModuleUnload(CUmodule module UNUSED) {
  return CUDA_SUCCESS;
}

API CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
  Kernel *kernel = calloc(1, sizeof *kernel);
  kernel->name = strdup(name);
  read_parameter_sizes(kernel, ((Module *)module)->code);
  trace("kernel name=%s parameters=%d code=%x", name, kernel->num_parameters,
        kernel->code);
  *out = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f UNUSED) {
  switch (which) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = 90; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction f UNUSED, CUfunction_attribute which UNUSED,
                                int value UNUSED) {
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetCacheConfig(CUfunction f UNUSED, CUfunc_cache configuration UNUSED) {
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------ launches

API CUresult cuLaunchKernelEx(const CUlaunchConfig *configuration, CUfunction function,
                              void **arguments, void **extra UNUSED) {
  NEED_CONTEXT;
  cudaError_t last = peek_last_error();
  return leaving_last_error(last, queue_kernel(kernel_of(function), configuration->hStream,
                                               &configuration->gridDimX, arguments));
}

API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned x UNUSED, unsigned y UNUSED, unsigned z UNUSED,
                            unsigned shared UNUSED, CUstream stream, void **arguments,
                            void **extra UNUSED) {
  NEED_CONTEXT;
  unsigned grid[3] = {grid_x, grid_y, grid_z};
  cudaError_t last = peek_last_error();
  return leaving_last_error(last, queue_kernel(kernel_of(function), stream, grid, arguments));
}

API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                       unsigned grid_z, unsigned x, unsigned y, unsigned z,
                                       unsigned shared, CUstream stream, void **arguments) {
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, x, y, z, shared, stream, arguments, NULL);
}

API CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *data) {
  NEED_CONTEXT;
  return (CUresult)cudaLaunchHostFunc(stream, function, data);
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function,
                                                         int threads, size_t shared) {
  return (CUresult)cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function UNUSED,
                                          const CUlaunchConfig *configuration UNUSED) {
  return (CUresult)cudaOccupancyMaxActiveClusters(clusters, function, NULL);
}

API CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type UNUSED, cuuint32_t rank UNUSED, void *address,
    const cuuint64_t *dim UNUSED, const cuuint64_t *stride UNUSED, const cuuint32_t *box UNUSED,
    const cuuint32_t *element UNUSED, CUtensorMapInterleave interleave UNUSED,
    CUtensorMapSwizzle swizzle UNUSED, CUtensorMapL2promotion promotion UNUSED,
    CUtensorMapFloatOOBfill fill UNUSED) {
  memset(map, 0, sizeof *map);
  memcpy(map, &address, sizeof address);
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------ memory

API CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
  NEED_CONTEXT;
  return (CUresult)cudaMalloc((void **)address, bytes);
}

API CUresult cuMemFree(CUdeviceptr address) {
  NEED_CONTEXT;
  return (CUresult)cudaFree((void *)address);
}

API CUresult cuMemAllocHost(void **address, size_t bytes) {
  NEED_CONTEXT;
  return (CUresult)cudaMallocHost(address, bytes);
}

API CUresult cuMemFreeHost(void *address) {
  NEED_CONTEXT;
  return (CUresult)cudaFreeHost(address);
}

API CUresult cuMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  NEED_CONTEXT;
  return (CUresult)cudaMemGetInfo(free_bytes, total_bytes);
}

API CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
  return (CUresult)cudaMemcpy((void *)to, from, bytes, cudaMemcpyHostToDevice);
}

API CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
  return (CUresult)cudaMemcpy(to, (void *)from, bytes, cudaMemcpyDeviceToHost);
}

API CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
  return (CUresult)cudaMemcpyAsync((void *)to, from, bytes, cudaMemcpyHostToDevice, stream);
}

API CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return (CUresult)cudaMemcpyAsync(to, (void *)from, bytes, cudaMemcpyDeviceToHost, stream);
}

// ------------------------------------------------------------------ streams and events

API CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  NEED_CONTEXT;
  return (CUresult)cudaStreamCreateWithFlags(stream, flags);
}

API CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
  NEED_CONTEXT;
  return (CUresult)cudaStreamCreateWithPriority(stream, flags, priority);
}

API CUresult cuStreamDestroy(CUstream stream) {
  NEED_CONTEXT;
  return (CUresult)cudaStreamDestroy(stream);
}

API CUresult cuStreamSynchronize(CUstream stream) {
  NEED_CONTEXT;
  return (CUresult)cudaStreamSynchronize(stream);
}

API CUresult cuStreamQuery(CUstream stream) {
  NEED_CONTEXT;
  return (CUresult)cudaStreamQuery(stream);
}

API CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  NEED_CONTEXT;
  return (CUresult)cudaStreamWaitEvent(stream, event, flags);
}

API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  NEED_CONTEXT;
  return (CUresult)cudaStreamIsCapturing(stream, (enum cudaStreamCaptureStatus *)status);
}

API CUresult cuStreamGetPriority(CUstream stream, int *priority) {
  return (CUresult)cudaStreamGetPriority(stream, priority);
}

API CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) {
  const Green *green = stream_of(stream)->green;
  *context = green ? (CUcontext)green : PRIMARY;
  return CUDA_SUCCESS;
}

API CUresult cuEventCreate(CUevent *event, unsigned flags) {
  NEED_CONTEXT;
  return (CUresult)cudaEventCreateWithFlags(event, flags);
}

API CUresult cuEventDestroy(CUevent event) {
  return (CUresult)cudaEventDestroy(event);
}

API CUresult cuEventRecord(CUevent event, CUstream stream) {
  NEED_CONTEXT;
  return (CUresult)cudaEventRecord(event, stream);
}

API CUresult cuEventSynchronize(CUevent event) {
  return (CUresult)cudaEventSynchronize(event);
}

API CUresult cuEventQuery(CUevent event) {
  return (CUresult)cudaEventQuery(event);
}

API CUresult cuEventElapsedTime(float *ms, CUevent begin, CUevent end) {
  return (CUresult)cudaEventElapsedTime(ms, begin, end);
}

// ------------------------------------------------------------------ errors and look-up

API CUresult cuGetErrorName(CUresult error, const char **name) {
  *name = cudaGetErrorName((cudaError_t)error);
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}

API CUresult cuGetExportTable(const void **table, const CUuuid *id UNUSED) {
  *table = NULL;
  return CUDA_ERROR_NOT_FOUND;
}

// Driver API, "Error Log Management Functions": there is nothing to log. torch 2.14 asks.
API CUresult cuLogsRegisterCallback(CUlogsCallback callback UNUSED, void *data UNUSED,
                                    CUlogsCallbackHandle *handle) {
  if (handle) *handle = (CUlogsCallbackHandle)fake_primary;
  return CUDA_SUCCESS;
}

API CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle handle UNUSED) {
  return CUDA_SUCCESS;
}

// Functions that an older driver lacks (release notes of CUDA 12.4 and 12.5).
static const struct {
  const char *name;
  int since;
} newer[] = {
  {"cuDeviceGetDevResource", 12040},      {"cuDevSmResourceSplitByCount", 12040},
  {"cuDevResourceGenerateDesc", 12040},   {"cuGreenCtxCreate", 12040},
  {"cuGreenCtxDestroy", 12040},           {"cuCtxFromGreenCtx", 12040},
  {"cuGreenCtxGetDevResource", 12040},    {"cuStreamGetGreenCtx", 12040},
  {"cuGreenCtxStreamCreate", 12050},
};

static void *find_function(const char *name) {
  for (size_t i = 0; i < sizeof newer / sizeof *newer; i++)
    if (!strcmp(name, newer[i].name) && options()->driver < newer[i].since) return NULL;
  static void *self;
  Dl_info here;
  if (!self && dladdr((void *)find_function, &here))
    self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  void *found = NULL;
  for (int version = 4; version >= 1 && !found; version--) {
    char symbol[128];
    snprintf(symbol, sizeof symbol, version > 1 ? "%s_v%d" : "%s", name, version);
    found = dlsym(self, symbol);
  }
  if (!found) trace("no function name=%s", name);
  return found;
}

API CUresult cuGetProcAddress(const char *name, void **out, int version UNUSED,
                              cuuint64_t flags UNUSED, CUdriverProcAddressQueryResult *status) {
  *out = find_function(name);
  if (status)
    *status = *out ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out,
                                                 unsigned version UNUSED,
                                                 unsigned long long flags UNUSED,
                                                 enum cudaDriverEntryPointQueryResult *status) {
  *out = find_function(name);
  if (status) *status = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPoint(const char *name, void **out, unsigned long long flags,
                                        enum cudaDriverEntryPointQueryResult *status) {
  return cudaGetDriverEntryPointByVersion(name, out, 0, flags, status);
}
