// SPDX-License-Identifier: Apache-2.0
// What is known about kernels of vLLM 0.32 and 0.33 and of torch, by their names.
//
// Most kernels do nothing. A few have results on which the host acts: vLLM counts tokens on the
// GPU and asks it how many each request got. Those are computed here. For races.py this file also
// says which memory a launch is given: pointers among a Triton kernel's arguments, the rows of
// which it touches some, and what torch's elementwise kernels list.
#include "fake.h"

// ------------------------------------------------------------------ reading arguments
// Triton drops arguments that are None or 1. The sizes of those that are left tell which.

typedef struct {
  const Work *work;
  int at;
} Arguments;

static bool is_pointer(const Arguments *arguments, int index) {
  const Work *work = arguments->work;
  if (work->kernel->sizes[index] != sizeof(void *)) return false;
  return find_block(*(void **)work->arguments[index]) != NULL;
}

static void *next_pointer(Arguments *arguments) {
  return *(void **)arguments->work->arguments[arguments->at++];
}

static int next_int(Arguments *arguments) {
  return *(int *)arguments->work->arguments[arguments->at++];
}

static int next_int_or_1(Arguments *arguments) {
  return is_pointer(arguments, arguments->at) ? 1 : next_int(arguments);
}

// Indices come from kernels that did nothing: they may be anything.
static bool is_ours(const void *address) {
  return find_block(address) != NULL;
}

// ------------------------------------------------------------------ vllm/v1/worker/gpu/

static void copy_rows(int *to, long row, long stride, int start, const int *from, int begin,
                      int end) {
  memcpy(to + row * stride + start, from + begin, (size_t)(end - begin) * sizeof *from);
}

// buffer_utils.py: rows of one tensor, or of several, from one array of their contents.
static void apply_write(Arguments *a, const unsigned *grid) {
  void *out = next_pointer(a);
  int stride = next_int_or_1(a);
  bool several = stride == 1 && is_ours(*(void **)out) && is_pointer(a, 1) && is_pointer(a, 6);
  int *strides = several ? next_pointer(a) : NULL;
  int *row = next_pointer(a), *start = next_pointer(a), *contents = next_pointer(a);
  int *end = next_pointer(a), *group = several ? next_pointer(a) : NULL;
  for (unsigned k = 0; k < grid[0]; k++) {
    int *to = several ? ((int **)out)[group[k]] : out;
    copy_rows(to, row[k], several ? strides[group[k]] : stride, start[k], contents,
              k ? end[k - 1] : 0, end[k]);
  }
}

// input_batch.py: positions and sequence lengths of a batch.
static void prepare_pos_seq_lens(Arguments *a, const unsigned *grid) {
  long *positions = next_pointer(a);
  int *lengths = next_pointer(a);
  long *row = next_pointer(a);
  int *begin = next_pointer(a), *computed = next_pointer(a);
  int most = next_int_or_1(a), requests = (int)grid[0] - 1;
  for (int r = 0; r < requests; r++) {
    if (!is_ours(&computed[row[r]])) continue;
    int done = computed[row[r]], more = begin[r + 1] - begin[r];
    lengths[r] = done + more;
    trace("  request row=%ld computed=%d new=%d", row[r], done, more);
    for (int k = 0; k < more; k++) positions[begin[r] + k] = done + k;
  }
  for (int r = requests; r < most; r++) lengths[r] = 0;
}

// input_batch.py: a request whose prompt is not at its end gets no token.
static void get_num_sampled_and_rejected(Arguments *a, const unsigned *grid) {
  int *sampled = next_pointer(a), *rejected = next_pointer(a), *lengths = next_pointer(a);
  int *logits = next_pointer(a);
  long *row = next_pointer(a);
  int *prompt = next_pointer(a);
  for (unsigned r = 0; r < grid[0]; r++) {
    if (!is_ours(&prompt[row[r]])) continue;
    bool in_prompt = lengths[r] < prompt[row[r]];
    trace("  request row=%ld length=%d of=%d sampled=%d", row[r], lengths[r], prompt[row[r]],
          sampled[r]);
    if (in_prompt) sampled[r] = 0;
    rejected[r] = in_prompt ? 0 : logits[r + 1] - logits[r] - sampled[r];
  }
}

