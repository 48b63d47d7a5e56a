"""Wheel, sdist and editable install: each carries the CUDA sources, found by `cuflash.jit.sources`."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CUDA = {path.relative_to(ROOT / "kernels_cu").as_posix() for path in (ROOT / "kernels_cu").rglob("*.cu*")}
PROBE = "from cuflash.jit import sources; import cuflash; print(cuflash.__file__); print(*sources.sources())"


def copy_of_tree(folder: Path) -> Path:
    """The tree without what tools left in it; building writes beside setup.cfg while other workers test the tree."""
    hidden = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, folder / "tree", ignore=hidden))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with an sdist and, built from it, a wheel: what an index would serve."""
    out = tmp_path_factory.mktemp("dist")
    tree = copy_of_tree(tmp_path_factory.mktemp("tree"))
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree))
    return out


def call(*command: str, cwd: Path | None = None) -> str:
    # isolated from this tree: no PYTHONPATH leads back to it
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def probe(python: str, cwd: Path) -> tuple[Path, set[str]]:
    """Where `python` finds cuflash, and the CUDA sources that cuflash finds."""
    package, names = call(python, "-c", PROBE, cwd=cwd).splitlines()
    return Path(package), set(names.split())


def new_environment(folder: Path) -> str:
    """A virtual environment that sees this one's packages (NumPy, setuptools), but not this tree."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    inherited = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "inherited.pth").write_text("\n".join(inherited))
    return str(folder / "bin" / "python")


def test_the_sdist_has_sources_tests_and_examples(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {f"kernels_cu/{name}" for name in CUDA} <= names
    assert {"LICENSE", "pyproject.toml", "setup.cfg", "tests/conftest.py", "tests/oracle.py"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")} <= names


def test_the_wheel_is_complete_and_has_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cuflash").rglob("*.py")}
    assert names == modules | {"cuflash/py.typed"} | {f"cuflash/kernels_cu/{name}" for name in CUDA}


def test_an_installed_wheel_finds_its_sources(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    python = new_environment(tmp_path / "venv")
    call(python, "-m", "pip", "install", "--no-deps", "--quiet", "--ignore-installed", str(wheel))
    package, names = probe(python, tmp_path)
    assert package.is_relative_to(tmp_path)
    assert names == CUDA


def test_an_editable_install_finds_the_tree(tmp_path):
    tree = copy_of_tree(tmp_path)
    python = new_environment(tmp_path / "venv")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--ignore-installed"]
    call(python, "-m", "pip", "install", *options, "--editable", str(tree))
    package, names = probe(python, tmp_path)
    assert package == tree / "cuflash" / "__init__.py"
    assert names == CUDA


def test_every_package_of_the_tree_is_listed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent for path in (ROOT / "cuflash").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup["options"]["packages"].split()) == packages | {"cuflash.kernels_cu"}


def test_the_license_and_type_marker_are_there():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert (ROOT / "cuflash" / "py.typed").exists()
