// SPDX-License-Identifier: Apache-2.0
// NVML, as far as vLLM and nvidia-ml-py ask: NVML API Reference, "Device Queries". Structures are
// those of nvml.h, which no package here has.
#include "fake.h"

enum { INVALID_ARGUMENT = 2 };

typedef struct {
  unsigned long long total, free, used;
} Memory;

typedef struct {
  char legacy_bus_id[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char bus_id[32];
} Pci;

API int nvmlInit_v2(void) {
  return 0;
}

API int nvmlInit(void) {  // torch's; else it counts devices by the runtime, which forbids a fork
  return 0;
}

API int nvmlInitWithFlags(unsigned flags UNUSED) {
  return 0;
}

API int nvmlShutdown(void) {
  return 0;
}

API const char *nvmlErrorString(int error UNUSED) {
  return "an NVML error of the fake GPU";
}

API int nvmlSystemGetDriverVersion(char *out, unsigned size) {
  // CUDA 12.4's driver was 550, 13.0's 580 and 13.1's 590 (CUDA release notes, table 3).
  int driver = options()->driver;
  snprintf(out, size, "%d.00.00", driver < 13000 ? 550 : driver < 13010 ? 580 : 590);
  return 0;
}

API int nvmlSystemGetCudaDriverVersion(int *version) {
  *version = options()->driver;
  return 0;
}

API int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  *version = options()->driver;
  return 0;
}

API int nvmlDeviceGetCount_v2(unsigned *count) {
  *count = 1;
  return 0;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  if (index) return INVALID_ARGUMENT;
  *device = fake_primary;
  return 0;
}

API int nvmlDeviceGetHandleByUUID(const char *uuid UNUSED, void **device) {
  *device = fake_primary;
  return 0;
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id UNUSED, void **device) {
  *device = fake_primary;
  return 0;
}

API int nvmlDeviceGetIndex(void *device UNUSED, unsigned *index) {
  *index = 0;
  return 0;
}

API int nvmlDeviceGetName(void *device UNUSED, char *out, unsigned size) {
  return cuDeviceGetName(out, (int)size, 0);
}

API int nvmlDeviceGetUUID(void *device UNUSED, char *out, unsigned size) {
  snprintf(out, size, "GPU-66616b65-6375-6461-2d68-3130302d3000");
  return 0;
}

API int nvmlDeviceGetCudaComputeCapability(void *device UNUSED, int *major, int *minor) {
  *major = 9;
  *minor = 0;
  return 0;
}

API int nvmlDeviceGetMemoryInfo(void *device UNUSED, Memory *out) {
  LOCK;
  out->total = options()->memory_bytes;
  out->used = device_bytes_used();
  out->free = out->total - out->used;
  return 0;
}

API int nvmlDeviceGetNumGpuCores(void *device UNUSED, unsigned *cores) {
  *cores = (unsigned)options()->num_sms * 128;
  return 0;
}

API int nvmlDeviceGetMigMode(void *device UNUSED, unsigned *now, unsigned *pending) {
  *now = *pending = 0;
  return 0;
}

API int nvmlDeviceGetPciInfo_v3(void *device UNUSED, Pci *out) {
  memset(out, 0, sizeof *out);
  strcpy(out->legacy_bus_id, "0000:00:00.0");
  strcpy(out->bus_id, "00000000:00:00.0");
  out->device_id = 0x233010de;
  return 0;
}

API int nvmlDeviceGetClockInfo(void *device UNUSED, int clock UNUSED, unsigned *mhz) {
  *mhz = 1980;
  return 0;
}

API int nvmlDeviceGetMaxClockInfo(void *device UNUSED, int clock UNUSED, unsigned *mhz) {
  *mhz = 1980;
  return 0;
}

API int nvmlDeviceGetTemperature(void *device UNUSED, int sensor UNUSED, unsigned *celsius) {
  *celsius = 40;
  return 0;
}

API int nvmlDeviceGetPowerUsage(void *device UNUSED, unsigned *milliwatts) {
  *milliwatts = 100000;
  return 0;
}

API int nvmlDeviceGetEnforcedPowerLimit(void *device UNUSED, unsigned *milliwatts) {
  *milliwatts = 700000;
  return 0;
}

API int nvmlDeviceGetPowerManagementLimit(void *device UNUSED, unsigned *milliwatts) {
  *milliwatts = 700000;
  return 0;
}

API int nvmlDeviceGetComputeRunningProcesses(void *device UNUSED, unsigned *count,
                                             void *processes UNUSED) {
  *count = 0;
  return 0;
}

API int nvmlDeviceGetP2PStatus(void *device UNUSED, void *peer UNUSED, int capability UNUSED,
                               int *status) {
  *status = 1;  // NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED
  return 0;
}
