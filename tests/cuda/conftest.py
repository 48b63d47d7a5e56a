"""Tests of what only a GPU has: streams, graphs, arrays of frameworks on it. Collected with --device=cuda alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import chosen_devices

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes most of the GPU's memory


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if "cuda" in chosen_devices(config) else True
