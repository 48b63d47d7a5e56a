"""`python -m cuflash info`: versions, extras, kernel cache and devices."""

from __future__ import annotations

import argparse
import platform
import re
from importlib import metadata
from typing import Any

from cuflash import __version__
from cuflash.errors import DeviceError
from cuflash.jit import compiler, sources
from cuflash.jit.cache import cache_dir


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("info", help="versions, extras, kernel cache and devices of this installation")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print(f"cuflash     {__version__}{'' if _version('cuflash') else ', not installed: running from its source tree'}")
    print(f"Python      {platform.python_version()} on {platform.platform()}")
    print(f"NumPy       {_version('numpy')}, ml_dtypes {_version('ml_dtypes')}")
    for name, packages in _extras().items():
        found = [f"{package} {_version(package)}" for package in packages if _version(package)]
        missing = [package for package in packages if not _version(package)]
        lacking = f"; missing {', '.join(missing)}" if missing else ""
        print(f"extra {name:9} {', '.join(found) or 'nothing'} found{lacking}")
    print(f"compiler    {_compiler()}")
    print(f"sources     {sources.root()}: {len(sources.sources())} files, {sources.fingerprint()[:12]}")
    print(f"cache       {_cache()}")
    devices, reason = _devices()
    for index, device in enumerate(devices):
        print(f"device {index}    {device}")
    if not devices:
        print(f"devices     none: {reason}")
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """Packages of each extra, as the installed metadata names them; those of `test` and `docs` left out."""
    extras: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("cuflash") or []
    except metadata.PackageNotFoundError:
        return extras
    for requirement in requirements:
        match = re.match(r"""([\w.-]+)(?:\[([\w,-]+)\])?.*extra == ["']([\w-]+)["']""", requirement)
        if match and match[3] not in ("test", "docs"):
            included = [f"[{name}]" for name in match[2].split(",")] if match[1] == "cuflash" else [match[1]]
            extras.setdefault(match[3], []).extend(included)
    return {name: _expanded(name, extras) for name in sorted(extras)}


def _expanded(name: str, extras: dict[str, list[str]]) -> list[str]:
    """The packages of an extra, with those of the extras that it includes."""
    packages = []
    for package in extras[name]:
        packages += _expanded(package.strip("[]"), extras) if package.startswith("[") else [package]
    return packages


def _compiler() -> str:
    try:
        return f"NVRTC {compiler.compiler_version()}"
    except DeviceError as error:
        return f"none: {error}"


def _cache() -> str:
    files = [path for path in cache_dir().glob("*") if path.is_file()]
    kernels = sum(path.suffix in (".cubin", ".ptx") for path in files)
    return f"{cache_dir()}: {kernels} kernels, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"


def _devices() -> tuple[list[str], str]:
    """A line for each GPU that the driver lists, and why there is none."""
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
    except ImportError:
        return [], f"cuda-bindings is not installed ({compiler.EXTRAS})"
    except RuntimeError:  # raised where libcuda is not found
        return [], "this machine has no NVIDIA driver; cuflash.emulate runs the kernels without one"
    if status != 0:
        return [], f"the driver reports {status.name}"
    return [_device(driver, index) for index in range(driver.cuDeviceGetCount()[1])], "the driver lists no device"


def _device(driver: Any, index: int) -> str:
    handle = driver.cuDeviceGet(index)[1]
    name = driver.cuDeviceGetName(64, handle)[1].rstrip(b"\0").decode()
    attribute = driver.CUdevice_attribute
    major, minor, sms = (
        driver.cuDeviceGetAttribute(which, handle)[1]
        for which in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
    )
    memory = driver.cuDeviceTotalMem(handle)[1]
    return f"{name}, compute capability {major}.{minor}, {sms} multiprocessors, {memory / 2**30:.0f} GiB"
