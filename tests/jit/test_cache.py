"""The disk cache: hit without a compiler, never trust a broken entry, never compile twice, never fail to start."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cuflash.errors import CompileError, DeviceError
from cuflash.jit import build, cache, compile_cubin, compile_ptx, compiler, sources
from tests.jit.units import Scale

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget():
    """What a new process would not know."""
    for function in (build._build, compile_ptx, cache.temporary_dir, compiler.compiler_version):
        function.cache_clear()
    for function in (sources.sources, sources.fingerprint):
        function.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """Names of the units that were really compiled."""
    names = []
    original = compiler.compile_unit

    def counting(unit, name, arch, kind):
        names.append(name)
        return original(unit, name, arch, kind)

    monkeypatch.setattr(compiler, "compile_unit", counting)
    return names


def test_the_folder_follows_our_variable_then_cupys(monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("CUPY_CACHE_DIR", "/elsewhere")
    assert cache.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("CUFLASH_CACHE_DIR")
    assert cache.cache_dir() == Path("/elsewhere/cuflash")
    monkeypatch.delenv("CUPY_CACHE_DIR")
    assert cache.cache_dir() == Path.home() / ".cupy/kernel_cache/cuflash"


def test_an_entry_keeps_its_source_and_its_record(folder):
    path = compile_cubin(Scale(1), "sm_80")
    assert path.parent == folder
    assert path.with_suffix(".cu").read_text() == Scale(1).unit()
    record = json.loads(path.with_suffix(".json").read_text())
    assert "registers" in record["log"]
    assert not list(folder.glob("*.partial"))


def test_a_new_process_compiles_nothing(compilations):
    for compile_one in (compile_cubin, compile_ptx):
        first = compile_one(Scale(2), "sm_80")
        forget()
        assert compile_one(Scale(2), "sm_80") == first
    assert len(compilations) == 2


def test_every_input_of_the_compiler_is_in_the_key(compilations, monkeypatch):
    paths = {compile_cubin(Scale(3), "sm_80"), compile_cubin(Scale(4), "sm_80"), compile_cubin(Scale(3), "sm_86")}
    forget()
    monkeypatch.setattr(compiler, "compiler_version", lambda: "0.0")
    paths.add(compile_cubin(Scale(3), "sm_80"))
    build._build.cache_clear()
    monkeypatch.setattr(sources, "fingerprint", lambda: "another header")
    paths.add(compile_cubin(Scale(3), "sm_80"))
    build._build.cache_clear()
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-DX"))
    paths.add(compile_cubin(Scale(3), "sm_80"))
    monkeypatch.undo()
    assert len(paths) == len(compilations) == 6


def truncate_cubin(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty_cubin(path: Path) -> None:
    path.write_bytes(b"")


def remove_cubin(path: Path) -> None:
    path.unlink()


def foreign_cubin(path: Path) -> None:
    path.write_bytes(b"\x7fELF of another program")


def truncate_record(path: Path) -> None:
    truncate_cubin(path.with_suffix(".json"))


def foreign_record(path: Path) -> None:
    path.with_suffix(".json").write_text("[1, 2]")


def binary_record(path: Path) -> None:
    path.with_suffix(".json").write_bytes(b"\xff\xfe\x00")


def entry_of_another_kernel(path: Path) -> None:
    """A complete, consistent entry, renamed."""
    other = compile_cubin(Scale(6), "sm_80")
    for suffix in (".cubin", ".json"):
        path.with_suffix(suffix).write_bytes(other.with_suffix(suffix).read_bytes())


DAMAGES = [
    truncate_cubin, empty_cubin, remove_cubin, foreign_cubin,
    truncate_record, foreign_record, binary_record, entry_of_another_kernel,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_replaced(damage, compilations):
    path = compile_cubin(Scale(5), "sm_80")
    good = path.read_bytes()
    damage(path)
    forget()
    before = len(compilations)
    assert compile_cubin(Scale(5), "sm_80") == path
    assert path.read_bytes() == good
    assert len(compilations) == before + 1


def test_left_overs_of_a_crash_do_no_harm(folder, compilations):
    path = compile_cubin(Scale(7), "sm_80")
    path.with_suffix(".json").unlink()
    path.with_suffix(".cubin.partial").write_bytes(b"half")
    forget()
    assert compile_cubin(Scale(7), "sm_80").read_bytes().startswith(b"\x7fELF")
    assert not list(folder.glob("*.partial"))


def test_a_filled_cache_is_read_without_writing(monkeypatch):
    path = compile_cubin(Scale(8), "sm_80")
    forget()
    monkeypatch.setattr(cache, "_lock", None)
    monkeypatch.setattr(cache.Entry, "_write", None)
    assert compile_cubin(Scale(8), "sm_80") == path


def test_an_unwritable_folder_falls_back_to_a_temporary_one(folder, monkeypatch):
    blocked = folder / "a_file"
    blocked.write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(blocked / "cache"))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(folder))
    text = r"a_file/cache cannot be written .*kept in .*/cuflash-\w+ for this"
    with pytest.warns(RuntimeWarning, match=text) as seen:
        path = compile_cubin(Scale(9), "sm_80")
    assert path.exists()
    assert str(path.parent) in str(seen[0].message)


def test_a_folder_that_cannot_be_locked_is_replaced_once(folder, monkeypatch):
    monkeypatch.setattr(cache.tempfile, "tempdir", str(folder))
    original = cache._lock

    def refused(path):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(cache, "_lock", refused)
    with pytest.warns(RuntimeWarning, match="cannot be written .Permission denied.") as seen:
        paths = [compile_cubin(Scale(factor), "sm_80") for factor in (9, 10)]
    assert len(seen) == 1
    assert paths[0].parent == paths[1].parent != folder


def test_threads_compile_once(compilations):
    start = threading.Barrier(8)
    paths = []

    def work():
        start.wait()
        paths.append(compile_cubin(Scale(11), "sm_80"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(set(paths)) == len(compilations) == 1


WORKER = """
import sys, time
from pathlib import Path
from cuflash.jit import compile_cubin, compile_ptx, compiler
from tests.jit.units import Scale

