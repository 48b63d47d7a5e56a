"""The disk cache: one entry per compiled unit, trusted only when its checksum says so.

An entry is four files of one name: the code (.cubin or .ptx), the unit it came from (.cu), the record (.json:
key, checksum, resources, log) and a lock. Each appears by an atomic rename while the lock is held, the record last,
so that a record that agrees with its code is a complete entry. Readers take no lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cuflash.errors import CompileError, DeviceError
from cuflash.jit.compiler import EXTRAS, Compiled


def cache_dir() -> Path:
    """$CUFLASH_CACHE_DIR, else the folder `cuflash` in CuPy's: $CUPY_CACHE_DIR or ~/.cupy/kernel_cache."""
    own = os.environ.get("CUFLASH_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")) / "cuflash"


@dataclass(frozen=True)
class Entry:
    """A place in the cache: `name` and suffix of its files, and the full key that its record must carry."""

    folder: Path
    name: str
    suffix: str  # of the code: ".cubin" or ".ptx"
    key: str

    @property
    def code_path(self) -> Path:
        return self._path(self.suffix)

    @property
    def source_path(self) -> Path:
        return self._path(".cu")

    def record(self) -> dict[str, Any] | None:
        """The record of a complete entry; None when a file is missing, truncated or foreign."""
        try:
            record = json.loads(self._path(".json").read_text(encoding="utf-8"))
            code = self.code_path.read_bytes()
            complete = record["key"] == self.key and record["sha256"] == hashlib.sha256(code).hexdigest()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if complete else None

    def fill(
        self, unit: str, compile_unit: Callable[[], Compiled], facts: Callable[[str], dict[str, Any]]
    ) -> dict[str, Any]:
        """Compile and write the entry unless another process or thread has done so meanwhile; returns the record.

        `facts` makes what the record keeps, beside key, checksum and log, from the compiler's log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self._path(".lock")):
            record = self.record()
            if record is not None:
                return record
            self._write(".cu", unit.encode())
            try:
                compiled = compile_unit()
            except CompileError as error:
                raise CompileError(f"{self.name}: does not compile; source in {self.source_path}\n{error}") from None
            record = {"key": self.key, "sha256": hashlib.sha256(compiled.code).hexdigest(), "log": compiled.log}
            self._write(self.suffix, compiled.code)
            record |= facts(compiled.log)
            self._write(".json", json.dumps(record, indent=1).encode())
            return record

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}{suffix}"

    def _write(self, suffix: str, data: bytes) -> None:
        partial = self._path(f"{suffix}.partial")  # one writer: the lock is held
        partial.write_bytes(data)
        os.replace(partial, self._path(suffix))


@cache
def temporary_dir(unwritable: Path, reason: str | None) -> Path:
    """A fresh folder that stands in for a cache that cannot be written; warns with both names."""
    folder = Path(tempfile.mkdtemp(prefix="cuflash-"))
    warnings.warn(
        f"kernel cache {unwritable} cannot be written ({reason}): kernels are kept in {folder} for this process; "
        "set CUFLASH_CACHE_DIR to a writable folder",
        RuntimeWarning,
        stacklevel=2,
    )
    return folder


def _lock(path: Path) -> Any:
    try:
        from filelock import FileLock
    except ImportError:
        raise DeviceError(f"filelock is not installed: compiling a kernel needs {EXTRAS}") from None
    return FileLock(path)
