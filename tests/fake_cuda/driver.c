/* Stands in for libcuda.so.1: answers what Triton's driver and launcher ask, and records launches
   instead of making them. No kernel runs, so memory of the host may pass for a GPU's. */
#include "cuda.h"
#include <stdint.h>
#include <string.h>

typedef struct {
  char name[48];
  unsigned grid[3], threads, shared;
  int cooperative;
  uint64_t stream, params[64];
} Launch;

Launch fake_last;
unsigned fake_params; /* how many the next launch has */
unsigned fake_shared; /* the bytes of shared memory that a program may have */
CUresult fake_error, fake_refusal; /* of every launch from now on, and of a cooperative one */

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { *size = 1 << 20; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *data) { *module = (CUmodule)1; return 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  *f = (CUfunction)strdup(name);
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return 0; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
  *n = 1;
  return 0;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return 0;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    *value = fake_shared;
  else
    *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 65536;
  return 0;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  int is_refusal = error == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
  *text = is_refusal ? "too many blocks in cooperative launch"
                     : "an illegal memory access was encountered";
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  Launch launch = {"", {c->gridDimX, c->gridDimY, c->gridDimZ}, c->blockDimX, c->sharedMemBytes};
  strncpy(launch.name, (const char *)f, sizeof launch.name - 1);
  launch.stream = (uint64_t)c->hStream;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
      launch.cooperative = c->attrs[i].value.cooperative;
  for (unsigned i = 0; i < fake_params && i < 64; i++) launch.params[i] = *(uint64_t *)params[i];
  if (fake_error) return fake_error;
  if (launch.cooperative && fake_refusal) return fake_refusal;
  fake_last = launch;
  return 0;
}
