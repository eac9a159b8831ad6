"""A CUDA driver that runs nothing, so that the host's side of a launch can be timed and tested without a GPU.

Kernels are really compiled, for sm_90, and launched through Triton's own launcher, whose calls of the driver end in a
library of stubs. What a launch costs the host is all there, but for the driver itself. Tensors are on the CPU.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from types import FunctionType

from triton import knobs, runtime
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

import kernels
from kernels import attention, decode_attention, dependent, gemm, groups, tiles
from quant import fused

__all__ = ["HOPPER", "StandInDriver", "stand_in"]

HOPPER = tiles.Target("NVIDIA H100 80GB HBM3", 90, 132)

# Every function of the driver that Triton's launcher calls. Attributes of a device and of a kernel are all 232448, the
# bytes of shared memory that a program may have on Hopper: enough of everything.
STUBS = """
#include <stdint.h>
#define STUB(name) int name(void) { return 0; }
STUB(cuCtxGetLimit) STUB(cuCtxSetCurrent) STUB(cuCtxSetLimit) STUB(cuFuncSetAttribute) STUB(cuFuncSetCacheConfig)
STUB(cuLaunchKernelEx) STUB(cuOccupancyMaxActiveClusters) STUB(cuTensorMapEncodeIm2col) STUB(cuTensorMapEncodeTiled)
static int set(uintptr_t *to, uintptr_t value) { *to = value; return 0; }
int cuCtxGetCurrent(uintptr_t *context) { return set(context, 1); }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuDevicePrimaryCtxRetain(uintptr_t *context, int device) { return set(context, 1); }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 232448; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "stub"; return 0; }
int cuModuleGetFunction(uintptr_t *function, void *module, const char *name) { return set(function, 1); }
int cuModuleLoadData(uintptr_t *module, const void *image) { return set(module, 1); }
int cuPointerGetAttribute(uintptr_t *value, int attribute, uintptr_t pointer) { return set(value, pointer); }
"""


class StandInDriver(nvidia.CudaDriver):  # type: ignore[misc]
    """Triton's driver of one H100, over the stubs."""

    def __init__(self) -> None:
        # Triton links every launcher with this library, so it stays until the process ends.
        self._folder = tempfile.TemporaryDirectory()
        source, library = (Path(self._folder.name) / name for name in ("stubs.c", "libcuda.so.1"))
        source.write_text(STUBS)
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        knobs.nvidia.libcuda_path = self._folder.name
        super().__init__()
        self.get_device_capability = lambda _device: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", HOPPER.capability, 32)


def stand_in(driver: object = None) -> None:
    """From here on, in this process, CPU tensors are those of an H100: kernels are compiled for it and launched.

    driver: in place of a new `StandInDriver`.
    """
    runtime.driver.set_active(driver or StandInDriver())
    for module in (attention, decode_attention, dependent, gemm, groups):
        vars(module)["current_gpu"] = lambda _device: HOPPER
    for name in kernels.__all__:
        op = getattr(kernels, name)
        if isinstance(op, FunctionType):
            # What `kernels` calls for a tensor on the CPU, and for one on a GPU.
            on_cpu, on_gpu = op.__closure__ or ()
            on_cpu.cell_contents = on_gpu.cell_contents
    vars(fused)["_runs_in_pairs"] = lambda linear: linear.has_gated_kernel
