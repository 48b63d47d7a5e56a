"""Where the CUDA sources are, what they say, and one hash over all of them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from cuflash.errors import CompileError

SUFFIXES = (".cu", ".cuh")


@cache
def root() -> Path:
    """The folder of the CUDA sources: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "kernels_cu", package.parent / "kernels_cu"):
        if folder.is_dir():
            return folder
    raise CompileError(f"CUDA sources: expected in {package / 'kernels_cu'}; the installation is incomplete")


@cache
def sources() -> dict[str, str]:
    """Every CUDA source by its name in an `#include`, the path below `root()`, in a fixed order."""
    folder = root()
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


@cache
def fingerprint() -> str:
    """Hash over the names and texts of all sources: one changed line changes every cache key."""
    digest = hashlib.sha256()
    for name, text in sources().items():
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
