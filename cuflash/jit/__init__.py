"""From a kernel configuration to PTX or a cubin: NVRTC behind a disk cache. Needs no GPU and no driver."""

from cuflash.jit.build import Resources, compile_cubin, compile_ptx, resources

__all__ = ["Resources", "compile_cubin", "compile_ptx", "resources"]
