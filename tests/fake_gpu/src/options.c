// SPDX-License-Identifier: Apache-2.0
// What FAKECUDA_* says. README.md has the table.
#include "fake.h"

static Options o;

static double number(const char *name, double otherwise) {
  const char *text = getenv(name);
  return text && *text ? atof(text) : otherwise;
}

static bool flag(const char *name) {
  return number(name, 0) != 0;
}

static void read_order(const char *text) {
  if (!text || !*text || !strcmp(text, "now")) return;
  if (strncmp(text, "late", 4) || (text[4] && text[4] != ':')) {
    fprintf(stderr, "fakecuda: FAKECUDA_ORDER is now or late:SEED, not %s\n", text);
    exit(2);
  }
  o.late = true;
  o.seed = text[4] ? strtoull(text + 5, NULL, 10) : 0;
}

static void read_all(void) {
  o.num_sms = (int)number("FAKECUDA_SMS", 132);
  // Driver API, "Green Contexts", cuDevSmResourceSplitByCount: compute capability 9.0 makes
  // groups of 8 SMs or more, in multiples of 8.
  o.min_sms = 8;
  o.align_sms = 8;
  o.driver = (int)number("FAKECUDA_DRIVER", 13010);
  o.work_queues = o.driver >= 13010 && !flag("FAKECUDA_NO_WORK_QUEUES");
  o.memory_bytes = (size_t)(number("FAKECUDA_MEMORY_GB", 80) * (1ull << 30));
  o.kernel_s = 1e-6 * number("FAKECUDA_KERNEL_US", 0);
  o.strict = flag("FAKECUDA_STRICT");
  o.backtrace = flag("FAKECUDA_BACKTRACE");
  o.summary = flag("FAKECUDA_SUMMARY");
  o.trace = getenv("FAKECUDA_TRACE");
  o.reports = getenv("FAKECUDA_REPORTS");
  o.faults = getenv("FAKECUDA_FAULTS");
  read_order(getenv("FAKECUDA_ORDER"));
}

const Options *options(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, read_all);
  return &o;
}

void run_late(bool late) {
  options();
  o.late = late;
}
