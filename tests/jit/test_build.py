"""Compilation: what comes out, what is refused, what is remembered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cuflash.errors import CompileError, InvalidValueError
from cuflash.jit import compile_cubin, compile_ptx, compiler, resources, sources
from tests.jit.units import Scale


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_ptx_is_for_the_virtual_architecture_and_names_lines():
    ptx = compile_ptx(Scale(101), "sm_80")
    assert ".target sm_80" in ptx
    assert ".visible .entry scale(" in ptx
    assert re.search(r"\.loc\s+1 2 ", ptx), "the body is line 2 of the unit"


def test_files_in_ptx_are_named_as_they_are_included(monkeypatch):
    header = {"tile/twice.cuh": "__device__ inline float twice(float x) {\n    return x + x;\n}\n"}
    monkeypatch.setattr(compiler, "sources", lambda: header)
    unit = '#include "tile/twice.cuh"\nextern "C" __global__ void k(float *x) { *x = twice(*x); }\n'
    ptx = compiler.compile_unit(unit, "k.cu", "sm_80", "ptx").code.decode()
    assert set(re.findall(r'\.file\s+\d+\s+"([^"]*)"', ptx)) == {"k.cu", "tile/twice.cuh"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_120"])
def test_cubin_is_an_elf_file_for_the_architecture(arch):
    path = compile_cubin(Scale(102), arch)
    assert path.suffix == ".cubin"
    assert f"-{arch}-" in path.name
    assert path.read_bytes().startswith(b"\x7fELF")


def test_subnormals_are_kept():
    assert ".ftz" not in compile_ptx(Scale(103), "sm_80")


def test_resources():
    text = "__shared__ float s[64]; s[threadIdx.x] = {factor}; __syncthreads(); *x = s[7];"
    used = resources(Scale(104, text=text), "sm_80")
    assert 0 < used.registers <= 32
    assert used.static_shared == 256
    assert used.spill_stores == used.spill_loads == used.stack == 0


def test_spills_are_reported():
    loop = "float a[200]; for (int i = 0; i < 200; ++i) a[i] = x[i]; __syncthreads();"
    loop += " for (int j = 0; j < {factor}; ++j) for (int i = 0; i < 200; ++i) a[i] = a[i] * a[(i + 7) % 200];"
    loop += " for (int i = 0; i < 200; ++i) x[i] = a[i];"
    # 200 live values do not fit into 64 registers
    used = resources(Scale(105, text=loop, threads=1024), "sm_80")
    assert used.spill_stores > 0
    assert used.spill_loads > 0


def test_a_second_call_is_remembered():
    assert compile_ptx(Scale(106), "sm_80") is compile_ptx(Scale(106), "sm_80")


def test_a_compile_error_has_the_log_and_the_source(own_cache):
    with pytest.raises(CompileError, match='identifier "nonsense" is undefined') as caught:
        compile_cubin(Scale(107, text="nonsense;"), "sm_80")
    source = re.search(r"source in (\S+\.cu)\n", str(caught.value))
    assert source is not None
    assert "nonsense;" in Path(source[1]).read_text()
    assert source[1].startswith(str(own_cache))


def test_an_architecture_the_compiler_does_not_know():
    with pytest.raises(CompileError, match="gpu-architecture"):
        compile_cubin(Scale(108), "sm_81")


@pytest.mark.parametrize("arch", ["80", "compute_80", "sm_", "sm_80/../x", ""])
def test_not_an_architecture(arch):
    with pytest.raises(InvalidValueError, match=f"arch = '{arch}': must be an architecture such as"):
        compile_cubin(Scale(109), arch)


def test_sources_are_found_and_hashed():
    names = list(sources.sources())
    assert names == sorted(names)
    assert "kernels/forward.cu" in names
    assert len(sources.fingerprint()) == 64
