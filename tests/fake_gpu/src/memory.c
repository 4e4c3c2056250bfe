// SPDX-License-Identifier: Apache-2.0
// Memory: "device" memory is mapped on the host and takes room only where it is written.
//
// Runtime API, "Memory Management" and "Unified Addressing". Freeing waits for all that is queued,
// as the driver does in practice: torch relies on it when it gives blocks back.
#include "fake.h"

#include <sys/mman.h>

enum { PAGE = 4096, DEVICE_RESERVED_BYTES = 512 << 20 };  // what a context itself takes

static Block *blocks;  // by address
static size_t num_blocks, room;
static size_t used_bytes;  // of DEVICE

size_t device_bytes_used(void) {
  return used_bytes;
}

static size_t index_after(const void *address) {  // of the first block that begins beyond it
  size_t low = 0, high = num_blocks;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (blocks[middle].address <= (const char *)address) low = middle + 1;
    else high = middle;
  }
  return low;
}

const Block *find_block(const void *address) {
  size_t i = index_after(address);
  if (!i) return NULL;
  const Block *block = &blocks[i - 1];
  return (const char *)address < block->address + block->bytes ? block : NULL;
}

static void add_block(void *address, size_t bytes, MemoryType type) {
  if (num_blocks == room) blocks = realloc(blocks, (room = room * 2 + 64) * sizeof *blocks);
  size_t i = index_after(address);
  memmove(&blocks[i + 1], &blocks[i], (num_blocks - i) * sizeof *blocks);
  blocks[i] = (Block){address, bytes, type};
  num_blocks++;
  if (type == DEVICE) used_bytes += bytes;
}

static bool take_block(void *address, MemoryType type, Block *taken) {
  size_t i = index_after(address);
  if (!i || blocks[i - 1].address != address || blocks[i - 1].type != type) return false;
  *taken = blocks[i - 1];
  memmove(&blocks[i - 1], &blocks[i], (num_blocks - i) * sizeof *blocks);
  num_blocks--;
  if (type == DEVICE) used_bytes -= taken->bytes;
  return true;
}

cudaError_t map_device_memory(void **address, size_t bytes) {
  size_t rounded = bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE;
  cudaError_t error = malloc_fault(used_bytes, rounded);
  if (error) return error;
  void *mapped = mmap(NULL, rounded, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return cudaErrorMemoryAllocation;
  add_block(mapped, rounded, DEVICE);
  *address = mapped;
  return cudaSuccess;
}

static cudaError_t unmap_device_memory(void *address) {
  Block block;
  if (!take_block(address, DEVICE, &block)) return cudaErrorInvalidValue;
  munmap(block.address, block.bytes);
  return cudaSuccess;
}

// Zeroing gives pages back, so that a KV cache of 70 GB stays virtual.
void fill(void *address, int value, size_t bytes) {
  const Block *block = find_block(address);
  if (value || bytes <= 1 << 20 || !block || block->type != DEVICE) {
    memset(address, value, bytes);
    return;
  }
  char *begin = address, *end = begin + bytes;
  char *first_page = (char *)(((uintptr_t)begin + PAGE - 1) / PAGE * PAGE);
  char *last_page = (char *)((uintptr_t)end / PAGE * PAGE);
  memset(begin, 0, (size_t)(first_page - begin));
  memset(last_page, 0, (size_t)(end - last_page));
  madvise(first_page, (size_t)(last_page - first_page), MADV_DONTNEED);
}

// ------------------------------------------------------------------ runtime API

API cudaError_t cudaMalloc(void **address, size_t bytes) {
  ENTER;
  if (unsafe_while_capturing()) return fail(cudaErrorStreamCaptureUnsupported);
  return fail(map_device_memory(address, bytes));
}

API cudaError_t cudaFree(void *address) {
  ENTER;
  if (!address) return cudaSuccess;
  if (unsafe_while_capturing()) return fail(cudaErrorStreamCaptureUnsupported);
  cudaError_t error = wait_for_device();
  return fail(error ? error : unmap_device_memory(address));
}

// Stream Ordered Memory Allocator: never waits here, since torch's caching allocator is what is
// used above it.
API cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream UNUSED) {
  ENTER;
  return fail(map_device_memory(address, bytes));
}

API cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
  ENTER;
  if (!find_block(address)) return fail(cudaErrorInvalidValue);
  cudaError_t error = wait_for_stream(stream_of(stream));
  return fail(error ? error : unmap_device_memory(address));
}

API cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  ENTER;
  size_t total = options()->memory_bytes, taken = used_bytes + DEVICE_RESERVED_BYTES;
  *free_bytes = taken < total ? total - taken : 0;
  *total_bytes = total;
  return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags UNUSED) {
  ENTER;
  if (unsafe_while_capturing()) return fail(cudaErrorStreamCaptureUnsupported);
  if (posix_memalign(address, PAGE, bytes ? bytes : 1)) return fail(cudaErrorMemoryAllocation);
  memset(*address, 0, bytes);
  add_block(*address, bytes, HOST);
  return cudaSuccess;
}

API cudaError_t cudaMallocHost(void **address, size_t bytes) {
  return cudaHostAlloc(address, bytes, 0);
}

static cudaError_t give_back_host(void *address, bool allocated) {
  cudaError_t error = wait_for_device();
  if (error) return error;
  Block block;
  if (!take_block(address, HOST, &block)) return cudaErrorInvalidValue;
  if (allocated) free(address);
  return cudaSuccess;
}

API cudaError_t cudaFreeHost(void *address) {
  ENTER;
  return address ? fail(give_back_host(address, true)) : cudaSuccess;
}

API cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags UNUSED) {
  ENTER;
  add_block(address, bytes, HOST);
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void *address) {
  ENTER;
  return fail(give_back_host(address, false));
}

API cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags UNUSED) {
  LOCK;
  if (!find_block(host)) return fail(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

API cudaError_t cudaHostGetFlags(unsigned *flags, void *address UNUSED) {
  *flags = 0;
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *address) {
  LOCK;
  const Block *block = find_block(address);
  memset(out, 0, sizeof *out);
  out->type = block ? (enum cudaMemoryType)block->type : cudaMemoryTypeUnregistered;
  out->device = block ? 0 : cudaInvalidDeviceId;
  out->hostPointer = block && block->type == DEVICE ? NULL : (void *)address;
  out->devicePointer = block ? (void *)address : NULL;
  return cudaSuccess;
}

// ------------------------------------------------------------------ memory pools: only named

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device UNUSED) {
  *pool = (cudaMemPool_t)fake_primary;
  return cudaSuccess;
}

API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool UNUSED,
                                        enum cudaMemPoolAttr attribute UNUSED, void *v UNUSED) {
  return cudaSuccess;
}

API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool UNUSED,
                                        enum cudaMemPoolAttr attribute UNUSED, void *value) {
  *(unsigned long long *)value = 0;
  return cudaSuccess;
}

API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool UNUSED,
                                     const struct cudaMemAccessDesc *list UNUSED, size_t n UNUSED) {
  return cudaSuccess;
}

API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool UNUSED, size_t bytes UNUSED) {
  return cudaSuccess;
}

// ------------------------------------------------------------------ driver API

API CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr address) {
  LOCK;
  const Block *block = find_block((void *)address);
  if (!block) {
    trace("not ours address=%p", (void *)address);
    return CUDA_ERROR_INVALID_VALUE;
  }
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(CUdeviceptr *)out = address; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)out = block->type; break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)out = PRIMARY; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(char **)out = block->address; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)out = block->bytes; break;
    default: *(int *)out = 0;
  }
  return CUDA_SUCCESS;
}

API CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
  LOCK;
  const Block *block = find_block((void *)address);
  if (!block) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = (CUdeviceptr)block->address;
  if (bytes) *bytes = block->bytes;
  return CUDA_SUCCESS;
}
