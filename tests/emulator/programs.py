"""Small programs for the emulator: CUDA compiled by NVRTC, and PTX written around one instruction."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from cuda.bindings import nvrtc

from cuflash.emulator import Device, LaunchReport

OPTIONS = ("--gpu-architecture=compute_80", "-std=c++20", "-lineinfo")


@lru_cache(maxsize=512)
def compile_cuda(source: str, *options: str, name: str = "test.cu") -> str:
    """PTX of a CUDA source."""
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    flags = [f.encode() for f in (*OPTIONS, *options)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode())
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = b" " * size
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    return ptx.rstrip(b"\0").decode()


def run_cuda(
    source: str,
    arrays: dict[str, np.ndarray],
    *scalars: np.generic,
    grid: object = 1,
    block: object = 32,
    shared_bytes: int = 0,
    outputs: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    **device: object,
) -> tuple[dict[str, np.ndarray], LaunchReport]:
    """Run `kernel` of a CUDA source on arrays, then scalars; `outputs` are given uninitialised.

    Returns all arrays as they are afterwards, and the report.
    """
    emulated = Device(**device)  # type: ignore[arg-type]
    inside = {
        name: emulated.empty_like(a, name=name) if name in outputs else emulated.to_device(a, name=name)
        for name, a in arrays.items()
    }
    kernel = emulated.load(compile_cuda(source, *options)).kernel("kernel")
    report = kernel.launch(grid, block, [*inside.values(), *scalars], shared_bytes=shared_bytes)
    return {name: a.to_host() for name, a in inside.items()}, report


def ptx_type(dtype: np.dtype) -> str:
    if dtype.kind == "b":
        return "pred"
    return "b16" if dtype == np.float16 else f"{'f' if dtype.kind == 'f' else 'b'}{8 * dtype.itemsize}"


def evaluate(instruction: str, *inputs: np.ndarray, out: object = np.uint32, setup: str = "") -> np.ndarray:
    """What one PTX instruction gives for every element of its inputs.

    %d is the destination and %0, %1, ... the inputs,
      for example "add.s32 %d, %0, %1;". Predicates are inputs of dtype bool, and
    results when out is bool. Every input is broadcast to one dimension.
    """
    out = np.dtype(out)  # type: ignore[call-overload]
    flat = [np.ascontiguousarray(x) for x in np.broadcast_arrays(*(np.atleast_1d(x) for x in inputs))]
    count = flat[0].size
    loads, registers = [], []
    for k, x in enumerate(flat):
        stored = "u8" if x.dtype.kind == "b" else ptx_type(x.dtype)
        registers.append(f".reg .{ptx_type(x.dtype)} %in{k};")
        loads.append(
            f"ld.param.u64 %address, [kernel_param_{k}]; mad.wide.u32 %address, %index, {x.dtype.itemsize}, %address;"
        )
        if x.dtype.kind == "b":
            loads.append(f"ld.global.u8 %byte, [%address]; setp.ne.u16 %in{k}, %byte, 0;")
        else:
            loads.append(f"ld.global.{stored} %in{k}, [%address];")
    result = ptx_type(out)
    text = instruction.replace("%d", "%result")
    for k in range(len(flat)):
        text = text.replace(f"%{k}", f"%in{k}")
    store = (
        "selp.u16 %byte, 1, 0, %result; st.global.u8 [%address], %byte;"
        if out.kind == "b"
        else f"st.global.{result} [%address], %result;"
    )
    params = ", ".join(f".param .u64 kernel_param_{k}" for k in range(len(flat) + 1))
    ptx = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel({params}, .param .u32 kernel_param_{len(flat) + 1})
{{
    .reg .b32 %index, %block, %count; .reg .b64 %address; .reg .b16 %byte; .reg .pred %outside; .reg .{result} %result;
    {" ".join(registers)}
    {setup}
    mov.u32 %index, %tid.x; mov.u32 %block, %ctaid.x; mad.lo.u32 %index, %block, 1024, %index;
    ld.param.u32 %count, [kernel_param_{len(flat) + 1}]; setp.ge.u32 %outside, %index, %count;
    @%outside ret;
    {" ".join(loads)}
    {text}
    ld.param.u64 %address, [kernel_param_{len(flat)}]; mad.wide.u32 %address, %index, {out.itemsize}, %address;
    {store}
    ret;
}}
"""
    device = Device()
    target = device.empty(count, out, name="result")
    sources = [device.to_device(x, name=f"in{k}") for k, x in enumerate(flat)]
    device.load(ptx).kernel("kernel").launch(-(-count // 1024), 1024, [*sources, target, np.uint32(count)])
    return target.to_host()
