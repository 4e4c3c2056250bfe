// SPDX-License-Identifier: Apache-2.0
// Kernels and host functions: how they are registered, and launched on streams.
//
// nvcc's code registers each kernel with the runtime by the address of a host function. Triton
// loads cubins by the driver. What a kernel would do is vllm_kernels.c's to say.
#include "fake.h"

#include <elf.h>

// ------------------------------------------------------------------ kernels by host function

static Kernel **table;  // open addressing
static size_t table_size, table_used;

static Kernel **slot(const void *host) {
  size_t i = ((uintptr_t)host * 0x9E3779B97F4A7C15ull >> 20) & (table_size - 1);
  while (table[i] && table[i]->host != host) i = (i + 1) & (table_size - 1);
  return &table[i];
}

static void grow(void) {
  Kernel **old = table;
  size_t old_size = table_size;
  table_size = old_size ? old_size * 2 : 1 << 16;
  table = calloc(table_size, sizeof *table);
  for (size_t i = 0; i < old_size; i++)
    if (old[i]) *slot(old[i]->host) = old[i];
  free(old);
}

Kernel *kernel_of(const void *function) {
  LOCK;
  Kernel *found = table ? *slot(function) : NULL;
  return found ? found : (Kernel *)function;
}

API void **__cudaRegisterFatBinary(void *code) {
  void **handle = malloc(sizeof *handle);
  *handle = code;
  return handle;
}

API void __cudaRegisterFatBinaryEnd(void **handle UNUSED) {}

API void __cudaUnregisterFatBinary(void **handle UNUSED) {}

API char __cudaInitModule(void **handle UNUSED) {
  return 1;
}

API void __cudaRegisterFunction(void **handle UNUSED, const char *host, char *device UNUSED,
                                const char *name, int limit UNUSED, uint3 *tid UNUSED,
                                uint3 *bid UNUSED, dim3 *block UNUSED, dim3 *grid UNUSED,
                                int *warp UNUSED) {
  LOCK;
  if (2 * ++table_used > table_size) grow();
  Kernel *kernel = calloc(1, sizeof *kernel);
  kernel->host = host;
  kernel->name = name;
  know_torch_kernel(kernel);
  *slot(host) = kernel;
}

// ------------------------------------------------------------------ device variables

typedef struct {
  const void *host;
  void *device;
  size_t bytes;
} Variable;
static Variable *variables;
static int num_variables;

API void __cudaRegisterVar(void **handle UNUSED, char *host, char *device UNUSED,
                           const char *name UNUSED, int external UNUSED, size_t bytes,
                           int constant UNUSED, int global UNUSED) {
  LOCK;
  variables = realloc(variables, (size_t)(num_variables + 1) * sizeof *variables);
  variables[num_variables++] = (Variable){host, NULL, bytes};
}

API cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  ENTER;
  for (int i = 0; i < num_variables; i++) {
    Variable *variable = &variables[i];
    if (variable->host != symbol) continue;
    if (!variable->device) {
      cudaError_t error = map_device_memory(&variable->device, variable->bytes);
      if (error) return fail(error);
    }
    *address = variable->device;
    return cudaSuccess;
  }
  return fail(cudaErrorInvalidSymbol);
}

API cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t at,
                                   enum cudaMemcpyKind kind) {
  void *device;
  cudaError_t error = cudaGetSymbolAddress(&device, symbol);
  return error ? error : cudaMemcpy((char *)device + at, from, bytes, kind);
}

// ------------------------------------------------------------------ cubins

static unsigned adler32(const char *bytes, size_t count) {  // RFC 1950, 9
  unsigned a = 1, b = 0;
  for (size_t i = 0; i < count; i++) {
    a = (a + (unsigned char)bytes[i]) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

// CUDA Binary Utilities, "ELF": .nv.info.NAME lists attributes; 0x17 (EIATTR_KPARAM_INFO, as
// `cuobjdump -elf` shows it) has a parameter's ordinal, and its size from bit 18 of the last word.
void read_parameter_sizes(Kernel *kernel, const char *cubin) {
  if (!cubin || memcmp(cubin, ELFMAG "\2", SELFMAG + 1)) return;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)cubin;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(cubin + header->e_shoff);
  const char *names = cubin + sections[header->e_shstrndx].sh_offset;
  kernel->code = adler32(cubin, header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    if (strncmp(name, ".nv.info.", 9) || strcmp(name + 9, kernel->name)) continue;
    const unsigned char *at = (const unsigned char *)cubin + sections[i].sh_offset;
    const unsigned char *end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      int format = at[0], attribute = at[1];
      int size = format == 4 ? at[2] | at[3] << 8 : 0;
      if (attribute == 0x17 && size >= 12) {
        int ordinal = at[8] | at[9] << 8;
        unsigned word;
        memcpy(&word, at + 12, sizeof word);
        if (ordinal < MAX_PARAMETERS) {
          kernel->sizes[ordinal] = (unsigned short)(word >> 18);
          if (ordinal >= kernel->num_parameters) kernel->num_parameters = ordinal + 1;
        }
      }
      at += 4 + size;
    }
  }
}

// ------------------------------------------------------------------ launches

// A launch's arguments are read when it is called, not when it runs.
static void **copy_arguments(const Kernel *kernel, void **arguments) {
  if (!arguments || !kernel->num_parameters) return NULL;
  size_t count = (size_t)kernel->num_parameters, bytes = count * sizeof(void *);
  for (size_t i = 0; i < count; i++) bytes += (kernel->sizes[i] + 15u) / 16 * 16;
  void **copy = malloc(bytes + 16);
  char *at = (char *)(((uintptr_t)(copy + count) + 15) / 16 * 16);
  for (size_t i = 0; i < count; i++) {
    copy[i] = at;
    memcpy(at, arguments[i], kernel->sizes[i]);
    at += (kernel->sizes[i] + 15u) / 16 * 16;
  }
  return copy;
}

