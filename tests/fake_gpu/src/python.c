// SPDX-License-Identifier: Apache-2.0
// Python, where this process has one: its interpreter lock, and its stack for reports.
#include "fake.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

static struct {
  int (*initialized)(void);
  int (*holds_lock)(void);
  void *(*let_go)(void);
  void (*take)(void *);
  void *(*this_thread)(void);
  void (*dump)(int file, void *thread);  // private, but exported: what faulthandler uses
} python;

static void *find(const char *name) {
  return dlsym(RTLD_DEFAULT, name);
}

static void find_python(void) {
  python.initialized = (int (*)(void))find("Py_IsInitialized");
  python.holds_lock = (int (*)(void))find("PyGILState_Check");
  python.let_go = (void *(*)(void))find("PyEval_SaveThread");
  python.take = (void (*)(void *))find("PyEval_RestoreThread");
  python.this_thread = (void *(*)(void))find("PyGILState_GetThisThreadState");
  python.dump = (void (*)(int, void *))find("_Py_DumpTraceback");
}

static bool is_here(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, find_python);
  return python.initialized && python.initialized();
}

void *let_go_of_python(void) {
  return is_here() && python.holds_lock() ? python.let_go() : NULL;
}

void take_python(void *state) {
  if (state) python.take(state);
}

char *python_stack(void) {
  void *thread = is_here() ? python.this_thread() : NULL;
  int file = thread && python.dump ? memfd_create("stack", 0) : -1;
  if (file < 0) return NULL;
  python.dump(file, thread);
  off_t size = lseek(file, 0, SEEK_END);
  char *text = calloc((size_t)size + 1, 1);
  if (pread(file, text, (size_t)size, 0) < 0) text[0] = 0;
  close(file);
  return text;
}
