// SPDX-License-Identifier: Apache-2.0
// cuBLAS and cuBLASLt: handles remember what they are told, and products are launches that do
// nothing. build.py generates the products, by name. (cuBLAS: "cuBLAS Helper Function Reference";
// "cuBLASLt API Reference".)
#include "fake.h"

enum { VERSION = 130100, NOT_INITIALIZED = 1, EXECUTION_FAILED = 13 };

typedef struct {
  cudaStream_t stream;
  int math_mode, pointer_mode;
} Handle;

static int product(const char *name, cudaStream_t stream) {
  static Kernel kernels[256];  // by name, for the trace; they live for ever
  static int count;
  int i = 0;
  {
    LOCK;
    while (i < count && strcmp(kernels[i].name, name)) i++;
    if (i == 256) impossible("more than 256 cuBLAS products");
    if (i == count) kernels[count++].name = name;
  }
  return queue_kernel(&kernels[i], stream, NULL, NULL) ? EXECUTION_FAILED : 0;
}

API int fakecuda_blas(Handle *handle, const char *name) {  // the generated products
  return handle ? product(name, handle->stream) : NOT_INITIALIZED;
}

// ------------------------------------------------------------------ cuBLAS

API int cublasCreate_v2(Handle **handle) {
  LOCK;
  need_context();
  *handle = calloc(1, sizeof **handle);
  return 0;
}

API int cublasDestroy_v2(Handle *handle) {
  free(handle);
  return 0;
}

API int cublasSetStream_v2(Handle *handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}

API int cublasGetStream_v2(Handle *handle, cudaStream_t *stream) {
  *stream = handle->stream;
  return 0;
}

API int cublasSetWorkspace_v2(Handle *handle UNUSED, void *address UNUSED, size_t bytes UNUSED) {
  return 0;
}

API int cublasSetMathMode(Handle *handle, int mode) {
  handle->math_mode = mode;
  return 0;
}

API int cublasGetMathMode(Handle *handle, int *mode) {
  *mode = handle->math_mode;
  return 0;
}

API int cublasSetPointerMode_v2(Handle *handle, int mode) {
  handle->pointer_mode = mode;
  return 0;
}

API int cublasGetPointerMode_v2(Handle *handle, int *mode) {
  *mode = handle->pointer_mode;
  return 0;
}

API int cublasSetSmCountTarget(Handle *handle UNUSED, int sms UNUSED) {
  return 0;
}

API int cublasGetVersion_v2(Handle *handle UNUSED, int *version) {
  *version = VERSION;
  return 0;
}

API const char *cublasGetStatusString(int status UNUSED) {
  return "a cuBLAS status of the fake GPU";
}

// ------------------------------------------------------------------ cuBLASLt

API size_t cublasLtGetVersion(void) {
  return VERSION;
}

API int cublasLtCreate(void **handle) {
  LOCK;
  need_context();
  *handle = calloc(1, 64);
  return 0;
}

API int cublasLtDestroy(void *handle) {
  free(handle);
  return 0;
}

// Descriptors that are only handed on.
#define DESCRIPTOR(name)                                                              \
  API int name##Create(void **out, ...) {                                             \
    *out = calloc(1, 512);                                                            \
    return 0;                                                                         \
  }                                                                                   \
  API int name##Destroy(void *descriptor) {                                           \
    free(descriptor);                                                                 \
    return 0;                                                                         \
  }                                                                                   \
  API int name##SetAttribute(void *d UNUSED, int a UNUSED, const void *v UNUSED,      \
                             size_t n UNUSED) {                                       \
    return 0;                                                                         \
  }
DESCRIPTOR(cublasLtMatmulDesc)
DESCRIPTOR(cublasLtMatrixLayout)
DESCRIPTOR(cublasLtMatmulPreference)

// One algorithm, without workspace: cublasLtMatmulHeuristicResult_t is 96 bytes.
API int cublasLtMatmulAlgoGetHeuristic(void *handle UNUSED, void *op UNUSED, void *a UNUSED,
                                       void *b UNUSED, void *c UNUSED, void *d UNUSED,
                                       void *preference UNUSED, int wanted UNUSED, char *results,
                                       int *count) {
  memset(results, 0, 96);
  *count = 1;
  return 0;
}

API int cublasLtMatmul(void *handle UNUSED, void *op UNUSED, const void *alpha UNUSED,
                       const void *a UNUSED, void *a_layout UNUSED, const void *b UNUSED,
                       void *b_layout UNUSED, const void *beta UNUSED, const void *c UNUSED,
                       void *c_layout UNUSED, void *d UNUSED, void *d_layout UNUSED,
                       const void *algorithm UNUSED, void *workspace UNUSED,
                       size_t bytes UNUSED, cudaStream_t stream) {
  return product("cublasLtMatmul", stream);
}