cudaError_t queue_kernel(Kernel *kernel, cudaStream_t handle, const unsigned *grid,
                         void **arguments) {
  ENTER;
  Stream *stream = stream_of(handle);
  Work work = {.kind = KERNEL, .kernel = kernel};
  cudaError_t error = check_stream(stream);
  if (!error) error = launch_fault(stream, &work.fault);
  if (error) return fail(error);
  counters.kernels++;
  if (grid) memcpy(work.grid, grid, sizeof work.grid);
  work.arguments = copy_arguments(kernel, arguments);
  if (stream->capture) capture_work(stream, work);
  else enqueue(stream, work, (Points){0});
  return cudaSuccess;
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configurations[8];
static __thread int num_configurations;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                         struct CUstream_st *stream) {
  int i = num_configurations++;
  configurations[i].grid = grid;
  configurations[i].block = block;
  configurations[i].shared = shared;
  configurations[i].stream = stream;
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  int i = --num_configurations;
  *grid = configurations[i].grid;
  *block = configurations[i].block;
  *shared = configurations[i].shared;
  *(cudaStream_t *)stream = configurations[i].stream;
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block UNUSED,
                                 void **arguments, size_t shared UNUSED, cudaStream_t stream) {
  return queue_kernel(kernel_of(function), stream, &grid.x, arguments);
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block UNUSED,
                                   void **arguments, size_t shared UNUSED, cudaStream_t stream) {
  return queue_kernel(kernel_of(kernel), stream, &grid.x, arguments);
}

API cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block UNUSED,
                                            void **arguments, size_t shared UNUSED,
                                            cudaStream_t stream) {
  return queue_kernel(kernel_of(function), stream, &grid.x, arguments);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function,
                                    void **arguments) {
  return queue_kernel(kernel_of(function), configuration->stream, &configuration->gridDim.x,
                      arguments);
}

// ------------------------------------------------------------------ host functions

API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data) {
  ENTER;
  Stream *stream = stream_of(handle);
  cudaError_t error = check_stream(stream);
  if (error) return fail(error);
  Work work = {.kind = HOST_FUNCTION, .function = function, .data = data};
  if (stream->capture) capture_work(stream, work);
  else enqueue(stream, work, (Points){0});
  return cudaSuccess;
}

typedef struct {
  cudaStream_t stream;
  cudaStreamCallback_t function;
  void *data;
} Callback;

static void call_back(void *data) {
  Callback callback = *(Callback *)data;
  free(data);
  callback.function(callback.stream, device_fault, callback.data);
}

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                      void *data, unsigned flags UNUSED) {
  Callback *callback = malloc(sizeof *callback);
  *callback = (Callback){stream, function, data};
  return cudaLaunchHostFunc(stream, call_back, callback);
}

// Says which bytes the host function that is running reads or writes, for races.py. Elsewhere it
// says nothing.
API void fakecuda_access(const void *address, size_t bytes, int is_write) {
  unsigned long number = running_item();
  if (number)
    trace("access n=%lu node=%d %c:%p+%zu", number, running_node(), is_write ? 'w' : 'r', address,
          bytes);
}

// Names the host function that is running, for the trace.
API void fakecuda_name(const char *name) {
  unsigned long number = running_item();
  if (number) trace("name n=%lu node=%d name=%s", number, running_node(), name);
}

// ------------------------------------------------------------------ questions about kernels

API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  LOCK;
  *kernel = table ? (cudaKernel_t)*slot(function) : NULL;
  return *kernel ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction);
}

API cudaError_t cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return __cudaGetKernel(kernel, function);
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *f UNUSED) {
  LOCK;
  need_context();
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 32;
  out->binaryVersion = out->ptxVersion = 90;
  out->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void *function UNUSED,
                                     enum cudaFuncAttribute attribute UNUSED, int value UNUSED) {
  return cudaSuccess;
}

API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel UNUSED,
                                                enum cudaFuncAttribute attribute UNUSED,
                                                int value UNUSED, int device UNUSED) {
  return cudaSuccess;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", 9.0: 2048
// threads and 228 KB of shared memory an SM, of which a block may have 227. At most 16 blocks
// are answered: few kernels fit more.
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function UNUSED, int threads, size_t shared, unsigned flags UNUSED) {
  *blocks = 2048 / (threads ? threads : 1);
  if (*blocks > 16) *blocks = 16;
  int by_memory = shared ? (int)((227 << 10) / shared) : *blocks;
  if (by_memory < *blocks) *blocks = by_memory;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function,
                                                              int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}

API cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, const void *function UNUSED,
                                               const cudaLaunchConfig_t *c UNUSED) {
  *clusters = options()->num_sms / 2;
  return cudaSuccess;
}

API cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code UNUSED,
                                    enum cudaJitOption *jit UNUSED, void **jit_values UNUSED,
                                    unsigned num_jit UNUSED, enum cudaLibraryOption *o UNUSED,
                                    void **values UNUSED, unsigned num_options UNUSED) {
  *library = calloc(1, 64);
  return cudaSuccess;
}

API cudaError_t cudaLibraryUnload(cudaLibrary_t library UNUSED) {
  return cudaSuccess;
}

API cudaError_t cudaLibraryGetKernel(cudaKernel_t *out, cudaLibrary_t library UNUSED,
                                     const char *name) {
  Kernel *kernel = calloc(1, sizeof *kernel);
  kernel->name = strdup(name);
  *out = (cudaKernel_t)kernel;
  return cudaSuccess;
}
