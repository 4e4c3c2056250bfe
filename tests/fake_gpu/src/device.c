// SPDX-License-Identifier: Apache-2.0
// What the device and the runtime say about themselves: an H100 SXM, by NVIDIA's data sheet and
// the programming guide's "Technical Specifications per Compute Capability", 9.0.
#include "fake.h"

enum {
  RUNTIME = 13000,
  SHARED_PER_SM = 228 << 10,
  SHARED_PER_BLOCK_OPTIN = 227 << 10,
  L2_BYTES = 50 << 20,
};
static const char NAME[] = "NVIDIA H100 80GB HBM3";
static const char UUID[16] = "fakecuda-h100-0";

char fake_primary[64];
bool primary_active;

// ------------------------------------------------------------------ contexts
// Driver API, "Context Management": each thread has a stack of contexts. Runtime API, "Interactions
// with the CUDA Driver API": the runtime makes the primary context current where none is.

static __thread CUcontext stack[16];
static __thread int depth;

CUcontext current_context(void) {
  return depth ? stack[depth - 1] : NULL;
}

void need_context(void) {
  primary_active = true;
  if (current_context()) return;
  if (!depth) depth = 1;
  stack[depth - 1] = PRIMARY;
}

API CUresult cuCtxSetCurrent(CUcontext context) {
  if (!depth) depth = 1;
  stack[depth - 1] = context;
  return CUDA_SUCCESS;
}

API CUresult cuCtxPushCurrent(CUcontext context) {
  if (depth == (int)(sizeof stack / sizeof *stack)) return CUDA_ERROR_OUT_OF_MEMORY;
  stack[depth++] = context;
  return CUDA_SUCCESS;
}

API CUresult cuCtxPopCurrent(CUcontext *context) {
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  CUcontext popped = stack[--depth];
  if (context) *context = popped;
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------ attributes

static int attribute(CUdevice_attribute which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return options()->num_sms;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return L2_BYTES;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return SHARED_PER_SM;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return SHARED_PER_BLOCK_OPTIN;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE: return 32768000;
    case CU_DEVICE_ATTRIBUTE_MAX_ACCESS_POLICY_WINDOW_SIZE: return 134213632;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
    // What it can do. Not on this list, so 0: multicast, fabric handles, GPU direct RDMA.
    case CU_DEVICE_ATTRIBUTE_GPU_OVERLAP:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_ECC_ENABLED:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_LOCAL_L1_CACHE_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_HOST_NATIVE_ATOMIC_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return 1;
    default: return 0;
  }
}

// ------------------------------------------------------------------ runtime API

API cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}

API cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
  if (device) return fail(cudaErrorInvalidDevice);
  need_context();
  return cudaSuccess;
}

// The runtime's attributes have the driver's numbers.
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  if (device) return fail(cudaErrorInvalidDevice);
  *value = attribute((CUdevice_attribute)which);
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  if (device) return fail(cudaErrorInvalidDevice);
  memset(out, 0, sizeof *out);
  strcpy(out->name, NAME);
  memcpy(&out->uuid, UUID, sizeof UUID);
  out->totalGlobalMem = options()->memory_bytes;
  out->sharedMemPerBlock = 48 << 10;
  out->regsPerBlock = 65536;
  out->warpSize = 32;
  out->memPitch = 2147483647;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->totalConstMem = 65536;
  out->major = 9;
  out->textureAlignment = 512;
  out->multiProcessorCount = options()->num_sms;
  out->canMapHostMemory = 1;
  out->concurrentKernels = 1;
  out->asyncEngineCount = 3;
  out->unifiedAddressing = 1;
  out->memoryBusWidth = 5120;
  out->l2CacheSize = L2_BYTES;
  out->persistingL2CacheMaxSize = 32768000;
  out->maxThreadsPerMultiProcessor = 2048;
  out->streamPrioritiesSupported = 1;
  out->globalL1CacheSupported = 1;
  out->localL1CacheSupported = 1;
  out->sharedMemPerMultiprocessor = SHARED_PER_SM;
  out->regsPerMultiprocessor = 65536;
  out->managedMemory = 1;
  out->concurrentManagedAccess = 1;
  out->cooperativeLaunch = 1;
  out->sharedMemPerBlockOptin = SHARED_PER_BLOCK_OPTIN;
  out->maxBlocksPerMultiProcessor = 32;
  out->reservedSharedMemPerBlock = 1024;
  out->memoryPoolsSupported = 1;
  out->clusterLaunch = 1;
  out->hostRegisterSupported = 1;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int *can, int device UNUSED, int peer UNUSED) {
  *can = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device UNUSED) {
  snprintf(out, (size_t)size, "0000:00:00.0");
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int *version) {
  *version = options()->driver;
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = RUNTIME;
  return cudaSuccess;
}

API cudaError_t cudaProfilerStart(void) {
  return cudaSuccess;
}

API cudaError_t cudaProfilerStop(void) {
  return cudaSuccess;
}

API cudaError_t cudaDeviceReset(void) {
  return cudaSuccess;
}

// ------------------------------------------------------------------ driver API

static bool initialized;
#define NEED_INIT \
  if (!initialized && !primary_active) return CUDA_ERROR_NOT_INITIALIZED

API CUresult cuInit(unsigned flags UNUSED) {
  initialized = true;
  return CUDA_SUCCESS;
}

API CUresult cuDriverGetVersion(int *version) {
  *version = options()->driver;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int *count) {
  NEED_INIT;
  *count = 1;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  NEED_INIT;
  if (ordinal) return CUDA_ERROR_INVALID_DEVICE;
  *device = 0;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char *out, int size, CUdevice device UNUSED) {
  snprintf(out, (size_t)size, "%s", NAME);
  return CUDA_SUCCESS;
}

// Driver API, "Device Management": [domain]:[bus]:[device].[function], hexadecimal.
API CUresult cuDeviceGetByPCIBusId(CUdevice *out, const char *id) {
  unsigned domain, bus, device, function;
  if (sscanf(id, "%x:%x:%x.%x", &domain, &bus, &device, &function) != 4)
    return CUDA_ERROR_INVALID_VALUE;
  if (domain || bus || device || function) return CUDA_ERROR_INVALID_DEVICE;
  *out = 0;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid(CUuuid *out, CUdevice device UNUSED) {
  memcpy(out, UUID, sizeof UUID);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device UNUSED) {
  *bytes = options()->memory_bytes;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device UNUSED) {
  NEED_INIT;
  *value = attribute(which);
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device UNUSED) {
  NEED_INIT;
  primary_active = true;
  *context = PRIMARY;
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRelease(CUdevice device UNUSED) {
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice device UNUSED, unsigned *flags, int *active) {
  *flags = 0;
  *active = primary_active;
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext *context) {
  NEED_INIT;
  *context = current_context();
  return CUDA_SUCCESS;
}