// input_batch.py: after a step, what each request has.
static void post_update(Arguments *a, const unsigned *grid) {
  long *row = next_pointer(a);
  int *computed = next_pointer(a);
  long *last = next_pointer(a);
  a->at += is_pointer(a, a->at) ? 2 : 1;  // counts, for penalties
  long *tokens = next_pointer(a);
  int stride = next_int_or_1(a);
  int *sampled = next_pointer(a), *rejected = next_pointer(a), *begin = next_pointer(a);
  int *all = next_pointer(a);
  int width = next_int(a);
  int *total = next_pointer(a);
  for (unsigned r = 0; r < grid[0]; r++) {
    long q = row[r];
    if (q < 0 || !is_ours(&computed[q]) || !is_ours(&total[q]) || !is_ours(&last[q])) continue;
    for (int k = 0; k < sampled[r]; k++) {
      last[q] = tokens[(long)r * stride + k];
      all[q * width + total[q] + k] = (int)last[q];
    }
    total[q] += sampled[r];
    computed[q] += begin[r + 1] - begin[r] - rejected[r];
  }
}

static void post_update_num_computed_tokens(Arguments *a, const unsigned *grid) {
  long *row = next_pointer(a);
  int *computed = next_pointer(a), *begin = next_pointer(a);
  for (unsigned r = 0; r < grid[0]; r++)
    if (is_ours(&computed[row[r]])) computed[row[r]] += begin[r + 1] - begin[r];
}

static const struct {
  const char *name;
  void (*run)(Arguments *, const unsigned *grid);
} computed_here[] = {
  {"_apply_write_kernel", apply_write},
  {"_prepare_pos_seq_lens_kernel", prepare_pos_seq_lens},
  {"_get_num_sampled_and_rejected_kernel", get_num_sampled_and_rejected},
  {"_post_update_kernel", post_update},
  {"_post_update_num_computed_tokens_kernel", post_update_num_computed_tokens},
};

// ------------------------------------------------------------------ torch

static const char FILL[] = "11FillFunctorI", LIST[] = "St5arrayIPcLm";

static bool is_fill(const Kernel *kernel) {  // torch.full, zeros, ones
  return strstr(kernel->name, FILL) && strstr(kernel->name, "vectorized_elementwise_kernel");
}

static bool is_arange(const Kernel *kernel) {
  return strstr(kernel->name, "arange_cuda_out") &&
         strstr(kernel->name, "elementwise_kernel_with_indexIi");
}

// How many tensors an elementwise kernel lists: the first is written, the others read.
static int num_listed(const Kernel *kernel) {
  const char *list = strstr(kernel->name, LIST);
  return list && strstr(kernel->name, "elementwise_kernel") ? list[sizeof LIST - 1] - '0' : 0;
}

// torch's parameters are in no cubin that we read. These kernels take (int n, functor, pointers).
void know_torch_kernel(Kernel *kernel) {
  int listed = num_listed(kernel);
  if (!is_fill(kernel) && !is_arange(kernel) && !listed) return;
  kernel->num_parameters = 3;
  kernel->sizes[0] = sizeof(int);
  kernel->sizes[1] = is_arange(kernel) ? 2 * sizeof(long) : is_fill(kernel) ? sizeof(long) : 0;
  kernel->sizes[2] = (unsigned short)((listed ? listed : 1) * (int)sizeof(void *));
}

static size_t size_of_filled(const Kernel *kernel) {  // by the mangled name of its type
  const char *type = strstr(kernel->name, FILL) + sizeof FILL - 1;
  if (strchr("bahc", *type)) return 1;
  if (strchr("st", *type)) return 2;
  if (strchr("ijf", *type)) return 4;
  if (strchr("lmd", *type)) return 8;
  bool half = !strncmp(type, "N3c108BFloat16", 14) || !strncmp(type, "N3c104Half", 10);
  return half ? 2 : 0;
}

static void run_fill(const Work *work) {
  size_t size = size_of_filled(work->kernel), count = (size_t) * (int *)work->arguments[0];
  const char *value = work->arguments[1], zero[8] = {0};
  char *to = *(char **)work->arguments[2];
  if (!memcmp(value, zero, size)) fill(to, 0, count * size);
  else
    for (size_t i = 0; i < count; i++) memcpy(to + i * size, value, size);
}

static void run_arange(const Work *work) {  // of int or long
  const char *type = strstr(strstr(work->kernel->name, "clEvENKUlvE"), "UlvE") + 4;
  const long *start_step = work->arguments[1];
  void *to = *(void **)work->arguments[2];
  for (int i = 0; i < *(int *)work->arguments[0]; i++) {
    long value = start_step[0] + i * start_step[1];
    if (*type == '1') ((int *)to)[i] = (int)value;
    else if (*type == '2') ((long *)to)[i] = value;
  }
}

