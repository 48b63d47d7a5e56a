"""The command line: info, compile, and what they say to wrong flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cuflash
from cuflash.cli import compile as compile_command
from cuflash.cli import info, main
from cuflash.jit import ahead, compiler
from cuflash.plan.shipped import shipped_configs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_info(capsys, own_cache):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"cuflash     {cuflash.__version__}" in text
    assert f"NVRTC {compiler.compiler_version()}" in text
    assert f"cache       {own_cache}: 0 kernels, 0.0 MiB" in text
    assert "kernels_cu: " in text
    assert "device" in text


@pytest.mark.parametrize("arguments", [["info"], ["explain", "--shape", "64,32"]], ids=["info", "explain"])
@pytest.mark.parametrize("python", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_leaves(arguments, python):
    """As of `python -m cuflash info | head -1`: nothing to complain about."""
    command = [sys.executable, *python, "-m", "cuflash", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_info_says_what_an_extra_lacks(capsys, monkeypatch):
    installed = {"filelock": "3.0", "rich": "13.0", "cuflash": "0.1"}
    requirements = [
        "numpy>=2.0",
        "cuflash[emulator]; extra == 'cu13'",
        'cupy-cuda13x>=14; extra == "cu13"',
        'filelock>=3.12; extra == "emulator"',
        'cuda-bindings<14,>=13.0; extra == "emulator"',
        'torch==2.13.0; extra == "test"',
    ]

    def version(name):
        if name not in installed:
            raise info.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(info.metadata, "version", version)
    monkeypatch.setattr(info.metadata, "requires", lambda name: requirements)
    compiler.compiler_version.cache_clear()
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "extra cu13      filelock 3.0 found; missing cuda-bindings, cupy-cuda13x" in lines
    assert "extra emulator  filelock 3.0 found; missing cuda-bindings" in lines
    assert not any("torch" in line for line in lines)
    assert any(line.startswith("compiler    none: cuda-bindings is not installed") for line in lines)


def test_info_on_a_base_install_says_why_there_is_no_device(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert main(["info"]) == 0
    assert "devices     none: cuda-bindings is not installed (pip install" in capsys.readouterr().out


def test_compile_fills_the_cache_with_a_progress_bar(capsys, own_cache, monkeypatch):
    two = shipped_configs("sm_86")[:2]
    monkeypatch.setattr(compile_command, "shipped_configs", lambda *chosen: two)
    arguments = ["compile", "--arch", "sm_86", "sm_86"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "2/2" in text
    assert f"2 kernels for sm_86 in {own_cache}" in text.replace("\n", "")
    cubins = {path: path.stat().st_mtime_ns for path in own_cache.glob("*-sm_86-*.cubin")}
    assert len(cubins) == 2
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in own_cache.glob("*.cubin")} == cubins


def test_compile_selects_by_dtype_and_head_dim(capsys, own_cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(compile_command, "compile_all", lambda jobs: compiled.extend(jobs) or iter(()))
    assert main(["compile", "--arch", "sm_80", "--dtype", "bfloat16", "--head-dim", "64", "72"]) == 0
    configs = [config for config, _ in compiled]
    assert {getattr(config, "dtype", "bfloat16") for config in configs} == {"bfloat16"}
    assert {config.head_dim_v for config in configs} == {64, 72}
    assert set(configs) & set(shipped_configs("sm_80"))


def test_a_failing_kernel_fails_the_batch(own_cache):
    from tests.jit.units import Scale

    jobs = [(Scale(1), "sm_80"), (Scale(2, text="nonsense;"), "sm_80")]
    with pytest.raises(cuflash.CompileError, match='"nonsense" is undefined'):
        list(ahead.compile_all(jobs))


def test_no_jobs():
    assert list(ahead.compile_all([])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["compile"], "required: --arch"),
        (["compile", "--arch", "sm_81"], "invalid choice: 'sm_81' (choose from"),
        (["compile", "--arch", "sm_80", "--dtype", "int8"], "invalid choice: 'int8' (choose from"),
        (["compile", "--arch", "sm_80", "--head-dim", "many"], "many: must be 1 to 512"),
        (["compile", "--arch", "sm_80", "--head-dim", "513"], "513: must be 1 to 512"),
        (["info", "--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_typed_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert main(["compile", "--arch", "sm_80"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rich is not installed: compiling needs pip install 'cuflash[cu12]'")


def test_python_m_cuflash():
    done = subprocess.run(
        [sys.executable, "-m", "cuflash", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("info", "compile"):
        assert f"    {command} " in done.stdout