log, go = map(Path, sys.argv[1:])
original = compiler.compile_unit
def logging(unit, name, arch, kind):
    with log.open("a") as file:
        file.write(f"{name} {kind}\\n")
    return original(unit, name, arch, kind)
compiler.compile_unit = logging
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for i in range(3):
    config = Scale(20 + i, entry=f"scale_{i}")
    assert compile_cubin(config, "sm_80").read_bytes()[:4] == b"\\x7fELF"
    assert "scale" in compile_ptx(config, "sm_80")
"""


def test_eight_processes_compile_each_kernel_once(folder):
    log, go = folder / "log", folder / "go"
    command = [sys.executable, "-W", "error", "-c", WORKER, str(log), str(go)]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    go.touch()
    results = [(worker.communicate()[1], worker.returncode) for worker in workers]
    assert results == [("", 0)] * 8
    assert sorted(log.read_text().split("\n")[:-1]) == sorted(
        f"scale_{i}.cu {kind}" for i in range(3) for kind in ("cubin", "ptx")
    )


HIT = """
import sys, time
from cuflash.jit import compile_cubin
from tests.jit.units import Scale
start = time.perf_counter()
compile_cubin(Scale(30), "sm_80")
print(1e3 * (time.perf_counter() - start))
print(*(name for name in ("cuda.bindings", "filelock", "rich", "cupy") if name in sys.modules))
"""


def test_a_hit_takes_50_ms_at_most_and_loads_no_compiler():
    compile_cubin(Scale(30), "sm_80")
    best = min(float(run_hit()) for _ in range(5))
    assert best <= 50, f"{best:.1f} ms in a new process"


def run_hit() -> str:
    done = subprocess.run([sys.executable, "-c", HIT], cwd=ROOT, capture_output=True, text=True, check=True)
    milliseconds, loaded = done.stdout.split("\n")[:2]
    assert loaded == ""
    return milliseconds


def test_a_later_call_takes_microseconds():
    config = Scale(31)
    compile_cubin(config, "sm_80")
    times = []
    for _ in range(1000):
        start = time.perf_counter()
        compile_cubin(config, "sm_80")
        times.append(time.perf_counter() - start)
    assert sorted(times)[500] <= 10e-6


def test_missing_packages_name_the_extras(monkeypatch):
    wanted = r"cuflash\[cu12\].*cuflash\[cu13\].*cuflash\[emulator\]"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "filelock", None)
        with pytest.raises(DeviceError, match=f"filelock is not installed.*{wanted}"):
            compile_cubin(Scale(32), "sm_80")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", None)
        compiler._nvrtc.cache_clear()
        with pytest.raises(DeviceError, match=f"NVRTC cannot be loaded.*{wanted}"):
            compile_cubin(Scale(32), "sm_80")

    def missing(name):
        raise compiler.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiler.metadata, "version", missing)
    forget()
    with pytest.raises(DeviceError, match=f"cuda-bindings is not installed.*{wanted}"):
        compile_cubin(Scale(32), "sm_80")


def test_without_a_wheel_the_library_says_its_version(monkeypatch):
    def no_wheel(name):
        if name == "cuda-bindings":
            return "13.0"
        raise compiler.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiler.metadata, "version", no_wheel)
    assert int(compiler.compiler_version().split(".")[0]) >= 12


def test_a_failure_is_not_remembered(folder):
    bad = Scale(33, text="nonsense;")
    for _ in range(2):
        with pytest.raises(CompileError):
            compile_cubin(bad, "sm_80")
    assert not list(folder.glob("*.cubin")) + list(folder.glob("*.json"))