void run_kernel(const Work *work) {
  if (!work->arguments) return;
  if (is_fill(work->kernel)) run_fill(work);
  else if (is_arange(work->kernel)) run_arange(work);
  for (size_t i = 0; i < sizeof computed_here / sizeof *computed_here; i++) {
    if (strcmp(work->kernel->name, computed_here[i].name)) continue;
    Arguments arguments = {work, 0};
    computed_here[i].run(&arguments, work->grid);
  }
}

// ------------------------------------------------------------------ which memory

// Tensors with a row for each request, of which a kernel touches those of its batch.
static const struct {
  const char *kernel;
  int rows_in;   // the argument with the rows' numbers
  int argument;  // the tensor
  int bytes;     // of an element
  int stride;    // the argument with a row's elements; -1: one
} by_row[] = {
  {"_post_update_kernel", 0, 1, 4, -1},
  {"_post_update_kernel", 0, 2, 8, -1},
  {"_post_update_kernel", 0, 3, 4, 4},
  {"_post_update_kernel", 0, 9, 4, 10},
  {"_post_update_kernel", 0, 11, 4, -1},
  {"_combine_sampled_and_draft_tokens_kernel", 1, 2, 8, -1},
  {"_combine_sampled_and_draft_tokens_kernel", 1, 5, 4, -1},
  {"_prepare_pos_seq_lens_kernel", 2, 4, 4, -1},
  {"_prepare_prefill_inputs_kernel", 3, 1, 4, 2},
  {"_prepare_prefill_inputs_kernel", 3, 5, 4, 6},
  {"_prepare_prefill_inputs_kernel", 3, 7, 4, -1},
  {"_prepare_prefill_inputs_kernel", 3, 8, 4, -1},
  {"_apply_write_kernel", 2, 0, 4, 1},
};

static int describe_rows(const Work *work, int argument, char *out, int size) {
  const Kernel *kernel = work->kernel;
  void **arguments = work->arguments;
  bool writer = !strcmp(kernel->name, "_apply_write_kernel");
  bool one = writer && kernel->sizes[1] == sizeof(void *);  // a stride of 1 is no argument
  int requests = (int)work->grid[0] - !strcmp(kernel->name, "_prepare_pos_seq_lens_kernel");
  for (size_t r = 0; r < sizeof by_row / sizeof *by_row; r++) {
    if (by_row[r].argument != argument || strcmp(by_row[r].kernel, kernel->name)) continue;
    int stride_in = by_row[r].stride;
    if (stride_in > 1 && kernel->sizes[stride_in] != sizeof(int)) continue;
    long stride = stride_in < 0 || one ? 1 : *(int *)arguments[stride_in];
    int used = 0;
    for (int i = 0; i < requests && used + 48 < size; i++) {
      int rows_in = by_row[r].rows_in - (writer && one);
      long row = writer ? (*(int **)arguments[rows_in])[i] : (*(long **)arguments[rows_in])[i];
      char *address = *(char **)arguments[argument] + row * stride * by_row[r].bytes;
      used += snprintf(out + used, (size_t)(size - used), " %d:%p+%d", argument, (void *)address,
                       by_row[r].bytes);
    }
    return used;
  }
  return 0;
}

// " code=HASH ORDINAL:ADDRESS+BYTES ..." of Triton's, " w:ADDRESS+BYTES r:..." of others. Where
// only the beginning of what is touched is known, BYTES is 1.
void describe_accesses(const Work *work, char *out, size_t room) {
  int size = (int)room, used = 0;
  if (work->kind == COPY || work->kind == SET) {
    used = snprintf(out, room, " w:%p+%zu", work->to, work->bytes);
    if (work->from && !work->staged)
      snprintf(out + used, room - (size_t)used, " r:%p+%zu", work->from, work->bytes);
  }
  if (work->kind != KERNEL) return;
  const Kernel *kernel = work->kernel;
  used = snprintf(out, room, " name=%.900s", kernel->name);
  if (!work->arguments) return;
  if (kernel->code) {
    used += snprintf(out + used, room - (size_t)used, " code=%x", kernel->code);
    for (int i = 0; i < kernel->num_parameters && used + 48 < size; i++) {
      if (kernel->sizes[i] != sizeof(void *) || !find_block(*(void **)work->arguments[i])) continue;
      int rows = describe_rows(work, i, out + used, size - used);
      if (!rows)
        rows = snprintf(out + used, (size_t)(size - used), " %d:%p+1", i,
                        *(void **)work->arguments[i]);
      used += rows;
    }
    return;
  }
  int listed = num_listed(kernel), count = *(int *)work->arguments[0];
  for (int i = 0; i < listed && used + 48 < size; i++)
    used += snprintf(out + used, (size_t)(size - used), " %c:%p+%d", i ? 'r' : 'w',
                     ((void **)work->arguments[2])[i], i ? 1 : count);
}
