"""Every fault has a program that must raise it and a twin, one correction apart, that must not."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash.emulator import (
    BarrierDivergence,
    Deadlock,
    Device,
    EmulatorFault,
    InvalidPtx,
    Misaligned,
    OutOfBounds,
    Race,
    Trap,
    Uninitialized,
    UnsupportedInstruction,
)
from tests.emulator.programs import compile_cuda, run_cuda

HEAD = """
__device__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void copy4(const void* to, const void* from) { asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :
  : "r"(address(to)), "l"(from) : "memory"); }
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
extern "C" __global__ void kernel(int* x, int* y) {
  __shared__ __align__(16) int s[256]; int i = threadIdx.x;
"""

# name: (fault, body with a line FIX, what FIX must be for the twin to run, what the message says)
PROGRAMS = {
    "missing barrier": (
        Race,
        "s[i] = i; FIX y[i] = s[63 - i];",
        "__syncthreads();",
        r"read of shared address 0x\w+ races with a write by thread .*,\n    which is at .*test.cu:9; .*: st\.shared",
    ),
    "missing barrier before reuse": (
        Race,
        "s[i] = i; __syncthreads(); int v = s[63 - i]; FIX s[i] = v; y[i] = v;",
        "__syncthreads();",
        r"write of shared address .* races with a read by thread .*,\n    which is at .*test.cu:9; .*: ld\.shared",
    ),
    "two writers": (Race, "s[FIX] = i; __syncthreads(); y[i] = s[i / 2];", "i", "races with"),
    "missing warp barrier": (Race, "s[i] = i; FIX y[i] = s[i ^ 1];", "__syncwarp();", r"thread \(0, 0, 0\)|thread"),
    "shuffle in place of a barrier": (
        Race,
        "s[i] = i; int v = __shfl_xor_sync(~0u, i, 1) + __any_sync(~0u, i); FIX y[i] = s[i ^ 1] + v;",
        "__syncwarp();",
        "races with a write by thread",
    ),
    "matrix load in place of a barrier": (
        Race,
        "((int4*)s)[i] = int4{i, i, i, i}; FIX unsigned r;"
        ' asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"'
        ' : "=r"(r) : "r"(address(s) + 16 * i)); y[i] = r;',
        "__syncwarp();",
        "races with a write by thread",
    ),
    "barrier of half the threads": (
        Race,
        'if (i < 32) s[i] = i; asm volatile("bar.sync %0, 32;" :: "r"(1 + i / 32) : "memory");'
        " FIX y[i] = s[i % 32 ^ 1];",
        "__syncthreads();",
        "write by thread",
    ),
    "two blocks write the same": (
        Race,
        "y[i + FIX] = i;",
        "64 * blockIdx.x",
        r"write at global .* 'y' .* races with a write by thread .* of block .*,\n    which is at .*: st\.global",
    ),
    "two threads write the same global bytes": (Race, "y[i + 64 * blockIdx.x - FIX] = i;", "0", "'y'"),
    "copy not waited for": (
        Race,
        "copy4(s + i, x + i); commit(); FIX __syncthreads(); y[i] = s[i];",
        "wait<0>();",
        r"races with a copy still in flight \(cp.async\) by thread",
    ),
    "copy waited for too late a group": (
        Race,
        "copy4(s + i, x + i); commit(); copy4(s + 64 + i, x + i); commit(); wait<FIX>(); __syncthreads();"
        " y[i] = s[64 + i];",
        "0",
        "in flight",
    ),
    "copy not committed before waiting": (
        Race,
        "copy4(s + i, x + i); FIX wait<0>(); y[i] = s[i];",
        "commit();",
        "in flight",
    ),
    "copy waited for by another thread only": (
        Race,
        "copy4(s + i, x + i); commit(); if (i < 32 FIX) wait<0>(); __syncthreads(); y[i] = s[63 - i];",
        "|| true",
        "in flight",
    ),
    "copy seen by others without a barrier": (
        Race,
        "copy4(s + i, x + i); commit(); wait<0>(); FIX y[i] = s[63 - i];",
        "__syncthreads();",
        "a write by thread",
    ),
    "copy into a buffer still read": (
        Race,
        "s[i] = i; __syncthreads(); int v = s[63 - i]; FIX copy4(s + i, x + i); commit(); wait<0>(); y[i] = v;",
        "__syncthreads();",
        "a read by thread",
    ),
    "copy twice to the same place": (
        Race,
        "copy4(s + i, x + i); commit(); FIX copy4(s + i, x + i); commit(); wait<0>(); y[i] = s[i];",
        "wait<0>();",
        "in flight",
    ),
    "atomic and plain accesses": (
        Race,
        "if (i == 0) s[0] = 0; __syncthreads(); atomicAdd(s, i); FIX y[i] = s[0];",
        "__syncthreads();",
        "races with",
    ),
    "uninitialised shared": (
        Uninitialized,
        "s[i] = i; __syncthreads(); y[i] = s[i FIX];",
        "^ 1",
        r"shared address 0x\w+: bytes that nothing has written",
    ),
    "atomic on uninitialised shared": (
        Uninitialized,
        "FIX atomicAdd(s + i, 1); y[i] = s[i];",
        "s[i] = 0;",
        r"shared address 0x\w+: bytes that nothing has written",
    ),
    "uninitialised global": (
        Uninitialized,
        "FIX x[i] = y[i]; y[i] = 0;",
        "y[i] = 1;",
        r"'y' .*: bytes that nothing has written",
    ),
    "out of bounds read": (
        OutOfBounds,
        "y[i] = x[i FIX];",
        "- 1 + (i == 0)",
        r"read of 4 bytes .* byte 256 of 'x' \(256 bytes\)",
    ),
    "out of bounds write": (OutOfBounds, "y[i FIX] = 1;", "^ 1", r"write of 4 bytes .* of 'y'"),
    "null pointer": (OutOfBounds, "int* p = (int*)((long long)y >> FIX); p[i] = 1;", "0", "global address"),
    "out of bounds shared": (
        OutOfBounds,
        "((volatile int*)s)[i * 4 FIX] = 1; y[i] = 1;",
        "^ 4",
        r"shared address 0x400 \+ 4 bytes lies outside the 1024 bytes",
    ),
    "misaligned global": (Misaligned, "*(int*)((char*)y + 4 * i FIX) = 1;", "- 2", "not a multiple of 4"),
    "misaligned shared": (
        Misaligned,
        "*(volatile int*)((char*)s + 4 * i FIX) = 1; y[i] = 1;",
        "- 2",
        "shared address .* not a multiple of 4",
    ),
    "misaligned copy": (
        Misaligned,
        'asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"'
        ' :: "r"(address(s + 4 * i)), "l"(x + FIX) : "memory"); y[i] = 1;',
        "0",
        "not a multiple of 16",
    ),
    "misaligned short copy": (
        Misaligned,
        'asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 4;"'
        ' :: "r"(address(s + 4 * i)), "l"(x + FIX) : "memory"); y[i] = 1;',
        "0",
        "not a multiple of 16",
    ),
    "misaligned matrix": (
        Misaligned,
        "s[i] = i; s[i + 64] = i; s[i + 128] = i; __syncthreads(); unsigned r;"
        ' asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"'
        ' : "=r"(r) : "r"(address(s) + 16 * (i % 8) + FIX)); y[i] = r;',
        "0",
        "not a multiple of 16",
    ),
    "barrier in one half of a warp": (
        BarrierDivergence,
        "if (i % 2 FIX) __syncthreads(); y[i] = i;",
        "|| true",
        "needs the whole warp",
    ),
    "barrier after exits": (
        BarrierDivergence,
        "if (i >= 32 FIX) return; __syncthreads(); y[i] = i;",
        "&& false",
        "others have exited",
    ),
    "matrix after exits": (
        BarrierDivergence,
        'if (i >= 40 FIX) return; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y[i]) : "r"(i));',
        "&& false",
        "needs the whole warp, but some of its lanes have exited",
    ),
    "lane that its own mask leaves out": (
        BarrierDivergence,
        "y[i] = __shfl_xor_sync(0xffffu FIX, i, 1);",
        "<< 16 | 0xffffu",
        "shfl is executed by lanes that its mask leaves out",
    ),
    "shuffle in two branches": (
        BarrierDivergence,
        "int v; if (i % 2) v = __shfl_xor_sync(MASK1, i, 2); else v = __shfl_xor_sync(MASK2, i * 3, 2); y[i] = v;",
        None,
        "wait at 2 different places",
    ),
    "barrier with odd count": (
        BarrierDivergence,
        'asm volatile("bar.sync 1, FIX;" ::: "memory"); y[i] = i;',
        "64",
        "thread counts",
    ),
    "barrier with different counts": (
        BarrierDivergence,
        'if (i < 32) asm volatile("bar.sync 1, 64;" ::: "memory");'
        ' else asm volatile("bar.sync 1, FIX;" ::: "memory"); y[i] = i;',
        "64",
        "different or odd thread counts",
    ),
    "two barriers cross": (
        Deadlock,
        'if (i < 32) asm volatile("bar.sync 1, 64;" ::: "memory");'
        ' else asm volatile("bar.sync FIX, 64;" ::: "memory"); y[i] = i;',
        "1",
        r"(?s)warps 0 wait at .*warps 1 wait at",
    ),
    "nobody arrives": (
        Deadlock,
        'asm volatile("bar.sync 1, FIX;" ::: "memory"); y[i] = i;',
        "64",
        r"barrier 1 waits for 96 threads, 64 arrived",
    ),
    "trap": (Trap, 'if (i == 5 FIX) asm volatile("trap;"); y[i] = i;', "&& false", "trap"),
}
WRONG = {  # what stands for FIX in the program that must fault, where it is not nothing
    "two writers": "i / 2",
    "two blocks write the same": "0",
    "two threads write the same global bytes": "(i == 9)",
    "copy waited for too late a group": "1",
    "uninitialised shared": "+ 64",
    "out of bounds read": "+ 1",
    "out of bounds write": "- 2",
    "null pointer": "50",
    "out of bounds shared": "+ 4",
    "misaligned global": "+ 2 - 4 * (i == 63)",
    "misaligned shared": "+ 2",
    "misaligned copy": "1",
    "misaligned short copy": "1",
    "misaligned matrix": "8",
    "barrier with odd count": "48",
    "barrier with different counts": "96",
    "two barriers cross": "2",
    "nobody arrives": "96",
}


def run(body: str, blocks: int = 1, **device: object) -> np.ndarray:
    arrays = {"x": np.arange(64, dtype=np.int32), "y": np.empty((blocks, 64), np.int32)}
    result, _ = run_cuda(HEAD + body + "\n}", arrays, grid=blocks, block=64, outputs=("y",), **device)
    return result["y"]


@pytest.mark.parametrize("warp_order", [None, 7])
@pytest.mark.parametrize("name", PROGRAMS)
def test_fault(name: str, warp_order: int | None) -> None:
    kind, body, _, message = PROGRAMS[name]
    if name == "shuffle in two branches":
        body = body.replace("MASK1", "~0u").replace("MASK2", "~0u")
    blocks = 2 if "blocks" in name else 1
    ahead = (
        kind is Race and warp_order is not None
    )  # a warp that runs ahead may meet what nobody has written, or another side of the race
    with pytest.raises((kind, Uninitialized) if ahead else kind, match=None if ahead else message) as fault:
        run(body.replace("FIX", WRONG.get(name, "")), blocks, warp_order=warp_order)
    assert isinstance(fault.value, EmulatorFault)
    assert isinstance(fault.value, RuntimeError)
    assert fault.value.kernel == "kernel"
    assert fault.value.block is not None
    assert 0 <= fault.value.thread[0] < 64
    assert fault.value.threads >= 1
    assert fault.value.ptx_line > 0
    assert fault.value.ptx_text
    assert "test.cu:" in fault.value.source
    for part in ("kernel kernel", f"block {fault.value.block}", f"thread {fault.value.thread}", "PTX line", "test.cu:"):
        assert part in str(fault.value)


@pytest.mark.parametrize("warp_order", [None, 7])
@pytest.mark.parametrize("name", PROGRAMS)
def test_twin_without_the_fault(name: str, warp_order: int | None) -> None:
    _, body, fix, _ = PROGRAMS[name]
    if fix is None:
        body, fix = body.replace("MASK1", "0xaaaaaaaau").replace("MASK2", "0x55555555u"), ""
    body = body.replace("FIX", fix)
    if name.startswith("misaligned") and fix == "- 2":
        body = body.replace(" - 2", "")
    run(body, 2 if "blocks" in name else 1, warp_order=warp_order)


def test_races_are_not_looked_for_when_asked_not_to() -> None:
    run(PROGRAMS["missing warp barrier"][1].replace("FIX", ""), check_races=False)
    with pytest.raises(Uninitialized):
        run(PROGRAMS["uninitialised shared"][1].replace("FIX", "+ 64"), check_races=False)


def test_late_copies_show_stale_data_and_early_ones_do_not() -> None:
    """Without race checks the content tells: a read before the wait sees what was there before."""
    body = "s[i] = -1; copy4(s + i, x + i); commit(); y[i] = s[i]; wait<0>();"
    assert (run(body, check_races=False) == -1).all()
    assert run(body, check_races=False, copies="early").tolist() == [list(range(64))]


def test_a_fault_names_the_line_of_the_source_and_where_it_was_inlined() -> None:
    source = """
__device__ __forceinline__ void inner(int* p, int i) {
  p[i] = i;
}
__device__ __forceinline__ void outer(int* p, int i) { if (i > 2)
  inner(p + 128, i);
}
extern "C" __global__ void kernel(int* y) {
  int i = threadIdx.x + 8 * threadIdx.y + 32 * (blockIdx.x + 2 * blockIdx.y);
  y[i] = 0;
  outer(y, i);
}
"""
    with pytest.raises(OutOfBounds) as fault:
        run_cuda(source, {"y": np.zeros(128, np.int32)}, grid=(2, 2), block=(8, 4))
    assert fault.value.source.endswith("test.cu:3")
    assert [place.rpartition(":")[2] for place in fault.value.inlined_at] == ["6", "11"]
    assert fault.value.thread == (3, 0, 0)
    assert fault.value.block == (0, 0, 0)
    assert fault.value.threads == 125
    assert fault.value.ptx_text.startswith("st.global.")


def test_a_faulting_launch_leaves_other_arrays_alone() -> None:
    device = Device()
    x, y = device.to_device(np.arange(64, dtype=np.int32), name="x"), device.to_device(np.zeros(64, np.int32), name="y")
    kernel = device.load(compile_cuda(HEAD + "y[i + 1] = x[i];\n}")).kernel("kernel")
    with pytest.raises(OutOfBounds):
        kernel.launch(1, 64, [x, y])
    np.testing.assert_array_equal(x.to_host(), np.arange(64))
    assert (y.to_host() == 0).all()


def ptx(body: str, declarations: str = "") -> str:
    return f""".version 8.0
.target sm_80
.address_size 64
{declarations}
.visible .entry kernel(.param .u64 kernel_param_0)
{{
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .pred %p<9>;
{body}
ret;
}}
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.u32 %r1, %r2;", "instruction frobnicate is not supported"),
        ("add.u32.sideways %r1, %r2, %r3;", "modifier .sideways of add"),
        ("mov.u32 %r1, %nothing.x;", "neither a register nor a supported special register"),
        ("mov.u32 %r1, unknown_variable;", "unknown_variable is not a variable of this module"),
        ("bra nowhere;", "label nowhere is not in this function"),
        (
            "mma.sync.aligned.m16n8k32.row.col.f32.s8.s8.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, "
            "{%f1,%f2,%f3,%f4};",
            "mma",
        ),
        ("cp.async.bulk.commit_group;", "cp"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8;", "with .cg 16"),
        ("cvt.rm.tf32.f32 %r1, %f1;", "cvt.rm.tf32"),
        ("wgmma.fence.sync.aligned;", "wgmma"),
        ("ld.global.u32 %r1, [%rd1], 7, 8, 9;", "operands"),
        ("cvt.rn.satfinite.f16x2.f32 %r1, %f1, %f2;", "cvt"),
        ("atom.global.sub.u32 %r1, [%rd1], %r2;", "atom"),
        ("call helper;", "call"),
        ("barrier.cluster.arrive;", "this form of barrier is not supported"),
        ("bar.sync.sideways 0;", "this form of bar is not supported"),
        ("fence.proxy.async;", "fence"),
        ("mbarrier.init.shared.b64 [%rd1], 3;", "instruction mbarrier"),
    ],
)
def test_what_is_not_supported_is_refused_when_loaded(body: str, message: str) -> None:
    with pytest.raises(UnsupportedInstruction, match=message) as fault:
        Device().load(ptx(body))
    assert fault.value.ptx_line == 8


@pytest.mark.parametrize(
    "text",
    [
        ".version 8.0\n.target sm_80\nadd.u32 %r1, %r2, %r3;",
        ptx(".reg .quux %q;"),
        ptx("add.u32 %r1, [[, %r3;"),
        ".visible .entry kernel() {\n ret;",
        ptx("}}"),
        ptx("", ".global .align 4 .b8 x[4] = {banana!};"),
    ],
)
def test_what_is_not_ptx_is_refused(text: str) -> None:
    with pytest.raises(InvalidPtx):
        Device().load(text)
